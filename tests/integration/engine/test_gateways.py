"""Gateways in a running core, on virtual time: who belongs to whom, presence, moves, what the log keeps."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.core import TICK_SEC
from broker.domain.errors import Refusal
from broker.domain.events import Changed
from broker.domain.lanes import Presence
from broker.engine.commands import Caller
from broker.engine.intake import BATCH_BYTES, CHILD_BYTES
from broker.engine.registry import NewDevice
from broker.limits import Limits
from broker.operations import transfer
from broker.operations.redecide import redecide
from broker.seams import Message, Unknown
from projections import past
from tests.integration.core_support import ME, PROJECT, Bench, running
from tests.integration.engine.test_bought_devices import says, scene, sent
from tests.reading import plain

BRIDGE, OTHER = "zigbee2mqtt", "gw-2"


async def register(bench: Bench, hardware_id: str, type: str, **more: Any) -> str:
    new = NewDevice(hardware_id=hardware_id, type=type, project=PROJECT, **more)
    return (await bench.core.registry.register(ME, new)).device.id


async def family(bench: Bench) -> str:
    """A bridge with a lamp, which has been heard; a second gateway. Returns the lamp's id."""
    await register(bench, BRIDGE, "zigbee2mqtt_bridge")
    await register(bench, OTHER, "gateway")
    lamp = await register(bench, "lamp", "zigbee2mqtt", gateway=BRIDGE)
    says(bench, f"{BRIDGE}/bridge/state", '{"state":"online"}')
    says(bench, "zigbee2mqtt/lamp", '{"state":"OFF"}')
    await asyncio.sleep(0.1)
    assert bench.live.presence[lamp] is Presence.ONLINE
    return lamp


async def told(bench: Bench, device_id: str) -> list[tuple[str, dict[str, Any]]]:
    await bench.writer.barrier()
    rows = [row for row in await bench.rows() if row.stream == f"device/{device_id}"]
    return [(row.type, msgspec.json.decode(row.data or b"{}")) for row in rows]


async def repeated(bench: Bench, command_id: str, tmp_path: Path) -> list[str]:
    """What `redecide` finds in the export of a command."""
    await bench.writer.barrier()
    file = tmp_path / "bundle.jsonl"
    await bench.writer.storage.read(plain(lambda sql: transfer.export_command(sql, file, command_id)))
    command, events = transfer.read_command(file)
    first = min(each.position for each in events if each.stream == command)
    return [step.fault for step in redecide(events, first) if step.fault is not None]


def test_devices_go_offline_with_their_gateway_and_are_unknown_when_it_is_back(tmp_path: Path) -> None:
    async def going(bench: Bench) -> None:
        lamp = await family(bench)

        says(bench, f"{BRIDGE}/bridge/state", '{"state":"offline"}')
        await asyncio.sleep(0.1)
        assert bench.live.presence[lamp] is Presence.OFFLINE
        assert [type for type, _ in await told(bench, lamp)][-1] == "offline"

        says(bench, "zigbee2mqtt/lamp/availability", '{"state":"online"}', retain=True)
        command = await bench.order("lamp", "turn_on")
        await asyncio.sleep(1)
        assert bench.live.presence[lamp] is Presence.OFFLINE  # it is old news, and its gateway is away
        assert bench.state(command.id) == "pending"
        assert f"its gateway {BRIDGE} is offline" in (await bench.core.dispatch.explain(command)).summary

        says(bench, f"{BRIDGE}/bridge/state", '{"state":"online"}')
        assert await sent(bench, 1) == ("zigbee2mqtt/lamp/set", {"state": "ON"})
        assert bench.live.presence[lamp] is Presence.UNKNOWN
        says(bench, "zigbee2mqtt/lamp", '{"state":"ON"}')
        await asyncio.sleep(0.1)
        assert bench.state(command.id) == "executed"
        assert await repeated(bench, command.id, tmp_path) == []

    scene(going)


def test_a_device_whose_gateway_stays_and_that_says_offline_itself_is_offline() -> None:
    async def leaving(bench: Bench) -> None:
        lamp = await family(bench)
        says(bench, "zigbee2mqtt/lamp/availability", '{"state":"offline"}')
        says(bench, f"{BRIDGE}/bridge/state", '{"state":"online"}')
        await asyncio.sleep(0.1)
        assert bench.live.presence[lamp] is Presence.OFFLINE

    scene(leaving)


