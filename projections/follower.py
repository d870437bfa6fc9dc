"""Maintains the projections: applies a batch of events, rebuilds from the log, and compares.

All three use the same fold, so a rebuilt projection equals the maintained one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterable
from contextlib import closing
from hashlib import sha256
from itertools import islice
from typing import Any, Literal

from broker.domain.events import Defined, Recorded, Registered, subject_kind
from broker.domain.fleet import DeviceState, evolve_device
from broker.domain.lifecycle import FINAL, CommandState, evolve
from broker.log import sqlite as log
from broker.log.driven import Driven, read_now
from broker.seams import New, Newest, Put, SideRow, Sql, Sqlite
from projections import batches, commands, devices

PARTS = (commands, devices)
EARLIER = ("lanes",)  # tables that earlier releases made
PAGE = 5_000
# Digest of the tables and of the fields that they hold. If it changes, the projections are rebuilt.
SHAPE = sha256(
    repr(
        [part.TABLES for part in PARTS]
        + [kind.__struct_fields__ for kind in (CommandState, DeviceState, commands.Later)]
    ).encode()
).hexdigest()[:16]


class Fold:
    """The newest state of everything that some events changed.

    `commands`, `devices`: by id. `states`, by stream, and `rows`: what the events change in the projections,
    as a batch has it. `ended`: the streams of commands that no event will change any more.
    """

    def __init__(self) -> None:
        self.commands: dict[str, CommandState] = {}
        self.devices: dict[str, DeviceState] = {}
        self.states: dict[str, Newest] = {}
        self.rows: list[SideRow] = []
        self.ended: dict[str, None] = {}

    def fold(self, recorded: Recorded) -> None:
        """Folds one event in. The earlier state must be here, unless the event is the first of its stream."""
        kind = subject_kind(recorded.stream)
        if kind == "command":
            state = self.commands.get(recorded.stream)
            self.commands[recorded.stream] = now = evolve(state, recorded)
            self._put(now, recorded)
            if now.state in FINAL:
                self.ended[recorded.stream] = None
        elif kind == "device":
            device_id = recorded.device_id or ""
            self.devices[device_id] = device = evolve_device(self.devices.get(device_id), recorded)
            self._put(device, recorded)
            if isinstance(recorded.event, Registered):
                for name in dict.fromkeys((device_id, recorded.event.hardware_id)):
                    self.rows.append(New("names", (name, device_id)))
        elif isinstance(recorded.event, Defined):
            digest = recorded.stream.removeprefix("type/")
            self.rows.append(devices.defined(digest, recorded.event.definition))

    def _put(self, state: CommandState | DeviceState, recorded: Recorded) -> None:
        at = recorded.position
        newest = self.states.get(recorded.stream)
        if newest is None:
            newest = self.states[recorded.stream] = Newest(state, at, at, recorded.version - 1)
        newest.state, newest.last = state, at

    def take(self, streams: Iterable[str]) -> Fold:
        """Moves what changed in these streams, and all rows, into a fold of its own."""
        taken = Fold()
        for stream in streams:
            taken.states[stream] = self.states.pop(stream)
            self.commands.pop(stream, None)
        taken.rows, self.rows = self.rows, []
        return taken


def open_log(sql: Sqlite, log_id: str, cursor_key: str) -> None:
    """Creates the tables of the log and the projections, as far as they are missing.

    Raises:
        UnknownFormat: the file has rows, views or triggers that no release writes.
    """
    log.create(sql, log_id, cursor_key)
    prepare(sql)


def prepare(sql: Sqlite) -> None:
    """Creates the projections if there are none. Rebuilds them if another release made them differently."""
    if not read_now(sql, is_current):
        renew(sql)


async def is_current(sql: Sql) -> bool:
    """Do the projections have the tables and fields of this release?"""
    kept = await sql.one("SELECT value FROM meta WHERE key = 'projections'")
    return kept is not None and kept[0] == SHAPE


def renew(sql: Sqlite) -> None:
    """Rebuilds all projections, and stores the digest `SHAPE` of this release."""
    log.upgrade(sql)
    rebuild(sql)
    batches.put(sql, Put("meta", ("projections", SHAPE)), 0)


def create(sql: Sqlite, what: Literal["", "TABLE"] = "") -> None:
    """Creates the tables and indices that are missing, or the tables alone."""
    for part in PARTS:
        for statement in part.TABLES:
            if statement.startswith(f"CREATE {what}"):
                sql.execute(statement)


def write(sql: Sqlite, fold: Fold) -> None:
    """Writes what a fold changed to the projections, in the caller's transaction."""
    batches.put_states(sql, fold.states.values(), 0)  # the indices of a fold are positions
    for row in fold.rows:
        batches.put(sql, row, 0)


