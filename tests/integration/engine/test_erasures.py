"""Erasing: invisible at once, removed from every byte on the disk, and the chain still verifies."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.domain.cloudevents import Wanted
from broker.domain.errors import Refusal, Unavailable
from broker.domain.events import (
    ERASURES,
    Changed,
    DeviceEvent,
    Offline,
    Online,
    Reported,
    TokenRotated,
    device_stream,
)
from broker.domain.lanes import Presence
from broker.domain.lifecycle import CommandState
from broker.engine import erasures
from broker.engine.commands import Caller
from broker.log import erasing
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.operations.own_projection import OwnProjection, caught_up
from broker.operations.replay import copy_log
from broker.seams import Batch, Full, Placed, Sql, Sqlite
from broker.world import SqliteStorage, new_file, open_for_reading
from projections import commands as commands_view
from projections import devices as devices_view
from projections import follower
from projections.commands import Filter
from tests.integration.core_support import (
    ME,
    Bench,
    Held,
    ManualClock,
    T,
    on_virtual_time,
    running,
    simulated,
    until,
)
from tests.reading import plain
from tests.simulation.disk import SimDisk
from tests.simulation.loop import SimLoop

DAY = 86_400_000
SECRET = "s3cr3t-of-the-safe"
MIDNIGHT = T - T % DAY
ADMIN = Caller(actor="key:admin", project=None)


async def ended(bench: Bench, hardware_id: str = "lamp-1", **fields: Any) -> CommandState:
    """An executed command with a secret in its parameters and its result."""
    made = await bench.order(hardware_id, params={"code": SECRET}, **fields)
    await bench.becomes(made.id, "published")
    bench.answers(made.id, "executed", hardware_id, result={"seen": SECRET})
    return await bench.becomes(made.id, "executed")


async def settled(bench: Bench) -> None:
    async with asyncio.timeout(120):
        await bench.core.erasures.finished()


async def read(bench: Bench, command_id: str) -> CommandState | None:
    return await bench.writer.storage.read(lambda sql: commands_view.get(sql, command_id))


async def listed(bench: Bench, limit: int = 100, offset: int = 0, **wanted: object) -> list[str]:
    filters = Filter(**wanted)  # type: ignore[arg-type]
    found = await bench.writer.storage.read(lambda sql: commands_view.newest(sql, filters, limit, offset))
    return [state.id for state in found]


async def data_of(bench: Bench, stream: str) -> list[bytes | None]:
    """The data that readers see of a stream: NULL also for rows whose erasure is promised but not yet
    done."""

    def work(sql: Sqlite) -> list[bytes | None]:
        return [row.data for row in read_now(sql, commands_view.veiled, read_now(sql, log.stream, stream))]

    return await bench.writer.storage.read(plain(work))


async def sound(bench: Bench) -> None:
    """Asserts that the chain verifies and that the projections equal rebuilt ones."""
    storage = bench.writer.storage
    assert (await storage.read(log.verify)).fault is None
    kept = await storage.read(follower.dump)
    await storage.rebuild()
    assert await storage.read(follower.dump) == kept


def on_disk(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def with_secret(directory: Path) -> list[str]:
    return [name for name, data in on_disk(directory).items() if SECRET.encode() in data]


# --- one command


async def test_a_deleted_command_leaves_no_byte_on_the_disk(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await ended(bench)
        # a contradicting answer, kept as unmatched
        bench.answers(state.id, "executed", result={"another": SECRET})
        await until(lambda: len(bench.wire.pubacks) == 2)
        assert with_secret(tmp_path)

        await bench.core.erasures.delete(ME, state.id)
        await settled(bench)

        assert with_secret(tmp_path) == []
        assert {"ordain.db", "ordain.db-wal", "ordain.db-shm"} <= on_disk(tmp_path).keys()
        assert await bench.unmatched() == []
        assert await bench.types(state.id) == ["created", "published", "executed"]
        assert await data_of(bench, state.id) == [None] * 3
        (row,) = [row for row in await bench.rows() if row.stream == ERASURES]
        assert msgspec.json.decode(row.data or b"") == {"ids": [state.id], "count": 1}
        assert (row.project, row.actor) == ("acme", "key:key_1")
        await sound(bench)


async def test_a_deleted_command_is_unknown_once_the_delete_is_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await ended(bench, idempotency_key="k-1", fingerprint=b"one")
        other = await ended(bench)

        await bench.core.erasures.delete(ME, state.id)

        assert await read(bench, state.id) is None
        assert await listed(bench) == [other.id]
        for again in (bench.core.erasures.delete, bench.core.repairs.retry, bench.core.commands.cancel):
            with pytest.raises(Refusal) as refused:
                await again(ME, state.id)
            assert refused.value.kind == "not_found"
        with pytest.raises(Refusal) as refused:
            await bench.order(idempotency_key="k-1", fingerprint=b"one")
        assert refused.value.kind == "gone"
        with pytest.raises(Refusal) as refused:
            await bench.order(idempotency_key="k-1", fingerprint=b"two")
        assert refused.value.kind == "idempotency_conflict"


async def test_a_pending_command_is_cancelled_before_it_is_erased(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device(online=False)
        state = await bench.order(params={"code": SECRET})

        await bench.core.erasures.delete(ME, state.id)

        assert await bench.types(state.id) == ["created", "cancelled"]
        assert await data_of(bench, state.id) == [None, None]
        await settled(bench)
        assert with_secret(tmp_path) == []
        await sound(bench)
        bench.core.intake.device_online("lamp-1")
        follower_of_it = await bench.order()
        await bench.becomes(follower_of_it.id, "published")
        assert [outgoing.correlation for outgoing in bench.wire.sent] == [follower_of_it.id.encode()]


@pytest.mark.parametrize("status", ["published", "acknowledged"])
async def test_a_handed_over_command_is_not_deleted(tmp_path: Path, status: str) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await bench.order()
        await bench.becomes(state.id, "published")
        if status == "acknowledged":
            bench.answers(state.id, status)
            await bench.becomes(state.id, status)

        with pytest.raises(Refusal, match=f"is {status}, it was handed over") as refused:
            await bench.core.erasures.delete(ME, state.id)

        assert refused.value.kind == "conflict"
        assert await bench.types(ERASURES) == []
        assert await read(bench, state.id) is not None


async def test_a_late_answer_to_an_erased_command_is_unknown(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await bench.order()
        await bench.becomes(state.id, "published")
        await bench.core.commands.abandon(ME, state.id)
        before = await bench.types(state.id)

        await bench.core.erasures.delete(ME, state.id)
        bench.answers(state.id, "executed")
        await until(lambda: len(bench.wire.pubacks) == 1)

        assert await bench.unmatched() == ["unknown"]
        assert await bench.types(state.id) == before
        assert bench.state(state.id) == "forgotten"


async def test_an_answer_without_id_is_not_assigned_to_an_erased_command(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device(type="iotee_device")
        state = await bench.order(type="reboot")
        await bench.becomes(state.id, "published")
        await bench.core.commands.abandon(ME, state.id)
        await bench.core.erasures.delete(ME, state.id)

        bench.says(b"ok")
        await until(lambda: len(bench.wire.pubacks) == 1)

        assert await bench.unmatched() == ["nothing_in_flight"]


async def test_another_projects_command_is_not_deleted(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await ended(bench)
        stranger = msgspec.structs.replace(ME, project="other")

        with pytest.raises(Refusal) as refused:
            await bench.core.erasures.delete(stranger, state.id)

        assert refused.value.kind == "not_found"
        assert await read(bench, state.id) == state


async def test_a_read_that_began_before_a_delete_does_not_restore_the_command(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await ended(bench)
        bench.live.closed.clear()
        held: list[Callable[[], None]] = []
        storage, gate = bench.writer.storage, asyncio.Event()
        at_once = storage.read

        async def slow(work: Callable[[Sql], Awaitable[object]]) -> object:
            found = await at_once(work)
            held.append(gate.set)
            await gate.wait()
            return found

        storage.read = slow  # type: ignore[method-assign, assignment]
        bringing = asyncio.create_task(bench.live.bring(storage, [], [state.id]))
        await until(lambda: bool(held))
        storage.read = at_once  # type: ignore[method-assign]
        await bench.core.erasures.delete(ME, state.id)
        gate.set()
        await bringing

        assert bench.state(state.id) == "forgotten"


async def test_a_delete_whose_commit_failed_erases_nothing(tmp_path: Path) -> None:
    class Failing(Held):
        full = False

        async def append(self, batch: Batch) -> Placed:
            if self.full:
                self.full = False
                raise Full("no space")
            return await super().append(batch)

    storage = Failing(await SqliteStorage.open(tmp_path))
    async with running(storage) as bench:
        await bench.device()
        state = await ended(bench)
        storage.full = True

        with pytest.raises(Unavailable):
            await bench.core.erasures.delete(ME, state.id)

        await bench.writer.opened()
        assert await read(bench, state.id) == state
        await bench.core.commands.ready(command_ids=[state.id])
        assert bench.state(state.id) == "executed"
        await bench.core.erasures.delete(ME, state.id)
        assert await bench.types(ERASURES) == ["erased"]
        await sound(bench)
    await storage.close()


# --- a purge


async def old_and_new(bench: Bench, clock: ManualClock) -> tuple[list[str], dict[str, str]]:
    """Ten closed commands of yesterday, two open ones, and a closed one of today. The clock shows today."""
    for number in (1, 2, 3):
        await bench.device(f"lamp-{number}", online=number != 2)
    closed = [(await ended(bench)).id for _ in range(9)]
    timed_out = await bench.order("lamp-1", ttl_sec=None)
    await bench.becomes(timed_out.id, "published")
    await bench.core.commands.abandon(ME, timed_out.id)
    kept = {"pending": (await bench.order("lamp-2", ttl_sec=None)).id}
    kept["published"] = (await bench.order("lamp-3", ttl_sec=None)).id
    await bench.becomes(kept["published"], "published")
    clock.pass_ms(MIDNIGHT + 1_000 - clock.wall)
    kept["today"] = (await ended(bench)).id
    return [*closed, timed_out.id], kept


def yesterday() -> ManualClock:
    return ManualClock(MIDNIGHT - DAY // 2)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets the erasing stop after the first command, until `undo`."""
    monkeypatch.setattr(erasures, "BATCH", 1)
    monkeypatch.setattr(erasures, "PAUSE_SEC", 1e9)
    return monkeypatch


