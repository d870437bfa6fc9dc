"""What appending costs with the log in PostgreSQL: through the writer, beside bare inserts of the same rows.

    python -m scripts.bench.postgresql --events 200000 --minutes 10

A real PostgreSQL with fsync, on this machine. In the same run: bare batched inserts of the same events and
states into tables with the same indexes; the writer on SQLite; the library `eventsourcing` on PostgreSQL; and
appends while one snapshot is held open.

A commit has as many events as one of the bare inserts. In two turns the next commit is prepared while the one
before is written, as in a broker with many clients. If all wait for the same commit, nothing overlaps. Beside
a busy disk both sides wait for the disk. Then the processor time says more: that of this process, and that of
the server's process for the connection.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import asyncpg
import uvloop

from broker.engine.writer import Writer
from broker.log.postgresql.log import PostgresLog
from broker.log_url import address
from broker.world import SystemClock, SystemEntropy
from scripts.bench.append import PER_TRANSACTION, lives, through_the_library, through_the_writer
from tests.postgres import Postgres

WAITING = 100
SLICES = 10
TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")
# What is inserted is looked up before, so that the inserts do not pay for it.
TABLES = """CREATE TABLE bare_events (LIKE events INCLUDING ALL);
    CREATE TABLE bare_commands (LIKE commands INCLUDING ALL);
    CREATE TABLE bare_states AS SELECT e.position AS place, c.* FROM events e
        JOIN events i ON i.stream = e.stream AND i.version = 1 JOIN commands c ON c.position = i.position;
    CREATE INDEX ON bare_states (place);
    ANALYZE events; ANALYZE bare_states"""
# Each event is inserted, and the state of its command written, as a commit of the broker does.
COLUMNS = "position, project, device_id, type, state, version, closed_at, closed_position, later"
BARE = (
    "INSERT INTO bare_events SELECT * FROM events WHERE position BETWEEN $1 AND $2",
    f"""INSERT INTO bare_commands ({COLUMNS}) SELECT {COLUMNS} FROM bare_states
    WHERE place BETWEEN $1 AND $2 ON CONFLICT (position) DO UPDATE SET state = excluded.state,
    version = excluded.version, closed_at = excluded.closed_at,
    closed_position = excluded.closed_position, later = excluded.later""",
)


class Rate(NamedTuple):
    """How fast events were appended. `client` and `server`: processor time for each, in µs."""

    a_second: float
    in_a_commit: float
    client: float
    server: float

    def __str__(self) -> str:
        return (
            f"{self.a_second:,.0f} events/s, {self.in_a_commit:.0f} in a commit, processor time of each "
            f"{self.client:.1f} µs here and {self.server:.1f} µs in the server"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=10)
    asked = parser.parse_args()
    postgres = Postgres(
        fsync="on", full_page_writes="on", autovacuum="on", shared_buffers="512MB", max_wal_size="4GB"
    )
    postgres.start()
    try:
        uvloop.run(_measure(postgres, asked.events, asked.minutes))
    finally:
        postgres.remove()


async def _measure(postgres: Postgres, count: int, minutes: float) -> None:
    url = postgres.create("log")
    storage = PostgresLog(address(url), "node_bench")
    await storage.prepare("log_bench", "00" * 32)
    before = await _written(url)
    ours = await _appended(storage, url, count)
    written = (await _written(url) - before) / (count // 4)
    bare = await _bare(url, count)
    in_turns = await _appended(storage, url, count, turns=2)
    print(f"bare inserts by {PER_TRANSACTION}: {bare}")
    for name, rate in (("all waiting for one commit", ours), ("in two turns", in_turns)):
        print(f"the writer on PostgreSQL, {name}: {rate}")
        print(f"the writer / bare inserts: {rate.a_second / bare.a_second:.2f} (aim: at least 0.6)")
    print(
        f"a command's whole life takes {await _bytes(url, count // 2):,.0f} bytes in the database, "
        f"and {written:,.0f} of its write-ahead log"
    )
    with tempfile.TemporaryDirectory() as home:
        local, _ = await through_the_writer(Path(home) / "sqlite", WAITING, count)
    print(f"the writer on SQLite, in the same run: {local:,.0f} events/s")
    library = through_the_library(_library_settings(postgres), count)
    print(f"the library eventsourcing on PostgreSQL, which saves each step: {library:,.0f} events/s")
    print(f"the writer / the library: {ours.a_second / library:.0f} (aim: at least 20)")
    await _beside_a_snapshot(storage, url, minutes)
    await storage.close()


async def _appended(storage: PostgresLog, url: str, count: int, turns: int = 1) -> Rate:
    """Command lives through the writer. `turns`: how many commits it takes until each life was in one."""
    writer = Writer(storage, SystemClock(), SystemEntropy())
    await writer.start()
    await writer.prepare()  # connects
    server = await _backend(url)
    running = asyncio.create_task(writer.run())
    numbers, before = iter(range(count // 4)), storage.number()
    since, client, there = time.perf_counter(), time.process_time(), _used(server)
    async with asyncio.TaskGroup() as group:
        for _ in range(turns):
            for _ in range(WAITING):
                group.create_task(lives(writer, numbers))
            for _ in range(3):
                await asyncio.sleep(0)  # then what these staged is on its way
    seconds, client = time.perf_counter() - since, time.process_time() - client
    commits = storage.number() - before - 1
    running.cancel()
    await asyncio.wait({running})
    return Rate(count / seconds, count / commits, client / count * 1e6, (_used(server) - there) / count)


async def _bare(url: str, count: int) -> Rate:
    """Inserts of the rows that the writer made, in the server itself: no client is faster."""
    sql = await asyncpg.connect(url, server_settings={"search_path": "ordain"})
    await sql.execute(TABLES)
    server = sql.get_server_pid()
    since, client, there = time.perf_counter(), time.process_time(), _used(server)
    for start in range(1, count, PER_TRANSACTION):
        async with sql.transaction():
            for text in BARE:
                await sql.execute(text, start, start + PER_TRANSACTION - 1)
    seconds, client = time.perf_counter() - since, time.process_time() - client
    used = _used(server) - there
    await sql.close()
    return Rate(count / seconds, PER_TRANSACTION, client / count * 1e6, used / count)


async def _backend(url: str) -> int:
    """The server's process for the connection that appends."""
    sql = await asyncpg.connect(url)
    try:
        found = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT * FROM append%'"
        return int(await sql.fetchval(found))
    finally:
        await sql.close()


