"""The single writer: batches, the commit barrier, failed commits, and the broker's clock."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from broker.domain.errors import Refusal, Unavailable
from broker.domain.events import Changed, Pending, Recorded, device_stream
from broker.domain.lanes import Presence
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.seams import Broken, Drop, Placed, Put, Sqlite, Storage
from broker.world import SqliteStorage
from projections import follower
from tests.integration.core_support import (
    ME,
    PROJECT,
    Bench,
    Held,
    ManualClock,
    T,
    new_core,
    on_virtual_time,
    running,
    simulated,
    until,
)
from tests.reading import plain, tamper
from tests.simulation.loop import SimLoop


@asynccontextmanager
async def held(directory: Path) -> AsyncIterator[Held]:
    storage = Held(await SqliteStorage.open(directory))
    try:
        yield storage
    finally:
        await storage.close()


# --- batches and the barrier


async def test_events_staged_during_a_commit_go_into_the_next_one_in_order(tmp_path: Path) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        await bench.device()
        seen: list[Pending] = []
        told: list[Placed] = []

        def heard(events: list[Pending], placed: Placed) -> None:
            seen.extend(events)
            told.append(placed)

        bench.writer.listeners.append(heard)
        commits = storage.commits
        storage.gate.clear()
        orders = [asyncio.create_task(bench.order(type=f"open{n}")) for n in range(50)]
        await until(lambda: len(bench.live.members) == 50)
        assert not seen
        storage.gate.set()
        states = [await order for order in orders]

        assert storage.commits - commits <= 2
        assert [placed.first for placed in told[1:]] == [placed.last + 1 for placed in told[:-1]]
        assert told[-1].last == told[0].first + len(seen) - 1
        made = [event.stream for event in seen if event.type == "created"]
        assert made == [state.id for state in states]


async def test_nothing_leaves_before_its_event_is_committed(tmp_path: Path) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        await bench.device()
        storage.gate.clear()
        order = asyncio.create_task(bench.order())
        await until(lambda: storage.waiting == 1)
        assert (order.done(), bench.wire.sent) == (False, [])

        storage.gate.set()
        state = await order
        await until(lambda: len(bench.wire.sent) == 1)

        storage.gate.clear()
        answer = bench.answers(state.id)
        again = bench.answers(state.id)
        cancel = asyncio.create_task(bench.core.commands.cancel(ME, state.id))
        await until(lambda: bench.state(state.id) == "executed" and storage.waiting == 1)
        assert (bench.wire.pubacks, cancel.done()) == ([], False), "the PUBACK of a duplicate waits too"

        storage.gate.set()
        with pytest.raises(Refusal, match="is executed"):
            await cancel
        await until(lambda: bench.wire.pubacks == [answer, again])


@pytest.mark.parametrize("what", ["a no-op", "a replay"])
async def test_every_answer_waits_until_its_decision_is_durable(tmp_path: Path, what: str) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        await bench.device(online=False)
        first = await bench.order()
        storage.gate.clear()
        if what == "a no-op":
            earlier = asyncio.create_task(bench.core.commands.cancel(ME, first.id))
            await until(lambda: bench.state(first.id) == "cancelled")
            answer = asyncio.create_task(bench.core.commands.cancel(ME, first.id))
        else:
            earlier = asyncio.create_task(bench.order(idempotency_key="k", fingerprint=b"f"))
            await until(lambda: len(bench.live.members) == 2)
            answer = asyncio.create_task(bench.order(idempotency_key="k", fingerprint=b"f"))
        for _ in range(20):
            await bench.rows()  # gives the database's thread and the loop time to run

        assert not answer.done()
        storage.gate.set()
        await earlier
        await answer


# --- failed commits


async def interfere(storage: Storage, device_id: str, name: str) -> None:
    """Writes to the same stream from outside, like a second node: log and projections."""

    def work(sql: Sqlite) -> None:
        head = read_now(sql, log.head)
        version = read_now(sql, log.stream, device_stream(device_id))[-1].version + 1
        foreign = Recorded(
            position=head.position + 1,
            stream=device_stream(device_id),
            version=version,
            recorded_at=head.recorded_at,
            decided_at=head.recorded_at,
            project=PROJECT,
            device_id=device_id,
            actor="key:other",
            event=Changed(name=name),
        )
        log.append(sql, head, [foreign], bytes(16))
        follower.rebuild(sql)

    await tamper(storage, work)


async def test_a_conflict_discards_dependent_events_and_reloads_the_state(tmp_path: Path) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        device = await bench.device(online=False)
        await interfere(storage.storage, device.id, "theirs")
        storage.gate.clear()
        first = asyncio.create_task(bench.core.registry.change(ME, "lamp-1", Changed(name="ours")))
        await until(lambda: storage.waiting == 1)
        second = asyncio.create_task(bench.order())
        await until(lambda: len(bench.live.members) == 1)
        storage.gate.set()
        for lost in (first, second):
            with pytest.raises(Unavailable):
                await lost

        await until(lambda: bench.writer.open)
        assert not bench.live.members
        assert (await bench.core.registry.find(ME, "lamp-1")).name == "theirs"
        changed = await bench.core.registry.change(ME, "lamp-1", Changed(name="ours"))
        assert (changed.name, changed.version) == ("ours", device.version + 2)
        await whole(bench)


async def whole(bench: Bench) -> None:
    """Asserts positions without a gap, a chain without fault, and projections equal to rebuilt ones."""
    storage = bench.writer.storage
    rows = await bench.rows()
    assert [row.position for row in rows] == list(range(1, len(rows) + 1))
    assert (await storage.read(log.verify)).fault is None
    kept = await storage.read(follower.dump)
    await storage.rebuild()
    assert await storage.read(follower.dump) == kept


async def test_positions_have_no_gap_over_restarts_and_failed_commits(tmp_path: Path) -> None:
    ids = []
    for round_ in range(3):
        async with held(tmp_path) as storage, running(storage, seed=round_ + 1) as bench:
            device = await bench.device(f"lamp-{round_}", online=False)
            ids.append((await bench.order(f"lamp-{round_}")).id)
            await interfere(storage.storage, device.id, "theirs")
            with pytest.raises(Unavailable):
                await bench.core.registry.change(ME, f"lamp-{round_}", Changed(name="ours"))
            await until(lambda: bench.writer.open)
            ids.append((await bench.order(f"lamp-{round_}")).id)
            await whole(bench)
            assert {row.stream for row in await bench.rows() if row.type == "created"} == set(ids)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of two megabytes; making it needs root."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4_096)


async def order_for_ever(bench: Bench, accepted: list[str]) -> None:
    """Creates commands until a write fails: the log's own files may still have some free space."""
    while True:
        accepted.append((await bench.order(type=f"fill{len(accepted)}")).id)


