"""Makes an empty database a log, checks one that is there, and rebuilds its projections."""

from __future__ import annotations

from hashlib import sha256

import msgspec

from broker.domain.events import subject_kind
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.postgresql import arguments, tables
from broker.log.postgresql.connection import Connection
from broker.log_url import Address
from broker.seams import Broken, UnknownFormat
from projections.follower import Fold

LOCK = f"SELECT pg_advisory_xact_lock({tables.LOCK})"
PAGE = 5_000
COLUMNS = log.COLUMNS
# Digest of the tables and functions: if it changes, they are made anew.
TABLES = sha256(repr(tables.statements()).encode()).hexdigest()[:16]
# Digest of the projections' tables and of the fields of their states: if it changes, they are rebuilt.
SHAPE = sha256(
    repr(
        [tables.PROJECTIONS]
        + [[field.name for field in msgspec.structs.fields(kind)] for kind in (CommandState, DeviceState)]
    ).encode()
).hexdigest()[:16]
PUT_META = "INSERT INTO meta VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


async def prepare(connection: Connection, where: Address, log_id: str, cursor_key: str) -> None:
    """In one transaction, under the lock of appends: several nodes may start at once.

    Raises:
        Broken: the database is not one that can hold a log, or holds something else.
        UnknownFormat: another release wrote the log.
    """
    if (encoding := await connection.fetchval("SHOW server_encoding")) != "UTF8":
        raise Broken(f"{where.shown} has the encoding {encoding}; the log needs a database with UTF8")
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        raise Broken(f"{where.shown} is a standby: name the server that writes")
    async with connection.transaction():
        await connection.execute(LOCK)
        if await connection.fetchval("SELECT to_regnamespace($1) IS NULL", tables.SCHEMA):
            await connection.execute(f"CREATE SCHEMA {tables.SCHEMA}")
        there = await connection.fetchval("SELECT to_regclass('meta') IS NOT NULL")
        found = await connection.fetch("SELECT key, value FROM meta") if there else []
        known: dict[str, str] = {row[0]: row[1] for row in found}
        _check_format(where, known.get("format", str(tables.FORMAT) if not there else "missing"))
        if known.get("tables") != TABLES:
            if known.get("projections") not in (None, SHAPE):
                await _drop(connection)
            for statement in tables.statements():
                await connection.execute(statement)
            await connection.execute(PUT_META, "tables", TABLES)
        new = {"log_id": log_id, "cursor_key": cursor_key, "format": str(tables.FORMAT)}
        for key, value in new.items():
            await connection.execute("INSERT INTO meta VALUES ($1, $2) ON CONFLICT DO NOTHING", key, value)
        if known.get("projections") != SHAPE:
            await rebuild(connection)


def _check_format(where: Address, found: str) -> None:
    if found != str(tables.FORMAT):
        raise UnknownFormat(
            f"{where.shown}: its format is {found[:20]}, and this release reads {tables.FORMAT}: "
            "use the release that wrote it, or a later one"
        )


async def _drop(connection: Connection) -> None:
    await connection.execute(f"DROP TABLE IF EXISTS {', '.join(tables.PROJECTED)}")


async def rebuild(connection: Connection) -> None:
    """Drops every projection and rebuilds it from the log, in the caller's transaction.

    Raises:
        ValueError: an event cannot be read.
    """
    await connection.execute(LOCK)
    await _drop(connection)
    await connection.execute(tables.PROJECTIONS)
    fold, after = Fold(), 0
    query = f"SELECT {COLUMNS} FROM events WHERE position > $1 ORDER BY position LIMIT {PAGE}"
    while page := await connection.fetch(query, after):
        for found in page:
            row = Row(*found)
            if row.data is not None or subject_kind(row.stream) != "command":
                fold.fold(log.recorded(row))  # erased commands have no row in any projection
        after = page[-1][0]
        # The indices of a fold are positions.
        await connection.execute(arguments.PUT_STATES, 0, *arguments.states(fold.states.values()))
        await connection.execute(arguments.PUT_ROWS, 0, *arguments.rows(fold.rows))
        fold.clear()
    await connection.execute(PUT_META, "projections", SHAPE)