async def begun(bench: Bench) -> None:
    await until(lambda: bench.core.erasures.erased > 0)


async def test_a_purge_erases_closed_commands_older_than_its_days(tmp_path: Path) -> None:
    clock = yesterday()
    async with running(tmp_path, clock) as bench:
        old, kept = await old_and_new(bench, clock)

        assert await bench.core.erasures.purge(ADMIN, 1) == (MIDNIGHT - DAY, 0)
        assert await bench.core.erasures.purge(ADMIN, 0) == (MIDNIGHT, 10)
        await settled(bench)

        assert bench.core.erasures.erased == 10
        for command_id in old:
            assert set(await data_of(bench, command_id)) == {None}
        for command_id in kept.values():
            assert None not in await data_of(bench, command_id)
        assert await listed(bench) == [kept["today"], kept["published"], kept["pending"]]
        said = [msgspec.json.decode(row.data or b"") for row in await bench.rows() if row.stream == ERASURES]
        assert said == [{"cutoff": MIDNIGHT - DAY}, {"cutoff": MIDNIGHT, "count": 10}]
        await sound(bench)

        bench.answers(kept["published"], "executed", "lamp-3")
        await bench.becomes(kept["published"], "executed")
        assert await bench.core.erasures.purge(ADMIN, 0) == (MIDNIGHT, 1)
        await settled(bench)
        clock.pass_ms(DAY)
        assert await bench.core.erasures.purge(ADMIN, 0) == (MIDNIGHT + DAY, 1)
        await settled(bench)

        assert await listed(bench) == [kept["pending"]]
        assert with_secret(tmp_path) == []
        await sound(bench)


