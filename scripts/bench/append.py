"""The cost of appending: whole command lives through the writer, compared with the same rows in bare SQLite.

Both use the promised durability: WAL and synchronous=FULL. Neither sends anything.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import msgspec
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate
from eventsourcing.domain import event as step

from broker.domain.events import Acknowledged, CommandEvent, Created, Executed, Published
from broker.domain.lifecycle import CommandState, evolve
from broker.engine.ids import new_id
from broker.engine.writer import Writer
from broker.log import sqlite as log
from broker.seams import Sqlite
from broker.world import DATABASE, SqliteStorage, SystemClock, SystemEntropy
from projections import follower

WAITING = (1_000, 100)
PER_TRANSACTION = 100
DEVICES = 100
LIFE_MS = 300_000
LIBRARY_SHARE = 20  # the library is so much slower that it gets so much less to do
PROJECT, ACTOR = "bench", "key:key_01kagbx5wpf2ts6n8y7zq3v4me"
PARAMS = msgspec.Raw(b'{"duration_sec":30,"reason":"door 7","by":"bench"}')
FOLLOWING = (
    Published(attempt=1),
    Acknowledged(),
    Executed(result=msgspec.Raw(b'{"ok":true,"battery_percent":87}')),
)

Figures = dict[str, list[float]]


async def appends(home: Path, rounds: int, count: int) -> Figures:
    """Appends `count` events per round, four per command life."""
    figures: Figures = {}
    count -= count % 4
    for number in range(rounds + 1):
        found: dict[str, float] = {}
        for waiting in WAITING:
            directory = home / f"append-{number}-{waiting}"
            rate, cost = await through_the_writer(directory, waiting, count)
            found |= {f"events/s, {waiting} waiting": rate, f"CPU µs per event, {waiting} waiting": cost}
        rate, cost = _bare(directory / DATABASE, home / f"bare-{number}.db", count)
        found |= {f"events/s, bare SQLite by {PER_TRANSACTION}": rate, "CPU µs per event, bare SQLite": cost}
        kept = {
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": str(home / f"library-{number}.db"),
        }
        found["events/s, eventsourcing library"] = through_the_library(kept, count)
        for waiting in WAITING:
            found[f"events/s / bare, {waiting} waiting"] = found[f"events/s, {waiting} waiting"] / rate
            found[f"CPU / bare, {waiting} waiting"] = found[f"CPU µs per event, {waiting} waiting"] / cost
        if number:  # round 0 is the warm-up
            for name, value in found.items():
                figures.setdefault(name, []).append(value)
    return figures


async def through_the_writer(directory: Path, waiting: int, count: int) -> tuple[float, float]:
    """(events/s, CPU µs per event) of the writer. `waiting`: how many lives wait for a commit at once."""
    storage = await SqliteStorage.open(directory)
    try:
        await storage.write(_create)
        writer = Writer(storage, SystemClock(), SystemEntropy())
        await writer.start()
        running = asyncio.create_task(writer.run())
        numbers = iter(range(count // 4))
        since, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(waiting):
                group.create_task(lives(writer, numbers))
        seconds, cpu = time.perf_counter() - since, time.process_time() - cpu
        running.cancel()
        await asyncio.wait({running})
        assert (await storage.read(log.head)).position == count
    finally:
        await storage.close()
    return count / seconds, cpu / count * 1e6


def _create(sql: Sqlite) -> None:
    log.create(sql, "log_bench", "00")
    follower.create(sql)


async def lives(writer: Writer, numbers: Iterator[int]) -> None:
    """Whole lives of commands; each step waits until the one before is durable."""
    for number in numbers:
        now = writer.now()
        name = f"bench_{number % DEVICES:04}"
        created = Created(
            hardware_id=name,
            type="lock",
            device_type="generic",
            definition="5d41402abc4b2a76b9719d911017c592",
            topic=f"iotee/dev/{name}/rls",
            params=PARAMS,
            expires_at=now + LIFE_MS,
            ttl_ms=LIFE_MS,
        )
        command_id = new_id("cmd", now, writer.entropy)
        events: tuple[CommandEvent, ...] = (created, *FOLLOWING)
        state: CommandState | None = None
        for version, event in enumerate(events, 1):
            await writer.room()
            pending = writer.stage(
                command_id, version, event, project=PROJECT, device_id=f"dev_{name}", actor=ACTOR
            )
            state = evolve(state, pending)
            writer.touch(state)
            await writer.barrier()


def _bare(source: Path, target: Path, count: int) -> tuple[float, float]:
    """(events/s, CPU µs per event) of bare SQLite: inserts the rows of `source` without projections."""
    with sqlite3.connect(source) as before:
        rows = before.execute(f"SELECT {log.COLUMNS} FROM events ORDER BY position").fetchall()
    before.close()
    assert len(rows) == count
    bare = sqlite3.connect(target, isolation_level=None)
    bare.execute("PRAGMA journal_mode = WAL")
    bare.execute("PRAGMA synchronous = FULL")
    log.create(bare, "log_bench", "00")
    since, cpu = time.perf_counter(), time.process_time()
    for start in range(0, count, PER_TRANSACTION):
        bare.execute("BEGIN IMMEDIATE")
        bare.executemany(log.INSERT, rows[start : start + PER_TRANSACTION])
        bare.execute("COMMIT")
    seconds, cpu = time.perf_counter() - since, time.process_time() - cpu
    bare.close()
    return count / seconds, cpu / count * 1e6


class _Command(Aggregate):
    """A command in the library `eventsourcing`: the same events with the same fields, without ours around."""

    @step("Created")
    def __init__(self, fields: dict[str, object]) -> None:
        self.fields = fields

    @step("Published")
    def publish(self, attempt: int) -> None:
        self.attempt = attempt

    @step("Acknowledged")
    def acknowledge(self) -> None:
        self.acknowledged = True

    @step("Executed")
    def execute(self, result: dict[str, object]) -> None:
        self.result = result


def through_the_library(settings: dict[str, str], count: int) -> float:
    """Events/s of the library, which saves each step of a life. `settings` say where."""
    application = Application[UUID](env=settings)
    lives = max(1, count // 4 // LIBRARY_SHARE)
    fields: dict[str, object] = {"type": "lock", "params": msgspec.json.decode(PARAMS), "ttl_ms": LIFE_MS}
    since = time.perf_counter()
    for _ in range(lives):
        command = _Command(fields)
        application.save(command)
        for following in (
            lambda command=command: command.publish(1),
            command.acknowledge,
            lambda command=command: command.execute({"ok": True, "battery_percent": 87}),
        ):
            following()
            application.save(command)
    seconds = time.perf_counter() - since
    application.close()
    return lives * 4 / seconds
