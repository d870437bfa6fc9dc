"""The simulated disk under real SQLite: what survives a kill and a power cut, and how it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from broker.seams import Broken, Conflict, Full, Sqlite, Storage
from tests.reading import plain, tamper
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import Node, SimLoop, run

SEEDS = range(60)


def insert(number: int) -> Callable[[Sqlite], int]:
    def work(sql: Sqlite) -> int:
        sql.execute("INSERT INTO facts VALUES (?, ?)", (number, number.to_bytes(2) * 700))
        return number

    return work


def numbers(sql: Sqlite) -> list[int]:
    assert sql.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return [row[0] for row in sql.execute("SELECT number FROM facts ORDER BY number").fetchall()]


async def opened(loop: SimLoop, disk: SimDisk, **options: Any) -> Storage:
    storage = SimStorage(loop, disk, checkpoint_pages=8, **options)
    table = "CREATE TABLE IF NOT EXISTS facts (number INTEGER PRIMARY KEY, bytes BLOB) STRICT"
    await storage.write(lambda sql: sql.execute(table).fetchall())
    return storage


async def write_until_it_stops(
    loop: SimLoop, *, power: bool, synchronous: str = "FULL"
) -> tuple[list[int], list[int]]:
    """Two lists: the numbers whose write was answered before the machine stopped, and the numbers on the disk
    afterwards."""
    disk = SimDisk(loop)
    answered: list[int] = []
    node, stopped = Node("writer"), asyncio.Event()

    async def writer() -> None:
        storage = await opened(loop, disk, synchronous=synchronous)
        disk.stop_after(loop.rng("when").randrange(200), stop)
        for number in range(1000):
            await tamper(storage, insert(number))
            answered.append(number)

    def stop() -> None:
        loop.kill(node)
        if power:
            disk.lose_power()
        stopped.set()

    loop.spawn(node, writer())
    await stopped.wait()
    return answered, await (await opened(loop, disk)).read(plain(numbers))


def test_a_power_cut_at_any_write_loses_no_answered_write() -> None:
    for seed in SEEDS:
        answered, found = run(lambda loop: write_until_it_stops(loop, power=True), seed)

        assert found[: len(answered)] == answered, f"seed {seed}"
        assert len(found) <= len(answered) + 1, f"seed {seed}"


def test_without_full_synchronisation_a_power_cut_loses_answered_writes() -> None:
    lost = 0
    for seed in SEEDS:
        answered, found = run(lambda loop: write_until_it_stops(loop, power=True, synchronous="NORMAL"), seed)
        assert found == list(range(len(found))), f"seed {seed}"
        lost += len(found) < len(answered)

    assert lost > len(SEEDS) // 2


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
def test_a_kill_at_any_write_loses_no_answered_write(synchronous: str) -> None:
    for seed in SEEDS:
        answered, found = run(
            lambda loop: write_until_it_stops(loop, power=False, synchronous=synchronous), seed
        )
        assert found[: len(answered)] == answered, f"seed {seed}"


def test_some_power_cuts_tear_the_log_and_sqlite_recovers_from_it() -> None:
    async def main(loop: SimLoop) -> tuple[int, int]:
        disk = SimDisk(loop)
        await tamper(await opened(loop, disk, synchronous="NORMAL"), insert(1))
        (wal,) = [file for path, file in disk.files.items() if path.endswith("-wal")]
        dirty, before = dict(wal.undo), bytes(wal.data)
        disk.lose_power()
        after = bytes(wal.data).ljust(len(before), b"\0")
        changed = sum(
            before[sector * 512 : (sector + 1) * 512] != after[sector * 512 : (sector + 1) * 512]
            for sector in dirty
        )
        await (await opened(loop, disk)).read(plain(numbers))
        return changed, len(dirty)

    outcomes = [run(main, seed) for seed in SEEDS]

    assert any(0 < changed < dirty - 1 for changed, dirty in outcomes)


def test_a_failed_transaction_leaves_nothing_and_the_next_one_works() -> None:
    async def main(loop: SimLoop) -> list[int]:
        storage = await opened(loop, SimDisk(loop))

        def work(sql: Sqlite) -> None:
            insert(1)(sql)
            raise LookupError("no")

        with pytest.raises(LookupError):
            await tamper(storage, work)
        await tamper(storage, insert(2))
        await storage.read(plain(insert(3)))  # writes of a read are rolled back
        return await storage.read(plain(numbers))

    assert run(main) == [2]


def test_a_second_equal_key_is_a_conflict() -> None:
    async def main(loop: SimLoop) -> list[int]:
        storage = await opened(loop, SimDisk(loop))
        await tamper(storage, insert(1))
        with pytest.raises(Conflict):
            await tamper(storage, insert(1))
        return await storage.read(plain(numbers))

    assert run(main) == [1]


def test_a_full_disk_is_reported_reads_work_and_writes_work_again_with_space() -> None:
    async def main(loop: SimLoop) -> list[int]:
        disk = SimDisk(loop)
        storage = await opened(loop, disk)
        disk.capacity = 0
        with pytest.raises(Full):
            await tamper(storage, insert(1))
        assert await storage.read(plain(numbers)) == []
        disk.capacity = None
        await tamper(storage, insert(2))
        return await storage.read(plain(numbers))

    assert run(main) == [2]


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_an_io_error_is_broken(operation: Any) -> None:
    async def main(loop: SimLoop) -> None:
        disk = SimDisk(loop)
        storage = await opened(loop, disk)
        disk.failing = {operation}
        with pytest.raises(Broken):
            await tamper(storage, insert(1))

    run(main)


def test_cancelling_a_waiter_does_not_cancel_the_transaction() -> None:
    async def main(loop: SimLoop) -> list[int]:
        storage = await opened(loop, SimDisk(loop))
        waiting = asyncio.ensure_future(tamper(storage, insert(1)))
        loop.call_soon(waiting.cancel)
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await tamper(storage, insert(2))
        return await storage.read(plain(numbers))

    assert run(main) == [1, 2]


def test_a_kill_lands_before_or_after_a_commit_but_never_within() -> None:
    async def main(loop: SimLoop) -> tuple[int, int]:
        disk = SimDisk(loop)
        node = Node("writer")
        answered: list[int] = []
        commits: list[object] = []

        async def writer() -> None:
            storage = await opened(loop, disk, on_commit=commits.append)
            for number in range(100):
                await tamper(storage, insert(number))
                answered.append(number)

        loop.spawn(node, writer())
        await asyncio.sleep(loop.rng("when").uniform(0.05, 0.1))
        loop.kill(node)
        disk.lose_power()
        found = await (await opened(loop, disk)).read(plain(numbers))
        assert len(found) == len(commits) - 1
        return len(answered), len(found)

    outcomes = [run(main, seed) for seed in SEEDS]

    assert {found - answered for answered, found in outcomes} == {0, 1}


def test_writes_commit_in_request_order() -> None:
    async def main(loop: SimLoop) -> list[int]:
        storage = await opened(loop, SimDisk(loop))
        order: list[int] = []

        def work(number: int) -> Callable[[Sqlite], None]:
            return lambda sql: order.append(number)

        async def ask(number: int) -> None:
            asked.append(number)
            await tamper(storage, work(number))

        asked: list[int] = []
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(ask(number))
        await storage.close()
        assert order == asked
        return asked

    assert len({tuple(run(main, seed)) for seed in range(10)}) > 1


def test_a_write_in_which_the_machine_stops_is_reported_once_from_its_beginning() -> None:
    async def main(loop: SimLoop) -> list[tuple[int, bool]]:
        disk, node, stopped = SimDisk(loop), Node("writer"), asyncio.Event()
        writes: list[tuple[int, bool]] = []

        def stop() -> None:
            loop.kill(node)
            stopped.set()

        async def writer() -> None:
            storage = await opened(loop, disk, on_write=lambda began, ok: writes.append((began, ok)))
            await asyncio.sleep(5 - loop.time())
            disk.slow_sec = 3.0
            disk.stop_after(0, stop)
            await tamper(storage, insert(1))

        loop.spawn(node, writer())
        await stopped.wait()
        return writes[1:]  # the first write makes the table

    assert run(main) == [(5_000, False)]
