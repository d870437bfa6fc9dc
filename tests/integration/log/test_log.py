"""The log on a real disk: one owner, atomic transactions, kills, and rebuilt projections."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import stat
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker.log import sqlite as log
from broker.seams import Broken, Conflict, Sqlite
from broker.world import DATABASE, InUse, SqliteStorage
from projections import follower
from tests.integration.core_support import ME, Bench, new_core, on_virtual_time, running, simulated, until
from tests.reading import plain, tamper
from tests.simulation.loop import SimLoop

ROOT = Path(__file__).parents[3]

# --- storage


async def test_a_second_broker_on_a_directory_is_refused_in_one_sentence(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(InUse) as refused:
            await SqliteStorage.open(tmp_path)
        message = str(refused.value)
        assert "another broker" in message
        assert str(tmp_path) in message
        assert "\n" not in message
    await (await SqliteStorage.open(tmp_path)).close()


async def test_only_the_owner_can_read_the_log_files(tmp_path: Path) -> None:
    async with running(tmp_path / "data"):
        for path in (tmp_path / "data", *(tmp_path / "data").iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path.name


async def test_a_file_that_is_not_a_database_is_reported_broken_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"precious" * 1_000)
    with pytest.raises(Broken, match=DATABASE):
        await SqliteStorage.open(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == b"precious" * 1_000


async def test_a_transaction_is_atomic(tmp_path: Path) -> None:
    def half(sql: Sqlite) -> None:
        sql.execute("INSERT INTO facts VALUES (1)")
        raise LookupError("in the middle")

    def twice(sql: Sqlite) -> None:
        sql.executemany("INSERT INTO facts VALUES (?)", [(7,), (7,)])

    def facts(sql: Sqlite) -> list[int]:
        return [row[0] for row in sql.execute("SELECT n FROM facts").fetchall()]

    storage = await SqliteStorage.open(tmp_path)
    await storage.write(lambda sql: sql.execute("CREATE TABLE facts (n INTEGER PRIMARY KEY)"))
    with pytest.raises(LookupError, match="in the middle"):
        await storage.write(half)
    with pytest.raises(Conflict, match="UNIQUE"):
        await storage.write(twice)
    with pytest.raises(Broken, match="readonly"):
        await storage.read(plain(lambda sql: sql.execute("INSERT INTO facts VALUES (2)")))

    assert await storage.read(plain(facts)) == []
    await storage.close()


async def test_a_cancelled_waiter_leaves_no_half_transaction(tmp_path: Path) -> None:
    storage = await SqliteStorage.open(tmp_path)
    await storage.write(lambda sql: sql.execute("CREATE TABLE facts (n INTEGER PRIMARY KEY)"))

    def work(sql: Sqlite) -> None:
        sql.executemany("INSERT INTO facts VALUES (?)", ((n,) for n in range(50_000)))

    waiter = asyncio.create_task(storage.write(work))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter

    await storage.write(lambda sql: sql.execute("INSERT INTO facts VALUES (-1)"))
    count = await storage.read(plain(lambda sql: sql.execute("SELECT count(*) FROM facts").fetchone()[0]))
    assert count in (1, 50_001)
    await storage.close()


# --- projections


async def busy(bench: Bench, seed: int, steps: int) -> None:
    """A random workload: three kinds of devices, every kind of answer, cancels and abandons."""
    choose = random.Random(seed)
    kinds = {"lamp-1": "generic", "lock-1": "iotee_device", "tape-1": "recorder"}
    names = {"generic": "open", "iotee_device": "lock", "recorder": "start_recording"}
    for hardware_id, kind in kinds.items():
        await bench.device(hardware_id, kind)
    made: list[tuple[str, str]] = []
    for _ in range(steps):
        if not made or choose.random() < 0.3:
            hardware_id = choose.choice(list(kinds))
            order = await bench.order(hardware_id, names[kinds[hardware_id]], idempotency_key=str(len(made)))
            made.append((hardware_id, order.id))
            await bench.writer.barrier()
        flying = [
            (member.state.hardware_id, name)
            for name, member in bench.live.members.items()
            if member.state.state in ("published", "acknowledged")
        ]
        hardware_id, command_id = choose.choice(made[-3:] + flying)
        status = choose.choice(
            ["acknowledged", "progress", "executed", "failed", "cancel", "abandon", "gone"]
        )
        if status == "cancel" and bench.state(command_id) == "pending":
            await bench.core.commands.cancel(ME, command_id, "not needed")
        elif status == "abandon" and bench.state(command_id) in ("published", "acknowledged"):
            await bench.core.commands.abandon(ME, command_id)
        elif status == "gone":
            bench.core.intake.device_offline(hardware_id)
            bench.core.intake.device_online(hardware_id)
        elif status in ("acknowledged", "progress", "executed", "failed"):
            said = {
                "progress": {"percent": choose.choice([0, 1, 50, 99.5, 100]), "note": "on"},
                "result": choose.choice([None, 1, 1.0, "text", {"b": 1, "a": [2.50, 1e3]}]),
                "error": choose.choice([None, "hot", {"code": "hot", "details": {"z": 1, "a": 2.0}}]),
            }
            bench.answers(command_id, status, hardware_id, **said)
    taken = len(bench.wire.pubacks)
    bench.says(b"{}", "lamp-1")
    await until(lambda: len(bench.wire.pubacks) > taken)
    await bench.writer.barrier()


EVERY_COMMAND_EVENT = {
    "created", "published", "acknowledged", "progressed", "executed", "failed", "timed_out", "cancelled",
}  # fmt: skip


@pytest.mark.parametrize("page", [1, 7, 5_000])
def test_rebuilt_projections_equal_the_incremental_ones(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "PAGE", page)

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            await busy(bench, seed=page, steps=600)
            storage = bench.writer.storage
            kept = await storage.read(follower.dump)
            assert {row.type for row in await bench.rows()} >= EVERY_COMMAND_EVENT

            await tamper(storage, follower.rebuild)

            assert await storage.read(follower.dump) == kept
            assert (await storage.read(log.verify)).fault is None

    simulated(world)


@pytest.mark.parametrize("seed", range(3))
def test_the_state_in_memory_equals_the_state_read_after_a_restart(seed: int) -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            await busy(bench, seed, steps=200)
            before = [member.state for member in bench.live.members.values()]
            anew = new_core(bench.writer.storage)

            await anew.live.load(anew.storage, anew.writer.entropy, bench.writer.now())

            for state in before:
                assert (member := anew.live.members.get(state.id)) is not None
                assert msgspec.json.encode(member.state) == msgspec.json.encode(state)
            still_open = {state.id for state in before if not state.closed}
            assert {
                name for name, member in anew.live.members.items() if not member.state.closed
            } == still_open

    simulated(world)


async def test_unmatched_answers_are_bounded_and_the_newest_are_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        for number in range(250):
            bench.answers(f"cmd_{number}")
        await until(lambda: len(bench.wire.pubacks) == 250)

        def kept(sql: Sqlite) -> list[str]:
            found = sql.execute("SELECT command_id FROM unmatched ORDER BY id").fetchall()
            return [row[0] for row in found]

        found = await bench.writer.storage.read(plain(kept))
        assert found == [f"cmd_{number}" for number in range(150, 250)]


# --- kill -9

VICTIM = """
import asyncio, sys
import structlog
from pathlib import Path
from tests.integration.core_support import ME, running

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def main():
    async with running(Path(sys.argv[1]), seed=int(sys.argv[2])) as bench:
        await bench.device(f"lamp-{sys.argv[2]}", "iotee_device")
        async def life(number):
            state = await bench.order(f"lamp-{sys.argv[2]}", "lock")
            print(state.id, flush=True)
            if number % 2:
                await bench.core.commands.cancel(ME, state.id)
        number = 0
        while True:
            number += 20
            await asyncio.gather(*(life(n) for n in range(number, number + 20)), return_exceptions=True)
            for member in list(bench.live.members.values()):
                if member.state.state == "published":
                    bench.answers(member.state.id, "executed", f"lamp-{sys.argv[2]}")

