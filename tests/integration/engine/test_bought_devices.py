"""Bought devices in a running core, on virtual time: shipped types, with payloads as the firmwares send
them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from broker.domain.errors import Refusal
from broker.domain.events import Changed
from broker.domain.lanes import Presence
from broker.engine.live import KEPT
from broker.engine.registry import NewDevice
from broker.seams import Message
from devices.types import load_type
from projections import past
from tests.integration.core_support import ME, PROJECT, Bench, on_virtual_time, simulated, until
from tests.simulation.loop import SimLoop

SHELLY, PLUG = "shellyplus1-a8032abe54dc", "tasmota_9CF9D1"
BACKLOG_SEC = 2.5
ALARM = """
name = "alarm"
command_topic = "plant/{hardware_id}/in"
answer_topics = ["plant/{hardware_id}/out"]
template = { ref = "$id", what = "$type", volume = "$params.volume", try = "$attempt", cash = "$$5" }
[[answers]]
when = "done"
id = "ref"
status = "executed"
result = "{seen: volume}"
[[answers]]
id = "ref"
status = "progress"
progress = "{percent: percent, note: note}"
[commands.ring]
wire_name = "Ring.Now"
"""


def scene(of: Callable[[Bench], Awaitable[None]], *, type: str = "", embedded: bool = False) -> None:
    """Runs a scene in a core, by default with an external MQTT server whose backlog was read."""

    async def world(loop: SimLoop) -> None:
        types = {kind.name: kind for kind in ([load_type(type)] if type else [])}
        async with on_virtual_time(loop, types=types, embedded=embedded) as (bench, _):
            await asyncio.sleep(BACKLOG_SEC)
            await of(bench)

    simulated(world)


async def register(bench: Bench, hardware_id: str, type: str, name: str | None = None) -> str:
    new = NewDevice(hardware_id=hardware_id, type=type, project=PROJECT, name=name)
    return (await bench.core.registry.register(ME, new)).device.id


def says(bench: Bench, topic: str, payload: str, **fields: Any) -> None:
    bench.core.intake.message(Message(topic=topic, payload=payload.encode(), **fields))


async def sent(bench: Bench, count: int) -> tuple[str, Any]:
    """The topic and the payload of the newest message, when there are so many."""
    await until(lambda: len(bench.wire.sent) == count)
    last = bench.wire.sent[-1]
    try:
        return last.topic, msgspec.json.decode(last.payload)
    except msgspec.DecodeError:
        return last.topic, last.payload.decode()


async def events(bench: Bench, command_id: str) -> list[Any]:
    await bench.writer.barrier()
    rows = [row for row in await bench.rows() if row.stream == command_id]
    return [msgspec.json.decode(row.data or b"{}") | {"type": row.type} for row in rows]


def test_a_shelly_is_switched_by_a_numbered_request_and_names_the_number_in_its_answer() -> None:
    async def shelly(bench: Bench) -> None:
        await register(bench, SHELLY, "shelly_gen2")
        command = await bench.order(SHELLY, "turn_on", params={"channel": 1})
        await asyncio.sleep(1)
        assert bench.state(command.id) == "pending"  # it has never said that it is online
        says(bench, f"{SHELLY}/online", "true")
        topic, request = await sent(bench, 1)
        assert topic == f"{SHELLY}/rpc"
        number = request.pop("id")
        assert request == {
            "src": f"iotee/rpc/{SHELLY}",
            "method": "Switch.Set",
            "params": {"id": 1, "on": True},
        }
        answer = {"id": number, "src": SHELLY, "dst": f"iotee/rpc/{SHELLY}", "result": {"was_on": False}}
        says(bench, f"iotee/rpc/{SHELLY}/rpc", msgspec.json.encode(answer).decode())
        await bench.becomes(command.id, "executed")
        _, published, executed = await events(bench, command.id)
        assert (published["number"], executed["result"]) == (number, {"was_on": False})
        assert "evidence" not in executed  # the device's own result

    scene(shelly)


def test_the_error_of_a_shelly_fails_the_command_that_its_number_names() -> None:
    async def shelly(bench: Bench) -> None:
        await register(bench, SHELLY, "shelly_gen2")
        says(bench, f"{SHELLY}/online", "true")
        command = await bench.order(SHELLY, "toggle", params={"channel": 7})
        _, request = await sent(bench, 1)
        said = (
            '{"id":%d,"src":"%s","dst":"iotee/rpc/%s",'
            '"error":{"code":-105,"message":"Argument \'id\', value 7 not found!"}}'
        )
        says(bench, f"iotee/rpc/{SHELLY}/rpc", said % (request["id"] + 1, SHELLY, SHELLY))
        await until(lambda: len(bench.wire.pubacks) == 2)
        assert bench.state(command.id) == "published"  # that number is of no attempt
        says(bench, f"iotee/rpc/{SHELLY}/rpc", said % (request["id"], SHELLY, SHELLY))
        state = await bench.becomes(command.id, "failed")
        assert state.error is not None
        assert (state.error.code, state.error.message) == ("-105", "Argument 'id', value 7 not found!")
        assert await bench.unmatched() == ["unknown"]

    scene(shelly)


def test_an_answer_names_its_command_although_many_other_devices_had_attempts_since() -> None:
    async def shelly(bench: Bench) -> None:
        await register(bench, SHELLY, "shelly_gen2")
        says(bench, f"{SHELLY}/online", "true")
        command = await bench.order(SHELLY, "toggle", params={"channel": 0})
        _, request = await sent(bench, 1)
        for other in range(2 * KEPT):
            bench.core.live.numbers.put((f"dev_{other}", 1), f"cmd_{other}")
        said = '{"id":%d,"src":"%s","dst":"iotee/rpc/%s","result":{"was_on":false}}'
        says(bench, f"iotee/rpc/{SHELLY}/rpc", said % (request["id"], SHELLY, SHELLY))
        await bench.becomes(command.id, "executed")

    scene(shelly)


def test_an_answer_to_an_earlier_attempt_still_names_its_command() -> None:
    async def shelly(bench: Bench) -> None:
        await register(bench, SHELLY, "shelly_gen2")
        says(bench, f"{SHELLY}/online", "true")
        command = await bench.order(SHELLY, "turn_off", ttl_sec=600)
        _, first = await sent(bench, 1)
        _, second = await sent(bench, 2)
        assert first["id"] != second["id"]
        assert bench.wire.sent[0].payload != bench.wire.sent[1].payload
        says(bench, f"iotee/rpc/{SHELLY}/rpc", f'{{"id":{first["id"]},"result":{{"was_on":true}}}}')
        await bench.becomes(command.id, "executed")

    scene(shelly)


def test_a_tasmota_answers_with_the_state_that_the_command_wanted() -> None:
    async def tasmota(bench: Bench) -> None:
        await register(bench, PLUG, "tasmota")
        says(bench, f"tele/{PLUG}/LWT", "Online", retain=True)
        command = await bench.order(PLUG, "turn_on")
        assert await sent(bench, 1) == (f"cmnd/{PLUG}/POWER", "ON")
        says(bench, f"stat/{PLUG}/RESULT", '{"POWER":"OFF"}')  # a button
        says(bench, f"stat/{PLUG}/RESULT", '{"POWER":"ON"}')
        state = await bench.becomes(command.id, "executed")
        assert bytes(state.result) == b'{"POWER":"ON"}'
        await asyncio.sleep(2)
        dimmed = await bench.order(PLUG, "set_dimmer", params={"level": 40})
        assert await sent(bench, 2) == (f"cmnd/{PLUG}/Dimmer", 40)
        says(bench, f"stat/{PLUG}/RESULT", '{"POWER":"ON","Dimmer":40}')
        await bench.becomes(dimmed.id, "executed")
        says(bench, f"tele/{PLUG}/LWT", "Offline")
        device = bench.live.device(PLUG)
        assert device is not None
        await until(lambda: bench.live.presence.get(device.id) is Presence.OFFLINE)
        held = await bench.order(PLUG, "turn_off")
        await asyncio.sleep(5)
        assert bench.state(held.id) == "pending"

    scene(tasmota)


def test_a_switch_that_is_already_on_is_asked_and_its_live_state_closes_the_command() -> None:
    async def lamp(bench: Bench) -> None:
        device_id = await register(bench, "0x00158d0001a2b3c4", "zigbee2mqtt", "kitchen lamp")
        says(bench, "zigbee2mqtt/kitchen lamp", '{"state":"ON","brightness":254}', retain=True)
        command = await bench.order("0x00158d0001a2b3c4", "turn_on")
        assert await sent(bench, 1) == ("zigbee2mqtt/kitchen lamp/set", {"state": "ON"})
        says(bench, "zigbee2mqtt/kitchen lamp", '{"state":"ON","brightness":254}', retain=True)
        assert await sent(bench, 2) == ("zigbee2mqtt/kitchen lamp/get", {"state": ""})
        assert bench.state(command.id) == "published"  # a retained state is only known state
        says(bench, "zigbee2mqtt/kitchen lamp", '{"state":"ON","brightness":254,"linkquality":80}')
        await bench.becomes(command.id, "executed")
        assert (await events(bench, command.id))[-1]["evidence"] == "observed"
        device = bench.live.device(device_id)
        assert device is not None
        assert device.reported == {"state": "ON", "brightness": 254, "linkquality": 80}
        assert await bench.types(f"device/{device_id}") == ["registered", "reported", "reported", "online"]

    scene(lamp)


def test_a_state_from_before_the_bytes_were_written_closes_nothing() -> None:
    async def lamp(bench: Bench) -> None:
        await register(bench, "lamp", "zigbee2mqtt")
        ordered = asyncio.ensure_future(bench.order("lamp", "turn_on"))
        await until(lambda: bool(bench.live.members))  # `published` is staged and not durable yet
        assert bench.wire.sent == []
        says(bench, "zigbee2mqtt/lamp", '{"state":"ON"}')
        command = await ordered
        await sent(bench, 1)
        await asyncio.sleep(1)
        assert bench.state(command.id) == "published"

    scene(lamp)


def test_a_lock_that_reports_its_bolt_is_locked_when_the_bolt_is() -> None:
    async def lock(bench: Bench) -> None:
        await register(bench, "lock", "zigbee2mqtt", "front")
        command = await bench.order("lock", "lock")
        await sent(bench, 1)
        says(bench, "zigbee2mqtt/front", '{"battery":90,"lock_state":"unlocked","state":"LOCK"}')
        await asyncio.sleep(0.1)
        assert bench.state(command.id) == "published"
        says(bench, "zigbee2mqtt/front", '{"battery":90,"lock_state":"locked","state":"LOCK"}')
        await bench.becomes(command.id, "executed")

    scene(lock)


def test_a_template_carries_ids_parameters_and_attempts_and_rules_read_them_back() -> None:
    async def alarm(bench: Bench) -> None:
        await register(bench, "bell", "alarm")
        says(bench, "iotee/dev/bell/status", "online")
        command = await bench.order("bell", "ring", params={"volume": 3})
        topic, message = await sent(bench, 1)
        assert topic == "plant/bell/in"
        assert message == {"ref": command.id, "what": "Ring.Now", "volume": 3, "try": 1, "cash": "$5"}
        says(bench, "plant/bell/out", f'{{"ref":"{command.id}","percent":40,"note":"warm"}}')
        assert (await bench.becomes(command.id, "acknowledged")).percent == 40
        says(bench, "plant/bell/out", f'{{"ref":"{command.id}","done":true,"volume":3}}')
        assert bytes((await bench.becomes(command.id, "executed")).result) == b'{"seen":3}'
        says(bench, "plant/bell/out", "[" * 100)
        says(bench, "plant/bell/out", '{"ref":"cmd_no"}')
        says(bench, "plant/bell/out", f'{{"ref":"{command.id}","percent":"much"}}')
        await until(lambda: len(bench.wire.pubacks) == 6)
        await bench.writer.barrier()
        assert await bench.unmatched() == ["malformed", "no_rule", "no_rule"]

    scene(alarm, type=ALARM)


def test_a_name_in_topics_belongs_to_one_device() -> None:
    async def names(bench: Bench) -> None:
        await register(bench, "lamp-1", "zigbee2mqtt", "desk")
        await register(bench, "lamp-4", "zigbee2mqtt", "online")
        for hardware_id, kind, name in (
            ("lamp-2", "zigbee2mqtt", "desk"),  # taken
            ("lamp-3", "zigbee2mqtt", "a/b"),  # not one level
            ("zigbee2mqtt", "shelly_gen2", None),  # its topic zigbee2mqtt/online is that of lamp-4
        ):
            with pytest.raises(Refusal) as refused:
                await register(bench, hardware_id, kind, name)
            assert refused.value.kind == "invalid_request", hardware_id
        for node in ("garage", "shed"):
            await register(bench, node, "esphome_switch", "relay")
        await register(bench, "lamp-5", "zigbee2mqtt")
        with pytest.raises(Refusal):
            await bench.core.registry.change(ME, "lamp-5", Changed(name="desk"))
        await bench.core.registry.change(ME, "lamp-1", Changed(name="window"))
        await bench.core.registry.change(ME, "lamp-5", Changed(name="desk"))
        await bench.order("lamp-5", "turn_off")
        assert (await sent(bench, 1))[0] == "zigbee2mqtt/desk/set"

    scene(names)


@pytest.mark.parametrize(
    "name", ["homeassistant", "zigbee2mqtt", "stat", "tele", "shellies", "esphome", "iotee"]
)
@pytest.mark.parametrize("kind", ["shelly_gen2", "esphome_switch", "esphome_node"])
def test_a_device_cannot_be_called_so_that_it_may_publish_for_others(name: str, kind: str) -> None:
    async def naming(bench: Bench) -> None:
        with pytest.raises(Refusal, match=f"publish on topics of other devices: {name}/# covers"):
            await register(bench, name, kind)
        await register(bench, name, "generic")
        with pytest.raises(Refusal, match="topics of other devices"):
            await bench.core.registry.change(ME, name, Changed(device_type=kind))

    scene(naming)


def test_the_topics_of_others_are_counted_and_not_kept() -> None:
    async def others(bench: Bench) -> None:
        counted: list[str] = []
        bench.core.intake.on_unmatched = counted.append
        says(bench, "zigbee2mqtt/somebody elses lamp", '{"state":"ON"}')
        await until(lambda: counted == ["unknown_device"])
        await bench.writer.barrier()
        assert await bench.unmatched() == []

    scene(others)


def test_after_a_silence_it_is_unknown_whether_the_device_is_online() -> None:
    async def quiet(bench: Bench) -> None:
        device_id = await register(bench, "m1", "meter")
        says(bench, "meter/m1/state", '{"kwh":3}')
        await until(lambda: bench.live.presence.get(device_id) is Presence.ONLINE)
        await asyncio.sleep(20)
        says(bench, "meter/m1/state", '{"kwh":4}')
        await asyncio.sleep(29)
        assert bench.live.presence[device_id] is Presence.ONLINE
        await asyncio.sleep(2)
        assert bench.live.presence[device_id] is Presence.UNKNOWN

    scene(
        quiet,
        type="""
