"""The log on SQLite: its tables, appending a batch, reading and verifying.

All functions run inside the caller's transaction (`seams.Storage`). Rows of `events` are only added, never
deleted. The unique index on (stream, version) is the only concurrency rule.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from broker.domain.events import NAMES, SCHEMA, Pending, Recorded, decode, encode
from broker.log import chain, shape
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.log.erasing import REPLACEABLE, REPORTED, Excused, first_at
from broker.log.many import many
from broker.seams import Conflict, Sql, Sqlite, UnknownFormat, Unmatched

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY, stream TEXT NOT NULL, version INTEGER NOT NULL, type TEXT NOT NULL,
    schema INTEGER NOT NULL, recorded_at INTEGER NOT NULL, project TEXT NOT NULL, device_id TEXT,
    actor TEXT NOT NULL, data BLOB, salt BLOB, digest BLOB NOT NULL, hash BLOB NOT NULL, decided_at INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS events_stream ON events (stream, version);
CREATE INDEX IF NOT EXISTS events_devices ON events (stream, version)
    WHERE type IN ('registered', 'changed', 'token_rotated', 'deleted');
CREATE TABLE IF NOT EXISTS idempotency (
    project TEXT NOT NULL, key TEXT NOT NULL, scope TEXT NOT NULL, digest BLOB NOT NULL,
    command_id TEXT NOT NULL, created_at INTEGER NOT NULL, PRIMARY KEY (project, key, scope)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS idempotency_age ON idempotency (created_at);
CREATE TABLE IF NOT EXISTS unmatched (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, project TEXT, device_id TEXT,
    reason TEXT NOT NULL, topic TEXT NOT NULL, command_id TEXT, payload BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS unmatched_device ON unmatched (device_id, id);
CREATE INDEX IF NOT EXISTS unmatched_command ON unmatched (command_id);
CREATE TABLE IF NOT EXISTS purges (
    position INTEGER PRIMARY KEY, cutoff INTEGER NOT NULL, bound INTEGER NOT NULL, at INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS api_keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, project TEXT NOT NULL, scopes TEXT NOT NULL, name TEXT,
    created_at INTEGER NOT NULL, revoked_at INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS key_terms (
    id TEXT PRIMARY KEY, terms BLOB NOT NULL, pepper TEXT, last_used_at INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS grant_keys (
    kid TEXT PRIMARY KEY, private BLOB NOT NULL, created_at INTEGER NOT NULL,
    retired_at INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS device_secrets (device_id TEXT PRIMARY KEY, secret BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS webhooks (
    id TEXT PRIMARY KEY, endpoint BLOB NOT NULL, progress BLOB NOT NULL) WITHOUT ROWID;
"""
OF_EVENT = "position, stream, version, type, schema, recorded_at, decided_at, project, device_id, actor, data"
COLUMNS = f"{OF_EVENT}, salt, digest, hash"
LAST = 2**63 - 1
# The format of the tables, in `meta`. It is counted up when an older release could not read or write them.
FORMAT = 2
# What SQLite's driver raises for a value or statement it cannot take. The disk is not at fault.
UNWRITABLE = (
    ValueError, TypeError, OverflowError, Warning,
    sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError,
)  # fmt: skip
# Which of these versions of streams the log has. CROSS JOIN fixes the join order.
VERSIONS = """SELECT e.stream FROM (VALUES {}) v
    CROSS JOIN events e ON e.stream = v.column1 AND e.version = v.column2"""
INSERT_MANY = f"INSERT INTO events ({COLUMNS}) VALUES {{}}"
INSERT = INSERT_MANY.format("(?,?,?,?,?,?,?,?,?,?,?,?,?,?)")


class Head(NamedTuple):
    """The last row of the log, which the next row follows. Times: Unix time in ms."""

    position: int = 0
    recorded_at: int = 0
    hash: bytes = chain.GENESIS
    decided_at: int = 0