asyncio.run(main())
"""


async def acknowledged_until_killed(directory: Path, seed: int, enough: int) -> list[str]:
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, str(directory), str(seed),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert victim.stdout is not None
    said: list[str] = []
    async with asyncio.timeout(120):
        while len(said) < enough:
            line = await victim.stdout.readline()
            assert line, (await victim.communicate())[1].decode()
            said.append(line.decode().strip())
        victim.send_signal(signal.SIGKILL)
        rest, _ = await victim.communicate()
    whole = rest.decode().rsplit("\n", 1)[0]
    return said + whole.split()


async def test_after_kill_9_during_writes_all_acknowledged_writes_are_there(
    tmp_path: Path,
) -> None:
    promised: set[str] = set()
    for seed in (1, 2, 3):
        promised |= set(await acknowledged_until_killed(tmp_path, seed, enough=seed * 60))
        storage = await SqliteStorage.open(tmp_path)
        rows = await storage.read(log.all_rows)
        assert promised <= {row.stream for row in rows if row.type == "created"}
        assert [row.position for row in rows] == list(range(1, len(rows) + 1))
        assert (await storage.read(log.verify)).fault is None
        kept = await storage.read(follower.dump)
        await storage.write(follower.rebuild)
        assert await storage.read(follower.dump) == kept
        await storage.close()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as sql, sql:
        assert sql.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    sql.close()
