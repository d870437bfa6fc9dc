"""Presence and attribute events that a device causes have a rate; delivery uses the newest values at once."""

from __future__ import annotations

import asyncio
from typing import Any

from broker.domain.lanes import Presence
from broker.engine.commands import Caller
from broker.seams import Message
from tests.integration.core_support import Bench, on_virtual_time, simulated, until
from tests.integration.engine.test_lost_batch import no_space
from tests.reading import plain
from tests.simulation.loop import SimLoop

BURST = 30


def says(bench: Bench, word: str) -> None:
    bench.core.intake.message(Message(topic="iotee/dev/lamp-1/status", payload=word.encode()))


async def flaps(bench: Bench, times: int, last: Presence) -> None:
    for _ in range(times):
        says(bench, "online" if last is Presence.ONLINE else "offline")
        says(bench, "offline" if last is Presence.ONLINE else "online")
    says(bench, "online" if last is Presence.ONLINE else "offline")
    await until(lambda: not bench.core.intake._queue)


def test_a_flapping_device_records_its_burst_then_one_event_a_second_and_its_last_word() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(online=False)
            stream = f"device/{device.id}"
            await flaps(bench, 100, Presence.ONLINE)
            await bench.writer.barrier()
            assert len(await bench.types(stream)) <= 1 + BURST
            await asyncio.sleep(1.1)
            assert (await bench.types(stream))[-1] == "online"
            for _ in range(20):
                await flaps(bench, 10, Presence.OFFLINE)
                await asyncio.sleep(0.5)
            await asyncio.sleep(1.1)
            found = await bench.types(stream)
            assert found[-1] == "offline"
            assert len(found) <= 1 + BURST + 14
            assert bench.live.presence[device.id] is Presence.OFFLINE

    simulated(world)


def test_an_online_beyond_the_rate_is_recorded_before_the_hand_over_that_it_allows() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(online=False)
            await flaps(bench, 50, Presence.OFFLINE)
            command = await bench.order(ttl_sec=None)
            await asyncio.sleep(0.6)
            await flaps(bench, 50, Presence.OFFLINE)
            says(bench, "online")
            await bench.becomes(command.id, "published")
            await bench.writer.barrier()

            def work(sql: Any) -> list[tuple[str]]:
                rows: list[tuple[str]] = sql.execute(
                    "SELECT type FROM events WHERE device_id = ? "
                    "AND type IN ('online', 'offline', 'published') ORDER BY position",
                    (device.id,),
                ).fetchall()
                return rows

            found = [row[0] for row in await bench.writer.storage.read(plain(work))]
            assert found[found.index("published") - 1] == "online"

    simulated(world)


def test_attributes_beyond_the_rate_are_merged_and_only_their_newest_values_recorded() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(online=False)
            caller = Caller(actor=f"device:{device.id}", project=device.project, device_id=device.id)
            for number in range(100):
                values = {"n": number, f"k{number % 3}": number}
                await bench.core.pull.fetch(caller, "me", "heartbeat", values)
            assert (await bench.types(f"device/{device.id}")).count("changed") <= BURST + 1
            await asyncio.sleep(1.1)
            known = bench.live.device(device.id)
            assert known is not None
            assert known.attributes == {"n": 99, "k0": 99, "k1": 97, "k2": 98}

    simulated(world)


def test_what_waits_is_recorded_before_another_event_of_the_device_and_after_a_failed_commit() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, disk):
            device = await bench.device(online=False)
            await flaps(bench, 40, Presence.ONLINE)
            await bench.writer.barrier()
            assert device.id in bench.core.registry.told
            async with no_space(bench, disk):
                bench.core.registry.told.settle(device.id)
                assert device.id not in bench.core.registry.told
                await until(lambda: not bench.writer.open)
            await asyncio.sleep(5)
            assert (await bench.types(f"device/{device.id}"))[-1] == "online"
            await flaps(bench, 40, Presence.OFFLINE)
            admin = Caller(actor="operator:cli", project=None)
            await bench.core.registry.delete(admin, device.id, force=True)
            assert (await bench.types(f"device/{device.id}"))[-2:] == ["offline", "deleted"]

    simulated(world)