def _used(process: int) -> float:
    """Processor time of a process so far, in µs."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_US


async def _written(url: str) -> int:
    """How much write-ahead log the server has written so far, in bytes."""
    sql = await asyncpg.connect(url)
    try:
        return int(await sql.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')"))
    finally:
        await sql.close()


async def _bytes(url: str, commands: int) -> float:
    """What the log and its projections take on the disk with all indexes, for each command."""
    sql = await asyncpg.connect(url, server_settings={"search_path": "ordain"})
    await sql.execute("VACUUM")
    kept = await sql.fetchval("SELECT pg_total_relation_size('events') + pg_total_relation_size('commands')")
    await sql.close()
    return float(kept) / commands


async def _beside_a_snapshot(storage: PostgresLog, url: str, minutes: float) -> None:
    """Whether appends get slower while one snapshot is open, as pg_dump or `ordain log verify` holds one."""
    reader = await asyncpg.connect(url, server_settings={"search_path": "ordain"})
    async with reader.transaction(isolation="repeatable_read", readonly=True):
        await reader.fetchval("SELECT count(*) FROM events")
        end, rates = time.monotonic() + minutes * 60, list[Rate]()
        while time.monotonic() < end or len(rates) < SLICES:
            rates.append(await _appended(storage, url, 20_000))
    await reader.close()
    tenth = max(1, len(rates) // SLICES)
    (first, before), (last, after) = (
        (sum(rate.a_second for rate in some) / tenth, sum(rate.server for rate in some) / tenth)
        for some in (rates[:tenth], rates[-tenth:])
    )
    print(
        f"beside a snapshot held for {minutes:g} minutes: {first:,.0f} events/s at its beginning, "
        f"{last:,.0f} at its end: {last / first:.2f} (aim: flat); {before:.1f} and {after:.1f} µs of the "
        "server's processor time for each event"
    )


def _library_settings(postgres: Postgres) -> dict[str, str]:
    postgres.create("library")
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres", "POSTGRES_DBNAME": "library",
        "POSTGRES_HOST": str(postgres.home), "POSTGRES_PORT": "5432", "POSTGRES_USER": "ordain",
        "POSTGRES_PASSWORD": "none",
    }  # fmt: skip


if __name__ == "__main__":
    main()