name = "meter"
command_topic = "meter/{hardware_id}/in"
state_topics = ["meter/{hardware_id}/state"]
silence_sec = 30
template = { read = true }
[commands.read]
done_when = "kwh"
""",
    )


def reported(bench: Bench) -> dict[str, Any] | None:
    device = bench.live.device("lamp")
    return None if device is None else device.reported


def test_the_last_known_state_can_be_read_as_it_was() -> None:
    async def lamp(bench: Bench) -> None:
        device_id = await register(bench, "lamp", "zigbee2mqtt")
        says(bench, "zigbee2mqtt/lamp", '{"state":"OFF","brightness":10}')
        await until(lambda: reported(bench) is not None)
        await bench.writer.barrier()
        position = bench.writer.durable
        says(bench, "zigbee2mqtt/lamp", '{"state":"ON"}')
        await until(lambda: reported(bench) == {"state": "ON", "brightness": 10})
        await bench.writer.barrier()
        then = await bench.writer.storage.read(lambda sql: past.device(sql, device_id, position))
        assert then is not None
        assert then.state.reported == {"state": "OFF", "brightness": 10}

    scene(lamp)


def test_the_state_of_a_type_without_record_state_is_not_kept() -> None:
    silent = ALARM.replace('name = "alarm"\n', 'name = "alarm"\nrecord_state = "none"\n').replace(
        "[[answers]]", 'state_topics = ["plant/{hardware_id}/state"]\n[[answers]]', 1
    )

    async def alarm(bench: Bench) -> None:
        device_id = await register(bench, "bell-1", "alarm")
        says(bench, "plant/bell-1/state", '{"ringing":true}')
        await asyncio.sleep(5)
        assert [each["type"] for each in await events(bench, f"device/{device_id}")] == [
            "registered",
            "online",
        ]

    scene(alarm, type=silent)


def test_a_device_that_reports_all_the_time_fills_the_log_within_its_rate_and_its_newest_state_counts() -> (
    None
):
    async def lamp(bench: Bench) -> None:
        device_id = await register(bench, "lamp", "zigbee2mqtt")
        limits = bench.core.commands.limits
        for number in range(500):
            says(bench, "zigbee2mqtt/lamp", f'{{"state":"ON","power":{number}}}')
            await asyncio.sleep(0.01)
        await until(lambda: reported(bench) == {"state": "ON", "power": 499})
        found = [each for each in await events(bench, f"device/{device_id}") if each["type"] == "reported"]
        assert len(found) <= limits.device_events_burst + 8 * limits.device_events_per_sec
        assert found[-1]["state"]["power"] == 499

    scene(lamp)