async def test_a_command_is_unknown_from_the_purge_on_before_it_is_erased(
    tmp_path: Path, interrupted: pytest.MonkeyPatch
) -> None:
    clock = yesterday()
    async with running(tmp_path, clock) as bench:
        old, kept = await old_and_new(bench, clock)
        await bench.core.erasures.purge(ADMIN, 0)
        await begun(bench)

        raw = await bench.writer.storage.read(lambda sql: log.stream(sql, old[5]))
        assert None not in [row.data for row in raw], "it is not erased yet"
        for command_id in old:
            assert await read(bench, command_id) is None
            assert set(await data_of(bench, command_id)) == {None}
            await bench.core.commands.ready(command_ids=[command_id])
            assert bench.state(command_id) == "forgotten"
        visible = [kept["today"], kept["published"], kept["pending"]]
        assert await listed(bench) == visible
        assert await listed(bench, limit=2) == visible[:2]
        assert await listed(bench, limit=2, offset=1) == visible[1:]
        assert await listed(bench, type="open", project="acme") == visible
        assert await listed(bench, project="other") == []
        bench.answers(kept["published"], "executed", "lamp-3")
        bench.answers(old[9], "executed")
        await bench.becomes(kept["published"], "executed")
        assert await listed(bench) == visible, "it was open at the time of the purge"
        assert await bench.unmatched() == ["unknown"]
        assert await bench.core.erasures.purge(ADMIN, 0) == (MIDNIGHT, 1)
        assert await listed(bench) == [kept["today"], kept["pending"]]
        await sound(bench)


