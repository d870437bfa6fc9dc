"""Opens the log that the settings name, for the process that serves it: a file, or PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from broker.engine.ids import new_id
from broker.seams import Broken, Node, Readable, Served, Sql
from broker.settings import BadSetting, Settings, log_address
from broker.world import DATABASE, LOCK, SqliteStorage, SystemClock, SystemEntropy, lock, open_for_reading

if TYPE_CHECKING:
    from broker.log.postgresql.log import PostgresLog

INCARNATION = "node.incarnation"
SHORTEST_SECRET = 32


async def open_log(settings: Settings) -> Served:
    """The log of these settings. At most one process at a time has it from a data directory.

    Raises:
        InUse: another process uses the data directory.
        BadSetting: the setting `log` is wrong.
        Broken, UnknownFormat: the file is not a log of this release.
        OSError: the directory cannot be created or written.
    """
    directory = Path(settings.data)
    if not settings.log:
        storage = await SqliteStorage.open(directory)
        try:
            await storage.read(_not_moved)
        except BaseException:
            await storage.close()
            raise
        return storage
    from broker.log.postgresql.taking import OwnedLog  # most brokers need no driver of PostgreSQL

    where = log_address(settings)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    held = lock(directory / LOCK)
    clock = SystemClock()
    last, incarnation = _incarnation(directory, new_id("node", clock.wall_ms(), SystemEntropy()))
    return OwnedLog(where, Node(incarnation, os.uname().nodename), clock.wall_ms, last, held.close)


class Shared(NamedTuple):
    """A log that several nodes share, which this one does not own yet. `last`: the run of a process in this
    data directory before this one; it has ended. `secret`: what the nodes know each other by."""

    log: PostgresLog
    node: Node
    last: str | None
    secret: str
    closed: Callable[[], None]


def open_shared(settings: Settings) -> Shared:
    """The log of these settings, for one node of several.

    Raises:
        InUse: another process uses the data directory.
        BadSetting: the setting `log` is wrong, or the secret cannot be read or is too short.
        OSError: the directory cannot be created or written.
    """
    from broker.log.postgresql.log import PostgresLog

    directory, where = Path(settings.data), log_address(settings)
    try:
        secret = Path(settings.cluster_secret_file).read_text().strip()
    except OSError as error:
        raise BadSetting(
            f"cluster_secret_file = {settings.cluster_secret_file!r}: cannot be read: {error.strerror}"
        ) from error
    if len(secret) < SHORTEST_SECRET or not secret.isascii():
        raise BadSetting(f"cluster_secret_file: needs at least {SHORTEST_SECRET} letters and digits")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    held = lock(directory / LOCK)
    last, incarnation = _incarnation(directory, new_id("node", SystemClock().wall_ms(), SystemEntropy()))
    node = Node(incarnation, settings.node or os.uname().nodename, settings.advertise)
    return Shared(PostgresLog(where, incarnation), node, last, secret, held.close)


async def _not_moved(sql: Sql) -> None:
    """Raises:
    Broken: `ordain migrate` moved the log.
    """
    if await sql.one("SELECT 1 FROM sqlite_master WHERE name = 'meta'") is None:
        return
    moved = await sql.one("SELECT value FROM meta WHERE key = 'moved_to'")
    if moved is not None:
        raise Broken(f"this log was moved to {moved[0]}: name that with --log")


class Reading(Readable, Protocol):
    """A log that is only read, until `close`."""

    def close(self) -> None: ...


def open_to_read(settings: Settings) -> Reading:
    """The log of these settings, with or without a running broker.

    Raises:
        Broken: there is no log, or it cannot be read.
        BadSetting: the setting `log` is wrong.
    """
    if not settings.log:
        return open_for_reading(Path(settings.data))
    from broker.log.postgresql.blocking import Blocking

    return Blocking(log_address(settings))


def snapshot(settings: Settings) -> Reading:
    """As `open_to_read`, in one transaction: later events do not change what it shows."""
    sql = open_to_read(settings)
    sql.execute("BEGIN")
    return sql


def space(settings: Settings, sql: Readable) -> dict[str, Any]:
    """What the log takes on the disk, in bytes."""
    if settings.log:
        found = sql.execute(
            "SELECT relname, pg_total_relation_size(oid) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = 'ordain'::regnamespace ORDER BY relname"
        ).fetchall()
        return {"bytes": {str(row[0]): row[1] for row in found}}
    pages = {name: sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size")}
    files = sorted(Path(settings.data).glob(f"{DATABASE}*"))
    return {
        "free_bytes_in_the_file": pages["freelist_count"] * pages["page_size"],
        "bytes": {path.name: path.stat().st_size for path in files},
    }


def _incarnation(directory: Path, new: str) -> tuple[str | None, str]:
    """The last run of a process in this directory, which has ended because we hold its lock, and this one."""
    path = directory / INCARNATION
    last = path.read_text().strip() if path.exists() else None
    part = path.with_suffix(".part")
    with open(part, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(f"{new}\n")
    os.replace(part, path)
    return last, new