async def test_a_full_disk_refuses_writes_allows_reads_and_recovers_with_space(
    small_disk: Path,
) -> None:
    async with running(small_disk) as bench:
        await bench.device(online=False)
        first = await bench.order()
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space"):
            fill(ballast)
        accepted = [first.id]
        with pytest.raises(Unavailable):
            await order_for_ever(bench, accepted)

        assert not bench.writer.open
        assert {row.stream for row in await bench.rows() if row.type == "created"} == set(accepted)
        ballast.unlink()
        await until(lambda: bench.writer.open)
        accepted.append((await bench.order(type="after")).id)
        assert {row.stream for row in await bench.rows() if row.type == "created"} == set(accepted)
        await whole(bench)


def test_after_a_full_disk_waiting_commands_are_handed_over() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, disk):
            await bench.device()
            await bench.device("lamp-2")
            first = await bench.order()
            await until(lambda: len(bench.wire.sent) == 1)
            waiting = await bench.order(ttl_sec=None)
            disk.capacity = 0
            bench.answers(first.id)
            await until(lambda: not bench.writer.open)
            with pytest.raises(TimeoutError):
                await until(lambda: bench.writer.open, within_sec=30)
            disk.capacity = None
            await bench.becomes(first.id, "executed")
            await bench.becomes(waiting.id, "published")
            await until(lambda: len(bench.wire.sent) >= 2)

    simulated(world)


def test_a_single_pending_command_is_handed_over_after_a_full_disk() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, disk):
            await bench.device("lamp-1", online=False)
            waiting = await bench.order(ttl_sec=None)
            bench.core.intake.device_online("lamp-1")
            disk.capacity = 0
            await until(lambda: not bench.writer.open)
            disk.capacity = None
            await bench.becomes(waiting.id, "published")
            await until(lambda: len(bench.wire.sent) == 1)

    simulated(world)


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_an_io_error_ends_the_writer_and_the_outcome_is_unknown(operation: str) -> None:
    async def world(loop: SimLoop) -> None:
        async def until_it_ends() -> None:
            async with on_virtual_time(loop) as (bench, disk):
                await bench.device(online=False)
                disk.failing.add(operation)  # type: ignore[arg-type]
                with pytest.raises(Unavailable):
                    await bench.order()
                assert not bench.writer.open
                await asyncio.Event().wait()

        with pytest.raises(BaseExceptionGroup) as failed:
            await until_it_ends()
        assert failed.group_contains(Broken)

    simulated(world)


# --- the clock


async def test_wall_clock_steps_do_not_move_the_brokers_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock) as bench:
        for step in (86_400_000, -2 * 86_400_000):
            before = bench.writer.now()
            clock.wall += step
            assert bench.writer.now() == before
            clock.pass_ms(250)
            assert bench.writer.now() == before + 250