async def test_a_command_covered_by_a_purge_is_in_no_replayed_log_and_in_no_projection(
    tmp_path: Path, interrupted: pytest.MonkeyPatch
) -> None:
    clock, data, copy = yesterday(), tmp_path / "data", tmp_path / "copy"
    own = tmp_path / "own.py"
    own.write_text(
        "TABLES = 'CREATE TABLE seen (stream TEXT)'\n"
        "COLUMNS = ('stream',)\n"
        "def apply(sql, event): sql.execute('INSERT INTO seen VALUES (?)', (event.stream,))\n"
        "def rows(sql): return sql.execute('SELECT DISTINCT stream FROM seen')\n"
    )
    async with running(data, clock) as bench:
        old, kept = await old_and_new(bench, clock)
        await bench.core.erasures.purge(ADMIN, 0)
        await begun(bench)

        copy.mkdir()
        with closing(open_for_reading(data)) as source, closing(new_file(copy)) as target:
            copy_log(source, target, bench.core.feed.head)
            told = {row[0] for row in caught_up(OwnProjection(own), source, tmp_path / "own.db")}
            assert read_now(target, log.verify).fault is None
            assert {row.data for command_id in old for row in read_now(target, log.stream, command_id)} == {
                None
            }
            assert {state.id for state in read_now(target, commands_view.newest, Filter(), 100)} == {
                *kept.values()
            }
    assert told.isdisjoint(old)
    assert told.issuperset(kept.values())