def create(sql: Sqlite, log_id: str, cursor_key: str) -> None:
    """Creates the missing tables, and upgrades a log of format 1. An existing log keeps its id and its cursor
    key.

    Raises:
        UnknownFormat: the file has rows, views or triggers that no release writes.
    """
    upgrade(sql)
    for statement in TABLES.split(";"):
        if statement.strip():
            sql.execute(statement)
    sql.execute(
        "INSERT INTO meta VALUES ('log_id', ?), ('cursor_key', ?), ('format', ?) ON CONFLICT DO NOTHING",
        (log_id, cursor_key, str(FORMAT)),
    )
    if (fault := read_now(sql, shape.fault, TABLES)) is not None:
        raise UnknownFormat(f"this is not a log that Ordain wrote: {fault}")


def upgrade(sql: Sqlite) -> None:
    """Makes a log of format 1 one of format 2. No row changes: its rows keep their hashes, without
    `decided_at`. Takes the same time for any log."""
    if format_of(sql) == "1":
        sql.execute("ALTER TABLE events ADD COLUMN decided_at INTEGER")
        sql.execute("UPDATE meta SET value = '2' WHERE key = 'format'")


def show_as_format_2(sql: Sqlite) -> None:
    """Lets a connection that only reads a log of format 1 see it as one of format 2, which it stays not."""
    if format_of(sql) == "1":
        columns = COLUMNS.replace("decided_at", "NULL AS decided_at")
        sql.execute(f"CREATE TEMP VIEW events AS SELECT {columns} FROM main.events")


def copy(sql: Sqlite, to: str) -> None:
    """Copies one consistent state of the whole file to a new one, without its free pages."""
    shown = sql.execute("SELECT 1 FROM sqlite_temp_master WHERE name = 'events'").fetchone() is not None
    sql.execute("DROP VIEW IF EXISTS temp.events")  # the copy has the rows as they are
    try:
        sql.execute("VACUUM INTO ?", (to,))
    finally:
        if shown:
            show_as_format_2(sql)


def format_of(sql: Sqlite) -> str | None:
    """The format of the file, as it says; None: it is empty."""
    if sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        return None
    found = sql.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    return "missing" if found is None else str(found[0])


def check_format(sql: Sqlite, shown: object) -> None:
    """Checks that this release reads the file. A new, empty file is right. `shown` names it in the error.

    Raises:
        UnknownFormat: it does not.
    """
    text = format_of(sql)
    if text is not None and not (text.isascii() and text.isdecimal() and 1 <= int(text) <= FORMAT):
        raise UnknownFormat(
            f"{shown}: its format is {text[:20]}, and this release reads 1 to {FORMAT}: "
            "use the release that wrote it, or a later one"
        )


async def meta(sql: Sql, key: str) -> str:
    """A fact about this log: `log_id`, `cursor_key` (signs the cursors of lists), `format`."""
    return str((await sql.one("SELECT value FROM meta WHERE key = ?", (key,)))[0])


async def copied(sql: Sql) -> dict[str, str]:
    """If `ordain replay` made this log, up to which position of its original; else empty."""
    found = await sql.one("SELECT value FROM meta WHERE key = 'replayed'")
    return {} if found is None else {"replayed to": str(found[0])}


async def head(sql: Sql) -> Head:
    row = await sql.one(
        "SELECT position, recorded_at, hash, coalesce(decided_at, recorded_at) FROM events "
        "ORDER BY position DESC LIMIT 1"
    )
    return Head(row[0], row[1], bytes(row[2]), row[3]) if row else Head()


