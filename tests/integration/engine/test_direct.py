"""Dispatch and intake when devices connect directly to the broker: slots, presence per topic, and the time to
reconnect after a start."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from broker.engine.deadlines import AFTER_MS, COME_BACK_MS, Drain
from broker.seams import Message, Receipt
from tests.integration.core_support import on_virtual_time, running, simulated, until
from tests.simulation.loop import SimLoop


async def test_a_slot_is_free_when_the_bytes_are_written(tmp_path: Path) -> None:
    for direct in (True, False):
        async with running(tmp_path / str(direct)) as bench:
            bench.wire.direct = direct
            await bench.device()
            await bench.order()
            await until(lambda: len(bench.wire.sent) == 1)
            dispatch = bench.core.dispatch
            assert dispatch.staged + dispatch.outstanding == (0 if direct else 1)
            bench.wire.receipt()
            assert dispatch.outstanding == 0


def test_a_device_without_a_subscription_to_the_command_topic_gets_nothing() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            bench.wire.direct = True
            bench.wire.unheard.add("iotee/dev/lamp-1/rls")
            await bench.device()
            command = await bench.order()
            await asyncio.sleep(60)
            assert bench.wire.sent == []
            assert bench.state(command.id) == "pending"
            bench.wire.unheard.clear()
            bench.core.intake.device_online("lamp-1")
            await until(lambda: len(bench.wire.sent) == 1)

    simulated(world)


def test_a_type_without_presence_is_sent_to_without_a_subscriber() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            bench.wire.direct = True
            bench.wire.unheard.add("iotee/dev/lamp-1/rls")
            await bench.device(type="iotee_device", online=False)
            await bench.order(type="lock")
            await until(lambda: len(bench.wire.sent) == 1, 60)

    simulated(world)


def test_the_wait_for_answers_after_a_start_ends_separately_per_device() -> None:
    drain = Drain()
    assert drain.ends("a") is None
    assert drain.begin(1_000, direct=True) == 1_000 + COME_BACK_MS
    drain.came("a", 5_000)
    drain.came("a", 9_000)
    drain.came("late", 1_000 + COME_BACK_MS)
    assert drain.ends("a") == 5_000 + AFTER_MS
    assert drain.ends("b") == 1_000 + COME_BACK_MS
    assert drain.ends("late") == 1_000 + COME_BACK_MS + AFTER_MS
    assert drain.begin(100_000, direct=False) == 100_000 + AFTER_MS
    assert drain.ends("a") == 100_000 + AFTER_MS
    drain.away()
    assert drain.ends("a") is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message(topic="iotee/dev/lamp-1/ack", payload=b"{"), 0x99),
        (Message(topic="iotee/dev/lamp-1/status", payload=b"online"), 0),
        (Message(topic="iotee/dev/nobody/ack", payload=b"{}"), 0x87),
        (Message(topic="iotee/dev/lamp-2/ack", payload=b"{}", foreign="lamp-1"), 0x87),
        (Message(topic="iotee/dev/lamp-1/ack", payload=b'{"id":"cmd_x","status":"executed"}'), 0),
    ],
    ids=["unreadable", "fine", "unknown device", "not its own topic", "unknown command"],
)
async def test_a_puback_has_the_reason_of_a_refused_message(
    tmp_path: Path, message: Message, reason: int
) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        await bench.device("lamp-2")
        bench.core.intake.message(message)
        await until(lambda: len(bench.wire.said) == 1)
        assert bench.wire.said == [reason]
        if message.foreign is not None:
            assert await bench.unmatched() == ["wrong_device"]


def test_after_a_restart_a_device_has_time_to_reconnect_before_its_command_times_out() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            bench.wire.direct = True
            device = await bench.device()
            command = await bench.order(ttl_sec=12)
            await until(lambda: len(bench.wire.sent) == 1)
            bench.wire.receipt(Receipt(written=True, reason=None))
            # The state after a start: the device is offline, and it may have answered an earlier message.
            bench.core.intake.device_offline("lamp-1")
            bench.core.intake.link_up()
            await asyncio.sleep(20)
            assert bench.state(command.id) == "published"
            bench.core.intake.device_online("lamp-1")
            bench.answers(command.id)
            await bench.becomes(command.id, "executed")
            assert bench.core.dispatch.drained(bench.writer.now() + AFTER_MS, device.id)
            assert not bench.core.dispatch.drained(bench.writer.now() + AFTER_MS, "another")

    simulated(world)
