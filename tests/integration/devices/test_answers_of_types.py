"""Answers whose meaning depends on the device type, in a running core: texts, msgpack, results."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from broker.core import Core
from broker.domain.events import Changed
from broker.seams import Message
from broker.settings import Settings
from broker.type_files import load_types
from broker.world import SqliteStorage, SystemClock
from devices.types import DeviceType, load_type
from tests.integration.core_support import ME, Bench, SeededEntropy, Wire, until

DOCS = Path(__file__).parents[3] / "docs" / "types"
METER = load_type("""
name = "meter"
payload = "msgpack"
[commands.read.result]
type = "object"
required = ["celsius"]
""")


@asynccontextmanager
async def running(place: Path, *, embedded: bool = True) -> AsyncIterator[Bench]:
    """A core with its link up, the documented types, and the type `meter`."""
    types: dict[str, DeviceType] = load_types(str(DOCS)) | {"meter": METER}
    storage = await SqliteStorage.open(place)
    try:
        core = Core(storage, SystemClock(), SeededEntropy(), types, Settings(mqtt_events=False))
        await core.open(embedded=embedded)
        wire = Wire()
        core.attach(wire)
        async with core.running("embedded" if embedded else "external"):
            core.intake.link_up()
            yield Bench(core, wire)
    finally:
        await storage.close()


def says(bench: Bench, suffix: str, payload: bytes, retain: bool = False) -> None:
    bench.core.intake.message(Message(topic=f"iotee/dev/lamp-1/{suffix}", payload=payload, retain=retain))


async def test_the_text_of_one_command_does_not_answer_another(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device(type="tasmota_plug", online=False)
        command = await bench.order(type="turn_off")
        await until(lambda: len(bench.wire.sent) == 1)
        bench.wire.receipt()

        says(bench, "stat/POWER", b"ON")
        says(bench, "stat/POWER", b"OFF")
        await bench.becomes(command.id, "executed")

        assert (bench.wire.sent[0].topic, bench.wire.sent[0].payload) == (
            "iotee/dev/lamp-1/cmnd/POWER",
            b"OFF",
        )
        assert await bench.unmatched() == ["nothing_in_flight"]


async def test_a_retained_text_is_no_answer(tmp_path: Path) -> None:
    async with running(tmp_path, embedded=False) as bench:
        await bench.device(type="tasmota_plug", online=False)
        command = await bench.order(type="turn_off")
        await until(lambda: len(bench.wire.sent) == 1)
        bench.wire.receipt()

        unmatched = list[str]()
        bench.core.intake.on_unmatched = unmatched.append
        says(bench, "stat/POWER", b"OFF", retain=True)
        await until(lambda: unmatched == ["nothing_in_flight"])
        assert bench.state(command.id) == "published"

        says(bench, "stat/POWER", b"OFF")
        await bench.becomes(command.id, "executed")


async def test_an_answer_is_read_with_the_type_the_command_was_created_with(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        device = await bench.device(type="tasmota_plug", online=False)
        command = await bench.order(type="turn_on")
        await until(lambda: len(bench.wire.sent) == 1)
        bench.wire.receipt()

        await bench.core.registry.change(ME, device.id, Changed(device_type="generic"))
        says(bench, "stat/POWER", b"ON")

        await bench.becomes(command.id, "executed")


async def test_a_msgpack_device_gets_msgpack_and_its_answers_are_read(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device(type="meter")
        command = await bench.order(type="read", params={"unit": "celsius"})
        await until(lambda: len(bench.wire.sent) == 1)
        told = msgspec.msgpack.decode(bench.wire.sent[0].payload)

        answer = {"id": told["id"], "status": "executed", "result": {"celsius": 21.5}}
        says(bench, "ack", msgspec.msgpack.encode(answer))
        state = await bench.becomes(command.id, "executed")

        assert (told["id"], told["params"], told["attempt"]) == (command.id, {"unit": "celsius"}, 1)
        assert msgspec.json.decode(msgspec.json.encode(state.result)) == {"celsius": 21.5}


async def test_a_result_that_does_not_fit_its_schema_is_recorded_and_counted(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        unfit = list[str]()
        bench.core.intake.on_unfit = unfit.append
        await bench.device(type="meter")
        for result in ({"celsius": 20}, {"kelvin": 293}, None):
            command = await bench.order(type="read")
            await bench.becomes(command.id, "published")
            bench.answers(command.id, result=result)
            await bench.becomes(command.id, "executed")

        assert unfit == ["meter", "meter"]