async def test_an_interrupted_purge_is_finished_after_the_next_start(
    tmp_path: Path, interrupted: pytest.MonkeyPatch
) -> None:
    clock = yesterday()
    async with running(tmp_path, clock) as bench:
        old, kept = await old_and_new(bench, clock)
        await bench.core.erasures.purge(ADMIN, 0)
        await begun(bench)
        assert with_secret(tmp_path) != []
    interrupted.undo()

    async with running(tmp_path, clock) as bench:
        assert await listed(bench) == [kept["today"], kept["published"], kept["pending"]]
        await until(lambda: bench.core.erasures.erased == 9)
        await sound(bench)  # not before: the purge changes rows between the two copies that are compared
        await bench.core.erasures.delete(ME, kept["today"])
        await settled(bench)

        for command_id in old:
            assert await data_of(bench, command_id) == [None] * len(await bench.types(command_id))
        assert await bench.writer.storage.read(erasing.purges) == []
        assert with_secret(tmp_path) == []
        await sound(bench)


async def test_a_command_closed_in_the_same_millisecond_as_a_purge_is_kept(
    tmp_path: Path, interrupted: pytest.MonkeyPatch
) -> None:
    """The clock does not move here: only positions in the log separate before and after."""
    clock = yesterday()
    async with running(tmp_path, clock) as bench:
        await bench.device()
        await bench.device("lamp-2")
        first, second = await ended(bench), await bench.order("lamp-2", ttl_sec=None)
        await bench.becomes(second.id, "published")
        clock.pass_ms(DAY)
        before = (await bench.accepted("lamp-1")).state
        await bench.core.commands.abandon(ME, second.id)
        await bench.core.erasures.purge(ADMIN, 0)
        bench.answers(before.id, "executed")
        closed = await bench.becomes(before.id, "executed")

        assert await listed(bench) == [before.id]
        assert closed.closed_at is not None
        assert first.created_at == second.created_at
        await begun(bench)  # a step between the two looks of `sound` would change what it compares
        await sound(bench)


async def test_a_purge_erases_old_unmatched_answers(tmp_path: Path) -> None:
    clock = yesterday()
    async with running(tmp_path, clock) as bench:
        await bench.device()
        state = await ended(bench)
        bench.says(b'{"status": "executed", "result": "%s"}' % SECRET.encode())
        await until(lambda: len(bench.wire.pubacks) == 2)
        clock.pass_ms(DAY)
        bench.answers(state.id, "executed", result={"again": SECRET})
        bench.says(b"{}")
        await until(lambda: len(bench.wire.pubacks) == 4)
        assert await bench.unmatched() == ["nothing_in_flight", "contradiction", "malformed"]

        await bench.core.erasures.purge(ADMIN, 0)
        await settled(bench)

        assert await bench.unmatched() == ["malformed"]
        assert with_secret(tmp_path) == []


def test_no_copy_of_erased_data_stays_on_any_page() -> None:
    """Rows that grow and shrink move other rows between pages. With hundreds of rows a leftover copy would be
    found."""

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, disk):
            names = [f"lamp-{number}" for number in range(10)]
            for name in names:
                await bench.device(name)
            made: dict[str, str] = {}
            for number in range(400):
                name = names[number % 10]
                marks = {"code": f"<{number}>", "fill": "x" * (number * 7 % 300)}
                state = await bench.order(name, params=marks)
                made[state.id] = f"<{number}>"
                await bench.becomes(state.id, "published")
                while bench.wire.due:
                    bench.wire.receipt()
                bench.answers(state.id, "acknowledged", name)
                bench.answers(state.id, "executed", name, result={**marks, "fill": "y" * (number * 11 % 400)})
            await until(lambda: not any(lane.members for lane in bench.live.lanes.values()), 60)
            await bench.writer.barrier()
            erased = list(made)[::3]
            for command_id in erased:
                await bench.core.erasures.delete(ME, command_id)
            await settled(bench)

            left = content(disk)
            assert [made[command_id] for command_id in erased if made[command_id].encode() in left] == []
            assert all(made[command_id].encode() in left for command_id in made.keys() - set(erased))
            await sound(bench)

    simulated(world)


