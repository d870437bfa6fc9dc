"""Attempts that meet no subscriber, and attempts that end because the device goes offline."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from broker.domain.events import Published
from broker.domain.lanes import Presence
from broker.log import sqlite as log
from broker.seams import Message, Receipt
from devices.types import load_type
from tests.integration.core_support import Bench, on_virtual_time, simulated, until
from tests.simulation.loop import SimLoop

NOBODY = Receipt(written=True, reason=0x10)
DOOR = load_type(
    'name = "door"\npresence = "required"\npayload = "json"\nmax_attempts = 3\n[commands.open]\n'
)
GATE = load_type('name = "gate"\npayload = "json"\n[commands.open]\n[commands.reboot]\nrepeatable = false')
BELL = load_type('name = "bell"\npresence = "none"\npayload = "json"\nmax_attempts = 3\n[commands.open]\n')
TYPES = {"door": DOOR, "bell": BELL, "gate": GATE}


def says(bench: Bench, word: str, **fields: Any) -> None:
    bench.core.intake.message(Message(topic="iotee/dev/lamp-1/status", payload=word.encode(), **fields))


async def counts(bench: Bench, command_id: str) -> list[bool]:
    """For each `published` of the command: does it count?"""
    rows = await bench.writer.storage.read(lambda sql: log.stream(sql, command_id))
    events = [log.recorded(row).event for row in rows]
    return [event.counts for event in events if isinstance(event, Published)]


def nobody_listens(bench: Bench) -> list[float]:
    """The MQTT server answers every publish with 0x10; returns the times of the publishes, s."""
    times: list[float] = []
    loop = asyncio.get_running_loop()

    def refuse(_: Any) -> None:
        times.append(loop.time())
        loop.call_later(0.005, bench.wire.receipt, NOBODY)

    bench.wire.on_publish = refuse
    return times


def test_a_device_that_subscribes_after_its_online_gets_its_command_within_two_seconds() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            device = await bench.device(type="door", online=False)
            first, second = await bench.order(ttl_sec=None), await bench.order(ttl_sec=None)
            times = nobody_listens(bench)
            says(bench, "online")
            await until(lambda: len(times) == 1)
            await until(lambda: bench.live.presence.get(device.id) is Presence.UNKNOWN)
            bench.wire.on_publish = lambda _: None  # the device subscribes, 50 ms after its `online`
            await until(lambda: len(bench.wire.sent) == 2)
            assert loop.time() - times[0] < 2
            bench.wire.receipt()
            bench.answers(first.id)
            await until(lambda: len(bench.wire.sent) == 3)
            bench.answers(second.id)
            await bench.becomes(second.id, "executed")
            assert await counts(bench, first.id) == [True, False]
            assert "offline" not in await bench.types(f"device/{device.id}")

    simulated(world)


def test_the_pause_after_no_subscriber_doubles_from_one_second_and_never_ends_the_command() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            await bench.device(type="door")
            times = nobody_listens(bench)
            command = await bench.order(ttl_sec=None)
            await asyncio.sleep(3_000)
            pauses = [after - before for before, after in pairwise(times)]
            assert [round(pause) for pause in pauses[:9]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
            assert all(299 < pause < 302 for pause in pauses[9:])
            assert bench.state(command.id) == "published"
            assert await counts(bench, command.id) == [True] + [False] * (len(times) - 1)

    simulated(world)


def test_live_messages_end_only_one_pause() -> None:
    """A device that sends a message each second and never subscribes does not get an attempt for each."""

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            await bench.device(type="door")
            times = nobody_listens(bench)
            command = await bench.order(ttl_sec=None)
            for second in range(60):
                await asyncio.sleep(1)
                says(bench, "online")
                bench.answers("cmd_00000000000000000000000000", at=f"{second}")
            assert len(times) <= 8
            assert sum(await counts(bench, command.id)) == 1
            assert bench.state(command.id) == "published"

    simulated(world)


def test_no_subscriber_says_nothing_of_a_device_that_has_gone_offline() -> None:
    """Its attempt stays open, because it may not be repeated. The next command must wait for the device."""

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            device = await bench.device(type="gate")
            await bench.order(type="reboot", ttl_sec=None)
            await until(lambda: len(bench.wire.sent) == 1)
            says(bench, "offline")
            await until(lambda: bench.live.presence.get(device.id) is Presence.OFFLINE)
            bench.wire.receipt(NOBODY)
            held = await bench.order(ttl_sec=None)
            await asyncio.sleep(60)
            assert bench.state(held.id) == "pending"
            says(bench, "online")
            await bench.becomes(held.id, "published")

    simulated(world)


def test_a_live_message_after_a_long_pause_makes_the_attempt_due_at_once() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            await bench.device(type="door")
            times = nobody_listens(bench)
            await bench.order(ttl_sec=None)
            await asyncio.sleep(400)
            tried = len(times)
            says(bench, "online")
            await until(lambda: len(times) == tried + 1, within_sec=1)
            await asyncio.sleep(1.5)
            assert len(times) == tried + 2, "the pauses begin again at one second"

    simulated(world)


@pytest.mark.parametrize("embedded", [False, True])
def test_without_presence_an_attempt_that_meets_no_subscriber_counts(embedded: bool) -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=embedded) as (bench, _):
            bench.wire.direct = embedded
            await bench.device(type="bell", online=False)
            times = nobody_listens(bench)
            command, following = await bench.order(ttl_sec=None), await bench.order(ttl_sec=None)
            found = await bench.becomes(command.id, "timed_out", 120)
            assert found.reason == "no_answer"
            assert await counts(bench, command.id) == [True] * 3
            await bench.becomes(following.id, "timed_out", 120)
            assert len(times) == 6

    simulated(world)


def test_no_subscriber_on_our_own_listener_leaves_the_presence_alone() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES) as (bench, _):
            bench.wire.direct = True
            device = await bench.device(type="door")
            times = nobody_listens(bench)
            await bench.order(ttl_sec=None)
            await until(lambda: len(times) == 1)
            bench.wire.unheard.add("iotee/dev/lamp-1/rls")
            await asyncio.sleep(60)
            assert bench.live.presence[device.id] is Presence.ONLINE
            assert len(times) == 1
            bench.wire.unheard.clear()
            bench.core.intake.device_online("lamp-1")
            await until(lambda: len(times) == 2)

    simulated(world)


async def crash_on_each(bench: Bench, away_sec: float = 1.0) -> None:
    """The device drops its connection on every command and is back after `away_sec`."""
    while True:
        await until(lambda: bool(bench.wire.due), within_sec=1_000)
        bench.wire.receipt()
        await asyncio.sleep(0.1)
        says(bench, "offline")
        await asyncio.sleep(away_sec)
        says(bench, "online")


def test_a_device_that_drops_its_connection_on_a_command_ends_it() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            await bench.device(type="door")
            crashing = loop.create_task(crash_on_each(bench))
            command = await bench.order(ttl_sec=None)
            found = await bench.becomes(command.id, "timed_out", 200)
            crashing.cancel()
            assert found.reason == "no_answer"
            assert await counts(bench, command.id) == [True] * 6
            at = [row.recorded_at for row in await bench.rows() if row.type == "published"]
            pauses = [(after - before) / 1_000 for before, after in pairwise(at)]
            assert [round(pause) for pause in pauses] == [1, 2, 4, 8, 16]

    simulated(world)


def test_the_bound_on_dropped_attempts_survives_a_restart_of_the_broker() -> None:
    async def world(loop: SimLoop) -> None:
        disk, command_id = None, ""
        for life in range(12):
            async with on_virtual_time(loop, types=TYPES, embedded=False, disk=disk) as (bench, disk):
                if not life:
                    await bench.device(type="door")
                    command_id = (await bench.order(ttl_sec=None)).id
                says(bench, "online")
                crashing = loop.create_task(crash_on_each(bench))
                await asyncio.sleep(45)
                crashing.cancel()
                tried = await counts(bench, command_id)
                if bench.state(command_id) == "timed_out":
                    break
        assert bench.state(command_id) == "timed_out"
        assert tried == [True] * 6

    simulated(world)


def test_an_exhausted_command_still_takes_the_answer_that_waited_during_a_restart() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES) as (bench, disk):
            await bench.device(type="door")
            command = await bench.order(ttl_sec=None)
            for tried in range(1, 7):
                await until(lambda tried=tried: len(bench.wire.sent) == tried, 100)  # type: ignore[misc]
                if tried < 6:
                    bench.core.intake.device_offline("lamp-1")
                    bench.core.intake.device_online("lamp-1")
        async with on_virtual_time(loop, types=TYPES, disk=disk) as (bench, disk):
            assert bench.state(command.id) == "published"
            bench.core.intake.device_online("lamp-1")
            bench.answers(command.id)
            await bench.becomes(command.id, "executed")
            assert bench.wire.sent == []

    simulated(world)


def test_a_device_that_is_away_for_long_gets_the_next_attempt_when_it_is_back() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            await bench.device(type="door")
            await bench.order(ttl_sec=None)
            await until(lambda: len(bench.wire.sent) == 1)
            says(bench, "offline")
            await asyncio.sleep(600)
            assert len(bench.wire.sent) == 1
            says(bench, "online")
            await until(lambda: len(bench.wire.sent) == 2, within_sec=1)

    simulated(world)
