"""Fan-outs (one command to many devices) in the core: state after a crash, and fairness to other requests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from broker.domain.errors import Refusal, Unavailable
from broker.engine import fanout
from broker.engine.commands import Order
from broker.engine.fanout import Outcome
from broker.log import sqlite as log
from broker.seams import Batch, Full, Placed, Storage
from tests.integration.core_support import ME, Bench, Held, running, simulated, until
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import Node, SimClock, SimLoop


class FullOnce(Held):
    """A storage that reports a full disk for one commit."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.commits_left = 1 << 30

    def after_a_commit(self, *_: object) -> None:
        self.commits_left = min(self.commits_left, 1)

    async def append(self, batch: Batch) -> Placed:
        self.commits_left -= 1
        if self.commits_left == 0:
            raise Full("no space")
        return await super().append(batch)


PART = 10
LAMPS = [f"lamp-{number}" for number in range(3 * PART)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "PART", PART)


async def send(bench: Bench, names: list[str], key: str = "k", type: str = "open") -> dict[str, Outcome]:
    def fingerprint(device_id: str) -> bytes:
        return hashlib.sha256(f"{type} {device_id}".encode()).digest()

    order = Order(device="", type=type, idempotency_key=key)
    return await bench.core.fanout.send(ME, names, order, fingerprint)


async def lamps(bench: Bench) -> dict[str, str]:
    """Registers all lamps and returns their hardware ids by device id."""
    return {(await bench.device(name, online=False)).id: name for name in LAMPS}


async def made(bench: Bench) -> list[tuple[str, str]]:
    """(device id, command id) of every command in the log, in log order."""
    return [(row.device_id or "", row.stream) for row in await bench.rows() if row.type == "created"]


def crashing(
    power: bool, operations: int, then: Callable[[Bench, dict[str, str], list[Outcome]], Awaitable[None]]
) -> None:
    """Sends to all lamps, crashes after so many disk operations and starts again; `then` checks the
    result."""

    async def world(loop: SimLoop) -> None:
        disk, node, crashed = SimDisk(loop), Node("broker"), asyncio.Event()
        names: dict[str, str] = {}
        answered: list[Outcome] = []

        def crash() -> None:
            loop.kill(node)
            if power:
                disk.lose_power()
            crashed.set()

        async def first() -> None:
            async with running(SimStorage(loop, disk), SimClock(loop)) as bench:
                names.update(await lamps(bench))
                disk.stop_after(operations, crash)
                answered.extend((await send(bench, LAMPS)).values())
                while True:  # runs until the crash
                    await bench.device(f"more-{bench.writer.now()}", online=False)

        loop.spawn(node, first())
        await crashed.wait()
        async with running(SimStorage(loop, disk), SimClock(loop), seed=2) as bench:
            await then(bench, names, answered)

    simulated(world, operations)


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("operations", [0, 15, 29, 33, 45, 59, 63, 75, 87, 95])
def test_a_crash_keeps_whole_parts_and_a_repeated_request_completes_them(
    operations: int, power: bool
) -> None:
    async def then(bench: Bench, names: dict[str, str], answered: list[Outcome]) -> None:
        before = [(names[device_id], command_id) for device_id, command_id in await made(bench)]
        assert [name for name, _ in before] == LAMPS[: len(before)]
        assert len(before) % PART == 0

        again = await send(bench, LAMPS)

        assert list(again.items())[: len(before)] == before
        if answered:
            assert list(again.values()) == answered
        everything = [(names[device_id], command_id) for device_id, command_id in await made(bench)]
        assert everything == list(again.items())
        assert await send(bench, LAMPS) == again
        assert (await bench.writer.storage.read(log.verify)).fault is None

    crashing(power, operations, then)


async def test_a_failed_commit_gives_no_answer_and_keeps_earlier_durable_parts(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        names = await lamps(bench)
        full = FullOnce(bench.writer.storage)
        bench.writer.storage = full
        bench.writer.listeners.append(full.after_a_commit)

        with pytest.raises(Unavailable):
            await send(bench, LAMPS)
        await bench.writer.opened()
        before = await made(bench)
        again = await send(bench, LAMPS)

        assert len(before) == PART
        assert [(names[device], command) for device, command in await made(bench)] == list(again.items())


async def test_other_requests_run_between_two_parts(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        names = await lamps(bench)
        await bench.device("door-1", online=False)

        many = asyncio.create_task(send(bench, LAMPS))
        await until(lambda: bool(bench.live.lanes))
        alone = (await bench.order("door-1")).id
        await many

        order = [command_id for _, command_id in await made(bench)]
        assert 0 < order.index(alone) < len(order) - PART
        assert len(names) == len(order) - 1


async def test_concurrent_fan_outs_never_exceed_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engine.writer.BATCH_EVENTS", PART)
    async with running(tmp_path) as bench:
        await lamps(bench)
        sizes: list[int] = []
        bench.writer.listeners.append(lambda events, _: sizes.append(len(events)))

        await asyncio.gather(*(send(bench, LAMPS, key=f"k{number}") for number in range(20)))

        assert sum(sizes) == 20 * len(LAMPS) + 1  # one `defined` event more than commands
        assert max(sizes) <= 2 * PART


async def test_no_fan_out_is_answered_before_it_is_durable(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await lamps(bench)
        await send(bench, LAMPS[:1])
        held = Held(bench.writer.storage)
        bench.writer.storage = held
        held.gate.clear()

        first = asyncio.create_task(send(bench, LAMPS[:2]))
        await until(lambda: held.waiting > 0)
        again = asyncio.create_task(send(bench, LAMPS[:2]))
        conflict = asyncio.create_task(send(bench, LAMPS[:2], type="close"))
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert not any(task.done() for task in (first, again, conflict))
        held.gate.set()

        assert await first == await again
        kinds = [refusal.kind for refusal in (await conflict).values() if isinstance(refusal, Refusal)]
        assert kinds == ["idempotency_conflict"] * 2