def test_at_our_own_listener_a_device_of_a_gateway_may_be_away_while_the_gateway_is_there() -> None:
    async def leaving(bench: Bench) -> None:
        await register(bench, BRIDGE, "zigbee2mqtt_bridge")
        lamp = await register(bench, "lamp", "zigbee2mqtt", gateway=BRIDGE)
        bench.core.intake.device_online(BRIDGE)
        bench.core.intake.device_online("lamp")
        says(bench, "zigbee2mqtt/lamp/availability", '{"state":"offline"}')
        await asyncio.sleep(0.1)
        assert bench.live.presence[lamp] is Presence.OFFLINE
        says(bench, "zigbee2mqtt/lamp/availability", '{"state":"online"}')
        await asyncio.sleep(0.1)
        assert bench.live.presence[lamp] is Presence.ONLINE

    scene(leaving, embedded=True)


def test_a_move_is_an_event_and_its_presence_follows_the_new_gateway() -> None:
    async def moving(bench: Bench) -> None:
        lamp = await family(bench)
        says(bench, f"iotee/dev/{OTHER}/status", "offline")
        await asyncio.sleep(0.1)
        before = bench.core.feed.head

        change = Changed(name="Lamp", gateway=OTHER)
        moved = await bench.core.registry.change(ME, "lamp", change)

        assert moved.gateway == OTHER
        changed = [(type, data) for type, data in await told(bench, lamp) if type == "changed"]
        assert changed == [("changed", {"name": "Lamp"}), ("changed", {"gateway": OTHER})]
        assert bench.live.presence[lamp] is Presence.OFFLINE
        says(bench, f"iotee/dev/{OTHER}/status", "online")
        await asyncio.sleep(0.1)
        assert bench.live.presence[lamp] is Presence.UNKNOWN
        says(bench, f"{BRIDGE}/bridge/state", '{"state":"offline"}')  # of no concern to it any more
        await asyncio.sleep(0.1)
        assert bench.live.presence[lamp] is Presence.UNKNOWN
        then = await bench.core.storage.read(lambda sql: past.device(sql, lamp, before))
        assert then is not None
        assert then.state.gateway == BRIDGE
        await bench.core.registry.change(ME, "lamp", Changed(gateway=None))
        assert (await told(bench, lamp))[-1] == ("changed", {"gateway": None})
        assert bench.core.registry.gateways.children(OTHER) == {}

    scene(moving)


def test_the_log_alone_says_who_belongs_to_whom() -> None:
    async def again(bench: Bench) -> None:
        lamp = await family(bench)
        gateways = bench.core.registry.gateways
        gateways.load([])

        await bench.core.registry.load()

        assert gateways.children(BRIDGE) == {"lamp": lamp}

    scene(again)


@pytest.mark.parametrize(
    ("type", "gateway", "kind"),
    [
        ("zigbee2mqtt", "nobody", "invalid_request"),
        ("zigbee2mqtt", "lamp", "invalid_request"),
        ("gateway", BRIDGE, "invalid_request"),
        ("generic", "full", "conflict"),
    ],
)
def test_a_gateway_that_cannot_be_one_is_refused(type: str, gateway: str, kind: str) -> None:
    async def refused(bench: Bench) -> None:
        await family(bench)
        await register(bench, "full", "gateway")
        gateways = bench.core.registry.gateways
        gateways._most = 2
        for name in ("a", "b"):
            await register(bench, name, "generic", gateway="full")

        with pytest.raises(Refusal) as wrong:
            await register(bench, "new", type, gateway=gateway)

        assert wrong.value.kind == kind
        assert bench.live.device("new") is None

    scene(refused)


def test_a_gateway_with_devices_stays_one() -> None:
    async def refused(bench: Bench) -> None:
        await family(bench)
        registry = bench.core.registry
        with pytest.raises(Refusal, match="gateway of 1 devices"):
            await registry.delete(ME, BRIDGE, force=True)
        with pytest.raises(Refusal, match="gateway of 1 devices"):
            await registry.change(ME, BRIDGE, Changed(device_type="generic"))
        with pytest.raises(Refusal):
            await registry.change(ME, "lamp", Changed(device_type="gateway"))
        await registry.delete(ME, "lamp", force=False)
        assert (await registry.delete(ME, BRIDGE, force=False)).deleted_at is not None

    scene(refused)


def test_the_grant_of_a_command_names_the_device_and_not_its_gateway() -> None:
    async def granted(bench: Bench) -> None:
        await register(bench, OTHER, "gateway")
        await register(bench, "lock-1", "generic", gateway=OTHER)
        says(bench, "iotee/dev/lock-1/status", "online")
        await bench.order("lock-1", "unlock")

        topic, message = await sent(bench, 1)

        assert topic == "iotee/dev/lock-1/rls"
        payload = message["grant"].split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=="))
        assert claims["aud"] == "lock-1"

    scene(granted)