def append(sql: Sqlite, after: Head, events: Sequence[Pending], salts: bytes) -> Head:
    """Appends events after the head, which is in the same transaction. `salts`: 16 bytes for each event.

    Raises:
        Conflict: an event is older than the last one, or not the next one of its stream.
    """
    rows: list[Row] = []
    position, recorded_at, previous, decided_at = after
    versions: dict[str, int] = {}
    follows: dict[str, int] = {}  # stream -> the version that the log must have
    for index, event in enumerate(events):
        position += 1
        # The unique index refuses a version that is taken; a version that leaves a gap is refused here.
        stream, before = event.stream, event.version - 1
        if before != versions.get(stream, 0):
            if stream in versions:
                raise Conflict(f"position {position}: {stream} has version {versions[stream]} before it")
            follows[stream] = before
        versions[stream] = event.version
        if event.decided_at < decided_at:
            raise Conflict(f"position {position} would be older than the event before it")
        decided_at = event.decided_at
        recorded_at = max(recorded_at, decided_at)  # one node: its clock is also the log's
        data, salt = encode(event.event), salts[index * 16 : index * 16 + 16]
        row_digest = chain.digest(salt, data)
        header = (
            position,
            event.stream,
            event.version,
            NAMES[type(event.event)],
            SCHEMA,
            recorded_at,
            decided_at,
            event.project,
            event.device_id,
            event.actor,
        )
        previous = chain.link(previous, *header, row_digest)
        rows.append(Row(*header, data, salt, row_digest, previous))
    there = {row[0] for row in many(sql, VERSIONS, list(follows.items()))}
    for stream, before in follows.items():
        if stream not in there:
            raise Conflict(f"{stream} has no version {before} yet")
    many(sql, INSERT_MANY, rows)
    return Head(position, recorded_at, previous, decided_at)


async def rows(sql: Sql, after: int = 0, limit: int = 1_000) -> list[Row]:
    """A page of rows, ascending."""
    found = await sql.all(
        f"SELECT {COLUMNS} FROM events WHERE position > ? ORDER BY position LIMIT ?", (after, limit)
    )
    return [*map(Row._make, found)]


async def all_rows(sql: Sql, after: int = 0) -> list[Row]:
    """Every row after a position, in memory: for tests and small logs."""
    return await rows(sql, after, LAST)


async def stream(sql: Sql, name: str, until: int = LAST) -> list[Row]:
    """The rows of one stream up to a position, ascending by version."""
    found = await sql.all(
        f"SELECT {COLUMNS} FROM events WHERE stream = ? AND position BETWEEN 1 AND ? ORDER BY version",
        (name, until),
    )
    return [*map(Row._make, found)]


async def last_version(sql: Sql, name: str) -> int:
    """The version of the last event of a stream; 0 if there is none."""
    found = await sql.one("SELECT coalesce(max(version), 0) FROM events WHERE stream = ?", (name,))
    return int(found[0])


async def device_stream(sql: Sql, name: str, until: int) -> list[Row]:
    """The rows of a device's stream that define its state at a position, ascending by version.

    These are all rows about the device itself, but only the last `online` or `offline`, and the last
    `reported`: a device can have a hundred thousand of those.
    """
    found = await sql.all(
        f"SELECT {COLUMNS} FROM events WHERE stream = ? "
        "AND position BETWEEN 1 AND ? AND type IN ('registered', 'changed', 'token_rotated', 'deleted')",
        (name, until),
    )
    for newest in ("'online', 'offline'", "'reported'"):
        found += await sql.all(
            f"SELECT {COLUMNS} FROM events WHERE stream = ? "
            f"AND position BETWEEN 1 AND ? AND type IN ({newest}) ORDER BY version DESC LIMIT 1",
            (name, until),
        )
    return sorted(map(Row._make, found))


async def place(sql: Sql, at: int) -> int:
    """The position of the last event recorded at or before a time (ms); 0 if there is none."""
    return await first_at(sql, at + 1, "recorded_at") - 1


NO_STATE = b'{"state":{}}'


def recorded(row: tuple[Any, ...]) -> Recorded:
    """Decodes a row, or its columns `OF_EVENT`, into its event. Only device events that newer ones replaced
    are decoded without their data: when they are folded, what remains of them is that they happened.

    Raises:
        ValueError: the data was erased, or a later release wrote it.
    """
    position, stream, version, name, schema, recorded_at, decided_at, project, device_id, actor, data = row[
        :11
    ]
    if data is None:
        if name not in REPLACEABLE:
            raise ValueError(f"the data of position {position} was erased")
        data = NO_STATE if name == REPORTED else b"{}"
    return Recorded(
        position=position,
        stream=stream,
        version=version,
        recorded_at=recorded_at,
        decided_at=recorded_at if decided_at is None else decided_at,
        project=project,
        device_id=device_id,
        actor=actor,
        event=decode(name, data, schema),
    )


