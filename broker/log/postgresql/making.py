"""Makes an empty database a log, checks one that is there, and rebuilds its projections."""

from __future__ import annotations

from hashlib import sha256

from broker.log.postgresql import arguments, form, tables
from broker.log.postgresql.connection import Connection
from broker.log.postgresql.reading import Snapshot
from broker.log_url import Address
from broker.seams import Broken, UnknownFormat
from projections.follower import SHAPE, Fold, folded

LOCK = f"SELECT pg_advisory_xact_lock({tables.LOCK})"
# Digest of the tables, of what their rows hold, and of the functions. If it changes, they are made anew. Each
# append names it, so an owner of another release is refused.
TABLES = sha256(repr((tables.FORMAT, SHAPE, tables.statements())).encode()).hexdigest()[:16]
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
        there = await connection.fetchval("SELECT to_regclass('meta') IS NOT NULL")
        found = await connection.fetch("SELECT key, value FROM meta") if there else []
        known: dict[str, str] = {row[0]: row[1] for row in found}
        _check_format(where, known.get("format", str(tables.FORMAT) if not there else "missing"))
        if (log := known.get("arriving")) is not None:
            raise Broken(f"{where.shown} is not complete: run ordain migrate of log {log} once more")
        if known.get("tables") != TABLES:
            await _drop(connection)
            await make(connection)
        if (fault := await form.fault(connection)) is not None:
            raise UnknownFormat(f"{where.shown}: this is not a log that Ordain wrote: {fault}")
        new = {"log_id": log_id, "cursor_key": cursor_key}
        for key, value in new.items():
            await connection.execute("INSERT INTO meta VALUES ($1, $2) ON CONFLICT DO NOTHING", key, value)
        if known.get("tables") != TABLES or known.get("projections") != SHAPE:
            await rebuild(connection)


async def make(connection: Connection) -> None:
    """Creates the schema, the tables and the functions, as far as they are missing, in the caller's
    transaction."""
    if await connection.fetchval("SELECT to_regnamespace($1) IS NULL", tables.SCHEMA):
        await connection.execute(f"CREATE SCHEMA {tables.SCHEMA}")
    for statement in tables.statements():
        await connection.execute(statement)
    for key, value in (("tables", TABLES), ("format", str(tables.FORMAT))):
        await connection.execute(PUT_META, key, value)


async def check(connection: Connection, where: Address) -> None:
    """Checks that there is a log that this release reads.

    Raises:
        Broken: there is none.
        UnknownFormat: another release wrote it.
    """
    if await connection.fetchval("SELECT to_regclass('meta') IS NULL"):
        raise Broken(f"there is no log at {where.shown}: a broker makes one when it first starts")
    _check_format(
        where, await connection.fetchval("SELECT value FROM meta WHERE key = 'format'") or "missing"
    )


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

    async def put(fold: Fold) -> None:
        # The indices of a fold are positions.
        await connection.execute(arguments.PUT_NEWEST, 0, *arguments.states(fold.states.values()))
        await connection.execute(arguments.PUT_ROWS, 0, *arguments.rows(fold.rows))

    await folded(Snapshot(connection), put)
    await connection.execute(PUT_META, "projections", SHAPE)