def test_a_device_that_leaves_its_gateway_is_unknown_and_redecide_knows_it(tmp_path: Path) -> None:
    async def leaving(bench: Bench) -> None:
        await register(bench, OTHER, "gateway")
        lock = await register(bench, "lock-1", "generic", gateway=OTHER)
        says(bench, "iotee/dev/lock-1/status", "online")
        await asyncio.sleep(0.1)

        await bench.core.registry.change(ME, "lock-1", Changed(gateway=None))

        assert bench.live.presence[lock] is Presence.UNKNOWN
        command = await bench.order("lock-1", "unlock")
        await sent(bench, 1)
        assert await repeated(bench, command.id, tmp_path) == []

    scene(leaving)


def test_a_presence_that_waits_for_its_event_is_overtaken_by_the_end_of_the_gateway() -> None:
    async def leaving(bench: Bench) -> None:
        await register(bench, OTHER, "gateway")
        lock = await register(bench, "lock-1", "generic", gateway=OTHER)
        for word in ["online", "offline"] * 40 + ["online"]:
            says(bench, "iotee/dev/lock-1/status", word)
        await asyncio.sleep(0.02)
        assert lock in bench.core.registry.told

        says(bench, f"iotee/dev/{OTHER}/status", "online")
        says(bench, f"iotee/dev/{OTHER}/status", "offline")
        await asyncio.sleep(5)

        assert bench.live.presence[lock] is Presence.OFFLINE
        assert (await told(bench, lock))[-1][0] == "offline"

    scene(leaving)


NAMED = """
name = "named_bridge"
payload = "json"
presence = "required"
gateway = true
open = true
command_topic = "bridges/{name}/do"
answer_topics = ["bridges/{name}/done"]
presence_topic = "bridges/{name}/state"
online = "@ == 'online'"
offline = "@ == 'offline'"

[[answers]]
when = "ok"
id = "id"
status = "executed"
"""


def test_the_devices_of_a_gateway_are_read_from_the_log_also_if_its_topics_have_its_name() -> None:
    async def leaving(bench: Bench) -> None:
        await register(bench, OTHER, "named_bridge", name="attic")
        lock = await register(bench, "lock-1", "generic", gateway=OTHER)
        says(bench, "bridges/attic/state", "online")
        says(bench, "iotee/dev/lock-1/status", "online")
        await asyncio.sleep(0.1)
        bench.live.devices.clear()
        bench.live.names.clear()

        says(bench, "bridges/attic/state", "offline")
        await asyncio.sleep(0.1)

        assert bench.live.presence[lock] is Presence.OFFLINE
        assert (await told(bench, lock))[-1][0] == "offline"

    scene(leaving, type=NAMED)


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
def test_commands_are_sent_once_the_gateway_is_back_however_its_return_is_learnt(
    retained: bool, restarted: bool
) -> None:
    async def returning(bench: Bench) -> None:
        await register(bench, OTHER, "gateway")
        lock = await register(bench, "lock-1", "generic", gateway=OTHER)
        says(bench, f"iotee/dev/{OTHER}/status", "online")
        says(bench, "iotee/dev/lock-1/status", "online")
        says(bench, f"iotee/dev/{OTHER}/status", "offline")
        await asyncio.sleep(0.1)
        await bench.order("lock-1", "unlock")
        if restarted:
            bench.live.presence.clear()  # a new process knows only what was online

        says(bench, f"iotee/dev/{OTHER}/status", "online", retain=retained)

        await sent(bench, 1)
        assert bench.live.presence[lock] is Presence.UNKNOWN

    scene(returning)


async def test_an_imported_log_has_the_same_gateways_and_topics(tmp_path: Path) -> None:
    file, other = tmp_path / "log.jsonl", tmp_path / "other"
    async with running(tmp_path / "data", embedded=False) as bench:
        for node in ("garage", "shed"):
            await register(bench, node, "esphome_node")
        for name in ("door", "light", "gone"):
            await register(bench, name, "esphome_node_switch", gateway="garage")
        await register(bench, "moved", "esphome_node_switch", name="door", gateway="shed")
        await bench.core.registry.change(ME, "light", Changed(gateway="shed"))
        await bench.core.registry.delete(ME, "gone", force=False)
        before = {node: dict(bench.core.registry.gateways.children(node)) for node in ("garage", "shed")}
        export = plain(lambda sql: transfer.export(sql, file, transfer.Only(), lambda _: None))
        await bench.writer.storage.read(export)

    transfer.bring_in(file, other, lambda done, total: None)

    async with running(other, embedded=False) as bench:
        gateways, addresses = bench.core.registry.gateways, bench.core.commands.addresses
        assert {node: gateways.children(node) for node in ("garage", "shed")} == before
        assert [len(each) for each in before.values()] == [1, 2]
        owners = {  # the node itself might be an `esphome_switch` with such a topic
            "garage/switch/door/state": [before["garage"]["door"], "garage"],
            "shed/switch/door/state": [before["shed"]["moved"], "shed"],
            "shed/switch/light/state": [before["shed"]["light"], "shed"],
            "garage/switch/light/state": ["garage"],
        }
        assert {topic: addresses.owners(topic) for topic in owners} == owners
        command = await bench.order("light", "turn_on")
        assert command.topic == "shed/switch/light/command"
        with pytest.raises(Refusal, match="is the gateway of 2 devices"):
            await bench.core.registry.delete(ME, "shed", force=True)


