"""Moves a log from a data directory into PostgreSQL: same log id, same positions, same hashes.

The source is marked as moved, durably, before the target may be served: at no moment can both be. What was
interrupted is begun again, or, after that mark, ended.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from broker.log import sqlite as log
from broker.log.driven import Driven, read_now
from broker.log.postgresql import making, tables
from broker.log.postgresql.connection import FAILURES, Connection, connect, goodbye, translated
from broker.log.postgresql.reading import Snapshot
from broker.log.rows import SIDE, columns
from broker.log_url import Address
from broker.operations.backup import Refused
from broker.seams import Batch, Put
from broker.world import SqliteStorage, open_for_reading
from projections import follower

MOVED, ARRIVING = "moved_to", "arriving"
OURS = ("format", "tables", "projections", "probe", MOVED)  # keys of `meta` that say how a file is made
COPIED = [name for name in SIDE if name not in ("meta", *tables.PROJECTED)]
UNMATCHED = ["id", "at", "project", "device_id", "reason", "topic", "command_id", "payload"]
PAGE = 5_000

Reached = Callable[[int], None]


class Migrated(NamedTuple):
    """The log that was moved, and its last row."""

    log_id: str
    position: int
    hash: bytes


async def migrate(directory: Path, where: Address, reached: Reached) -> Migrated:
    """Copies and verifies everything in one transaction, marks the source, then lets the target be served.

    Raises:
        InUse: a broker uses the directory.
        Refused: the source was moved elsewhere, the target has a log, or a check failed.
        Broken, Unknown: one of the two cannot be opened.
    """
    storage = await SqliteStorage.open(directory)
    try:
        await storage.prepare("", "")  # a log of an older release is made current
        connection = await connect(where)
        try:
            with closing(open_for_reading(directory)) as source:
                moved = await _move(storage, source, connection, where, directory, reached)
        except FAILURES as error:
            raise translated(error) from error
        finally:
            await goodbye(connection)
    finally:
        await storage.close()
    return moved


async def _move(
    storage: SqliteStorage,
    source: sqlite3.Connection,
    connection: Connection,
    where: Address,
    directory: Path,
    reached: Reached,
) -> Migrated:
    meta: dict[str, str] = dict(source.execute("SELECT key, value FROM meta").fetchall())
    head = read_now(source, log.head)
    there = await _meta(connection)
    arriving = there.get(ARRIVING) == meta["log_id"]
    if MOVED in meta:
        if meta[MOVED] != where.shown or there.get("log_id") != meta["log_id"]:
            raise Refused(f"the log of {directory} was moved to {meta[MOVED]} before")
    elif there and not arriving:
        raise Refused(f"{where.shown} already has a log; name an empty database")
    else:
        async with connection.transaction():
            await _copy(source, connection, meta, reached)
            await _check(source, connection, head)
        row = Put("meta", (MOVED, where.shown))
        await storage.append(Batch(storage.number(), storage.term, [], b"", [], [row]))
    await connection.execute("DELETE FROM meta WHERE key = $1", ARRIVING)
    return Migrated(meta["log_id"], head.position, head.hash)


async def _meta(connection: Connection) -> dict[str, str]:
    if await connection.fetchval("SELECT to_regclass('meta') IS NULL"):
        return {}
    return {row[0]: row[1] for row in await connection.fetch("SELECT key, value FROM meta")}


async def _copy(
    source: sqlite3.Connection, connection: Connection, meta: dict[str, str], reached: Reached
) -> None:
    await connection.execute(making.LOCK)
    await connection.execute(f"DROP SCHEMA IF EXISTS {tables.SCHEMA} CASCADE")
    await making.make(connection)

    async def put(table: str, names: list[str], found: Iterator[Any]) -> None:
        await connection.copy_records_to_table(table, records=found, columns=names, schema_name=tables.SCHEMA)

    await put("events", log.COLUMNS.split(", "), _events(source, reached))
    for table in COPIED:
        names = [name for part in columns(table) for name in part]
        await put(table, names, _rows(source, table, names))
    await put("unmatched", UNMATCHED, _rows(source, "unmatched", UNMATCHED))
    await connection.execute(
        "SELECT setval(pg_get_serial_sequence('unmatched', 'id'), max(id)) FROM unmatched HAVING max(id) > 0"
    )
    kept = [(key, value) for key, value in meta.items() if key not in OURS]
    await connection.executemany(making.PUT_META, [*kept, (ARRIVING, meta["log_id"])])
    await making.rebuild(connection)


def _events(source: sqlite3.Connection, reached: Reached) -> Iterator[Any]:
    after = 0
    while page := read_now(source, log.rows, after, PAGE):
        yield from page
        after = page[-1].position
        reached(after)


def _rows(source: sqlite3.Connection, table: str, names: list[str]) -> Iterator[Any]:
    yield from source.execute(f"SELECT {', '.join(names)} FROM {table}")


async def _check(source: sqlite3.Connection, connection: Connection, head: log.Head) -> None:
    """Walks the chain of the copy, and compares its projections, folded anew, with those of the source."""
    copy = Snapshot(connection)
    verified = await log.verify(copy)
    if verified.fault is not None:
        raise Refused(f"the copy has a fault, nothing was moved: {verified.fault}")
    if (verified.rows, verified.hash) != (head.position, head.hash):
        raise Refused(f"the copy ends at position {verified.rows}, nothing was moved")
    differs = await follower.difference(copy, Driven(source))
    if differs is not None:
        raise Refused(f"the projections differ, nothing was moved: {differs}")