async def test_event_times_never_fall_after_a_restart_with_an_earlier_wall_clock(tmp_path: Path) -> None:
    for seed, wall in enumerate((T, T - 3_000, T - 86_400_000), start=1):
        clock = ManualClock(wall)
        async with running(tmp_path, clock, seed=seed) as bench:
            await bench.device(f"lamp-{seed}")
            clock.pass_ms(10)
            await bench.order(f"lamp-{seed}")
            times = [row.recorded_at for row in await bench.rows()]
            assert times == sorted(times)
            assert times[0] == T
            assert bench.writer.now() >= times[-1]


@pytest.mark.parametrize(("behind_ms", "sent"), [(5_000, 1), (5_001, 0)])
async def test_a_clock_behind_the_log_stops_hand_overs_until_it_is_corrected(
    tmp_path: Path, behind_ms: int, sent: int
) -> None:
    async with running(tmp_path, ManualClock()) as bench:
        await bench.device()
    clock = ManualClock(T - behind_ms)
    async with running(tmp_path, clock, seed=2) as bench:
        bench.core.intake.device_online("lamp-1")
        state = await bench.order()
        assert bench.state(state.id) == ("published" if sent else "pending")
        assert any(reason.startswith("clock") for reason in bench.core.not_ready()) == (not sent)

        clock.wall = T + 1
        await bench.becomes(state.id, "published")
        await until(lambda: len(bench.wire.sent) == 1)
        assert not bench.core.dispatch.halted


async def test_a_clock_that_goes_on_with_a_jump_does_not_shorten_the_wait_for_the_backlog(
    tmp_path: Path,
) -> None:
    """Otherwise an answer from before the session would show that its device is online now."""
    async with running(tmp_path, ManualClock()) as bench:
        device = await bench.device(online=False)
    clock = ManualClock(T - 60_000)
    async with running(tmp_path, clock, seed=2, embedded=False) as bench:
        assert bench.core.dispatch.halted
        clock.wall = T + 3_000
        await until(lambda: not bench.core.dispatch.halted)
        assert not bench.core.dispatch.drained(bench.writer.now(), device.id)

        async def heard() -> Presence | None:
            bench.answers("cmd_00000000000000000000000000")
            await until(lambda: len(bench.wire.pubacks) == 1)
            bench.wire.pubacks.clear()
            return bench.live.presence.get(device.id)

        clock.pass_ms(1_999)
        assert await heard() is Presence.UNKNOWN
        clock.pass_ms(1)
        assert await heard() is Presence.ONLINE
        assert bench.core.dispatch.drained(bench.writer.now(), device.id)


async def test_a_step_of_the_wall_clock_is_recorded_once(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock) as bench:
        clock.wall += 60_000
        await until(lambda: bool(bench.core.not_ready()))
        await bench.writer.barrier()
        steps = [row for row in await bench.rows() if row.type == "clock_stepped"]
        assert [msgspec.json.decode(row.data or b"") for row in steps] == [{"by_ms": 60_000}]


# --- starting


async def test_a_core_that_is_only_opened_reads_its_log_and_writes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        state = await bench.order((await bench.device(online=False)).id)
        before = await bench.rows()
    storage = await SqliteStorage.open(tmp_path)
    core = new_core(storage, seed=2)
    await core.open(embedded=True)

    assert core.live.command(state.id) == state
    assert await storage.read(log.all_rows) == before
    await storage.close()


# --- unwritable values


async def test_an_unwritable_note_is_dropped_and_counted_and_its_batch_is_committed(
    tmp_path: Path,
) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        await bench.device()
        refused: list[None] = []
        bench.writer.on_refused_note = lambda: refused.append(None)
        for value in (2**70, "a\0b", "\ud800", object()):
            bench.writer.note(Put("meta", ("a", value)))  # type: ignore[arg-type]
        state = await bench.order()
        await bench.writer.barrier()
        assert len(refused) == 4
        found = await storage.read(lambda sql: log.stream(sql, state.id))
        assert [row.type for row in found][:1] == ["created"]


async def test_a_row_that_cannot_be_stored_is_refused_before_it_is_staged(tmp_path: Path) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        with pytest.raises(ValueError, match="NUL"):
            bench.writer.also(Put("meta", ("a", "1")), Put("meta", ("b", "a\0b")))
        await bench.device()
        found = await storage.read(
            plain(lambda sql: sql.execute("SELECT 1 FROM meta WHERE key = 'a'").fetchone())
        )
        assert found is None


async def test_an_unwritable_row_fails_its_batch_and_not_the_broker(tmp_path: Path) -> None:
    async with held(tmp_path) as storage, running(storage) as bench:
        await bench.device()
        before = bench.writer.durable
        bench.writer._batch.rows.append(Drop("meta", (2**70,)))  # a bug: `also` would refuse it
        with pytest.raises(Unavailable):
            await bench.order()
        await bench.writer.opened()
        assert bench.writer.durable == before
        state = await bench.order()
        recorded = await storage.read(plain(lambda sql: sql.execute("SELECT stream FROM events").fetchall()))
        assert [row[0] for row in recorded if row[0].startswith("cmd_")][:1] == [state.id]