def content(disk: SimDisk) -> bytes:
    return b"".join(bytes(file.data) for file in disk.files.values())


# --- device events


async def test_replaced_device_events_lose_their_data_and_all_else_stays(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock) as bench:
        device = await bench.device(online=False)
        stream, registry = device_stream(device.id), bench.core.registry

        def said(*events: DeviceEvent) -> None:
            for event in events:
                before = bench.live.devices.get(device.id)
                registry.record(event, device.id, before, device.project, f"device:{device.id}")

        said(Online(session=SECRET), Offline(session=SECRET), Changed(attributes={"seen": SECRET}))
        said(Online(session="s-2"), Changed(attributes={"n": 2}, name="lamp"))
        said(Reported(state={"seen": SECRET}), Reported(state={"on": False}))
        registry.heard(bench.live.devices.get(device.id) or device, Presence.ONLINE, "s-2")
        made = await bench.order()
        await bench.becomes(made.id, "published")  # so the online of the session s-2 stays
        said(Offline(session="s-2"), TokenRotated(token_digest="$7$new"), Changed(attributes={"n": 3}))
        said(Changed(attributes={"n": 4}, answer_key="A" * 43), Changed(attributes={"n": 5}))
        said(Reported(state={"on": True}))
        await bench.writer.barrier()
        before = await bench.writer.storage.read(lambda sql: devices_view.by_name(sql, ["lamp-1"]))

        assert (await bench.core.erasures.purge_events(ADMIN, 0, dry_run=False)).amount == 0, (
            "all is of today"
        )
        clock.pass_ms(2 * DAY)
        assert (await bench.core.erasures.purge_events(ADMIN, 1, dry_run=True)).amount == 6
        assert with_secret(tmp_path)
        assert (await bench.core.erasures.purge_events(ADMIN, 1, dry_run=False)).amount == 6
        assert (await bench.core.erasures.purge_events(ADMIN, 1, dry_run=False)).amount == 0
        await settled(bench)

        rows = await bench.writer.storage.read(lambda sql: log.stream(sql, stream))
        empty = [row.version for row in rows if row.data is None]
        erased = [row.type for row in rows if row.version in empty]
        assert erased == ["online", "offline", "changed", "reported", "reported", "changed"]
        assert [row.type for row in rows if row.type == "reported" and row.data is not None] == ["reported"]
        assert any(b"answer_key" in (row.data or b"") for row in rows), "a new key stays"
        assert [log.recorded(row).type for row in rows] == [row.type for row in rows]
        assert with_secret(tmp_path) == []
        assert await bench.writer.storage.read(lambda sql: devices_view.by_name(sql, ["lamp-1"])) == before
        await sound(bench)
    async with running(tmp_path, clock) as bench:
        async with asyncio.timeout(120):
            entries, _ = await bench.core.feed.page(Wanted(device="lamp-1"), 0, 100)
        assert [entry.version for entry in entries if entry.stream == stream and entry.event is None] == empty
        await sound(bench)


async def test_a_copy_from_before_the_erasure_of_device_events_verifies(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock) as bench:
        device = await bench.device(online=False)
        for number in range(3):
            before = bench.live.devices.get(device.id)
            event = Changed(attributes={"n": number})
            bench.core.registry.record(event, device.id, before, device.project, "operator:local")
        await bench.writer.barrier()
        until_here = bench.writer.durable
        clock.pass_ms(2 * DAY)
        assert (await bench.core.erasures.purge_events(ADMIN, 1, dry_run=False)).amount == 2

        def copied(sql: Sqlite) -> log.Verified:
            with closing(sqlite3.connect(":memory:")) as target:
                copy_log(sql, target, until_here)
                return read_now(target, log.verify)

        verified = await bench.writer.storage.read(plain(copied))
        assert (verified.fault, verified.later) == (None, 2)