class ToldLater:
    """What the MQTT server is told. After `begin`, once an event is durable, no device can be read."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench, self.monkeypatch, self.read = bench, monkeypatch, bench.core.storage.read
        self.seen = list[str]()
        registry = bench.core.registry
        registry.gateways.regrouped = lambda device: self.seen.append(device.hardware_id)
        registry.entitled = lambda device: self.seen.append(
            f"{device.hardware_id}{'' if device.deleted_at is None else ' deleted'}"
        )
        registry.issued = lambda device, token: self.seen.append(f"{device.hardware_id} {token}")

    async def fail(self, work: Any) -> Any:
        raise Unknown("the server does not answer")

    def begin(self) -> None:
        self.bench.writer.listeners.append(self.recorded)

    def recorded(self, *_: Any) -> None:
        for name in ("lamp", BRIDGE, OTHER):
            self.bench.live.names.forget(name)
        self.monkeypatch.setattr(self.bench.core.storage, "read", self.fail)

    def can_read(self) -> None:
        self.monkeypatch.setattr(self.bench.core.storage, "read", self.read)

    async def end(self) -> None:
        assert self.seen == []
        self.can_read()
        await asyncio.sleep(2 * TICK_SEC)


def test_a_move_whose_devices_cannot_be_read_is_told_to_the_mqtt_server_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def moving(bench: Bench) -> None:
        await family(bench)
        server = ToldLater(bench, monkeypatch)
        server.begin()
        await bench.core.registry.change(ME, "lamp", Changed(gateway=OTHER))
        await server.end()
        assert server.seen == ["lamp", BRIDGE, OTHER]

    scene(moving)


def test_a_token_that_could_not_be_told_before_its_device_was_deleted_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def deleting(bench: Bench) -> None:
        await register(bench, "lamp", "generic")
        server = ToldLater(bench, monkeypatch)
        server.begin()
        await bench.core.registry.rotate_token(ME, "lamp")
        server.can_read()

        await bench.core.registry.delete(ME, "lamp", force=False)

        await server.end()
        assert set(server.seen) == {"lamp deleted"}

    scene(deleting)


def test_of_tokens_that_could_not_be_told_only_the_newest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def renewing(bench: Bench) -> None:
        server = ToldLater(bench, monkeypatch)
        server.begin()
        await register(bench, "lamp", "generic")
        server.can_read()

        newest = await bench.core.registry.rotate_token(ME, "lamp")

        await server.end()
        assert [each for each in server.seen if each != "lamp"] == [f"lamp {newest.token}"]

    scene(renewing)


@pytest.mark.parametrize("known", ["secret-node", "dev_node"])
def test_nobody_learns_which_topics_the_devices_of_another_projects_gateway_have(known: str) -> None:
    async def guessing(bench: Bench) -> None:
        registry, other = bench.core.registry, Caller(actor="key:key_2", project="other")
        node = NewDevice(id="dev_node", hardware_id="secret-node", type="esphome_node", project="other")
        await registry.register(other, node)
        relay = NewDevice(hardware_id="theirs", type="esphome_switch", name="relay", project=PROJECT)
        theirs = msgspec.structs.replace(relay, project="other", gateway="secret-node")
        await registry.register(other, theirs)
        mine = msgspec.structs.replace(relay, hardware_id="mine")
        refused = "gateway: must be a gateway of the same project"

        with pytest.raises(Refusal, match=refused):
            await registry.register(ME, msgspec.structs.replace(mine, gateway=known))
        await registry.register(ME, mine)
        with pytest.raises(Refusal, match=refused):
            await registry.change(ME, "mine", Changed(gateway=known))

    scene(guessing)


def test_a_gateways_own_messages_count_with_the_devices_that_they_may_change() -> None:
    async def weighing(bench: Bench) -> None:
        await family(bench)
        intake = bench.core.intake

        own, lamps = (
            intake._cost(Message(topic=topic, payload=b"{}"))
            for topic in (f"{BRIDGE}/bridge/state", "zigbee2mqtt/lamp")
        )

        assert (own, lamps) == (2 + CHILD_BYTES, 2)
        assert (
            BATCH_BYTES // (Limits().devices_per_gateway * CHILD_BYTES) == 1
        )  # message of the largest gateway in one batch

    scene(weighing)