class Verified(NamedTuple):
    """The result of `verify`. `rows`: the number of good rows. `hash`: the hash of the last good row.
    `fault`: a sentence about the first bad row, or None. `later`: in a copy that `ordain replay` made, the
    number of rows without data whose `erased` event comes after the end of the copy."""

    rows: int
    hash: bytes
    fault: str | None
    later: int = 0


async def sound(sql: Sql) -> str | None:
    """What is wrong with the form of the file or with its pages, as a sentence, or None."""
    old = await meta(sql, "format") == "1"
    tables = TABLES.replace(", decided_at INTEGER", "") if old else TABLES
    return await shape.fault(sql, tables) or await shape.integrity(sql)


class Walk:
    """A check of the whole hash chain, page by page. Each page may be read in its own transaction, so a
    broker can do it while it works. `rows`: the number of good rows so far; `hash`: of the last of them.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self._last = chain.BEFORE_ALL  # the last good row
        self._excused = Excused()
        self._begun = False
        self._stream = ""  # streams up to this name have all their versions

    @property
    def rows(self) -> int:
        return self._last.position

    @property
    def hash(self) -> bytes:
        return self._last.hash

    @property
    def later(self) -> int:
        """See `Verified`."""
        return self._excused.later

    async def step(self, sql: Sql, page: int) -> bool:
        """Checks the next `page` rows; after the last row, the next `page` streams. False at the end or at a
        fault. The first step checks the form of the file."""
        if not self._begun:
            self._begun = True
            self.fault = await sql.form()
            if self.fault is not None:
                return False
        batch = await rows(sql, self.rows, page)
        if any(row.data is None for row in batch):
            (await self._excused.read(sql))
        last = self._last
        for row in batch:
            may_be_empty = row.data is None and await self._excused(row)
            fault = chain.fault(row, last, may_be_empty)
            if fault is not None:
                self.fault, self._last = fault, last
                return False
            last = row
        self._last = last
        return bool(batch) or (await self._streams(sql, page))

    async def _streams(self, sql: Sql, page: int) -> bool:
        found = await sql.all(
            "SELECT stream, count(*), max(version), min(version) FROM events WHERE stream > ? "
            "GROUP BY stream ORDER BY stream LIMIT ?",
            (self._stream, page),
        )
        for stream, count, last, first in found:
            if count != last or first != 1:
                self.fault = f"stream {stream} has {count} events up to version {last}"
                return False
            self._stream = stream
        return bool(found)


async def verify(sql: Sql, progress: Callable[[int], None] = lambda _: None) -> Verified:
    """Checks the form of the file and the whole chain: positions, digests, hashes, versions, times, erasures.

    A copy that `ordain replay` made also holds the later erasures that excuse its rows without data.
    `progress` is called every 8,192 rows with the number of good rows.
    """
    walk = Walk()
    while await walk.step(sql, 8_192):
        progress(walk.rows)
    return Verified(walk.rows, walk.hash, walk.fault, walk.later)


def add_unmatched(sql: Sqlite, row: Unmatched) -> None:
    """Stores an unmatched answer. Keeps the newest: so many of each device, and so many in all."""
    entry = (row.at, row.project, row.device_id, row.reason, row.topic, row.command_id, row.payload)
    sql.execute(
        "INSERT INTO unmatched (at, project, device_id, reason, topic, command_id, payload) "
        "VALUES (?,?,?,?,?,?,?)",
        entry,
    )
    sql.execute(
        "DELETE FROM unmatched WHERE device_id IS ? AND id <= (SELECT id FROM unmatched "
        "WHERE device_id IS ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
        (row.device_id, row.device_id, row.per_device),
    )
    sql.execute("DELETE FROM unmatched WHERE id <= (SELECT max(id) FROM unmatched) - ?", (row.in_all,))