def rebuild(sql: Sqlite) -> None:
    """Drops every projection and rebuilds it from the log, in the caller's transaction."""
    for table in (*EARLIER, *(table for part in PARTS for table in part.KEYS)):
        sql.execute(f"DROP TABLE IF EXISTS {table}")
    # Before the rows: SQLite builds an index of many rows in a temporary file, which may find no space.
    create(sql)
    read_now(sql, replay, sql)


async def replay(source: Sql, target: Sqlite, progress: Callable[[int], None] = lambda _: None) -> None:
    """Builds the projections in `target` from the log in `source`; both may be the same database. Indices
    that are missing stay so."""

    async def put(fold: Fold) -> None:
        write(target, fold)

    create(target, "TABLE")
    await folded(source, put, progress)


async def folded(
    source: Sql, put: Callable[[Fold], Awaitable[None]], progress: Callable[[int], None] = lambda _: None
) -> None:
    """Folds a whole log, page by page, and gives what cannot change any more to `put`; at the end the rest.

    Devices, and commands that can still change, stay in memory. `progress` is called with the position after
    each page.
    """
    fold, after = Fold(), 0
    query = f"SELECT {log.OF_EVENT} FROM events WHERE position > ? ORDER BY position LIMIT ?"
    while page := await source.all(query, (after, PAGE)):
        after = page[-1][0]
        for row in page:
            if row[-1] is not None or subject_kind(row[1]) != "command":
                fold.fold(log.recorded(row))  # erased commands have no row in any projection
        ended, fold.ended = fold.ended, {}
        await put(fold.take(ended))
        progress(after)
    while fold.states:
        await put(fold.take(list(islice(fold.states, PAGE))))


class _Comparison:
    """Compares each row of a command as soon as it is folded, so that nothing has a copy of all of them. All
    other rows go to `made`."""

    def __init__(self, kept: Sql, made: Sqlite) -> None:
        self._kept, self._made = kept, made
        self._rows = 0
        self.fault: str | None = None

    async def put(self, fold: Fold) -> None:
        if self.fault is not None:
            return
        rows, others = [], {}
        for stream, each in fold.states.items():
            if not isinstance(each.state, CommandState):
                others[stream] = each
                continue
            rows.append(commands.added(each.state, each.first, each.last))
        rows.sort()
        self._rows += len(rows)
        found = await commands.at(self._kept, [row[0] for row in rows])
        if found != rows:
            there = {row[0]: row for row in found}
            row = next(row for row in rows if there.get(row[0]) != row)
            columns = commands.FIELDS.split(", ")
            self.fault = _difference("commands", columns, ["position"], there.get(row[0]), row)
        fold.states = others
        write(self._made, fold)

    async def end(self) -> str | None:
        """The first difference, as a sentence; None if there is none."""
        fault = self.fault or (await commands.stray(self._kept, self._rows))
        return fault or (await difference(self._kept, Driven(self._made), (devices,)))


async def difference(kept: Sql, made: Sql, parts: Iterable[Any] = PARTS) -> str | None:
    """The first row that differs between the projections of two databases, as a sentence; None if none does.

    `kept`: the maintained projections. `made`: the rebuilt ones.
    """
    for part in parts:
        for table, key in part.KEYS.items():
            columns = [row[1] for row in (await made.all(f"PRAGMA table_info({table})"))]
            query = f"SELECT {', '.join(columns)} FROM {table} ORDER BY {key}"
            left, right = kept.each(query), made.each(query)
            while (one := await anext(left, None)) == (other := await anext(right, None)):
                if one is None:
                    break
            else:
                return _difference(table, columns, key.split(", "), one, other)
    return None


def _difference(table: str, columns: list[str], key: list[str], kept: Any, made: Any) -> str:
    places = [columns.index(name) for name in key]

    def named(row: Any) -> str:
        return f"{table}, the row of " + ", ".join(f"{columns[place]} {row[place]!r}" for place in places)

    def order(row: Any) -> list[Any]:
        return [row[place] for place in places]

    if kept is None or (made is not None and order(made) < order(kept)):
        return f"{named(made)} is missing"
    if made is None or order(kept) < order(made):
        return f"{named(kept)} does not follow from the log"
    wrong = next(name for name, left, right in zip(columns, kept, made, strict=True) if left != right)
    return f"{named(kept)}: {wrong} does not follow from the log"


async def dump(sql: Sql) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of all projections, by module name; used to compare."""
    return {part.__name__: (await part.dump(sql)) for part in PARTS}


async def fault(kept: Sql, progress: Callable[[int], None]) -> str | None:
    """The first difference between the projections and the log, as a sentence; None if there is none."""
    if not await is_current(kept):
        return "another release made the projections; the next start of the broker rebuilds them"
    # The empty name makes a temporary database: SQLite keeps it in memory and moves it to disk if it grows.
    with closing(sqlite3.connect("")) as made:
        create(made, "TABLE")
        comparison = _Comparison(kept, made)
        try:
            await folded(kept, comparison.put, progress)
        except ValueError as error:
            return f"{error}; see ordain log verify"
        return await comparison.end()
