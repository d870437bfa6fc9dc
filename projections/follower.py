"""Maintains the projections: applies a batch of events, rebuilds from the log, and compares.

All three use the same fold, so a rebuilt projection equals the maintained one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from typing import Any

import msgspec

from broker.domain.events import Defined, Recorded, Registered, subject_kind
from broker.domain.fleet import DeviceState, evolve_device
from broker.domain.lifecycle import FINAL, CommandState, evolve
from broker.log import sqlite as log
from broker.seams import Sql
from projections import commands, devices, lanes

PARTS = (commands, lanes, devices)
PAGE = 5_000
# Digest of the tables and of the fields of their states. If it changes, the projections are rebuilt.
SHAPE = sha256(
    repr(
        [part.TABLES for part in PARTS]
        + [[field.name for field in msgspec.structs.fields(kind)] for kind in (CommandState, DeviceState)]
    ).encode()
).hexdigest()[:16]


class Touched(msgspec.Struct, kw_only=True):
    """The latest state of everything that some events changed.

    `before`, `devices_before`: the states before those events. `opened`: commands that were created or
    reopened.
    """

    before: dict[str, CommandState] = {}
    devices_before: dict[str, DeviceState] = {}
    commands: dict[str, CommandState] = {}
    opened: set[str] = set()
    devices: dict[str, DeviceState] = {}
    names: dict[str, str] = {}
    definitions: dict[str, dict[str, Any]] = {}

    def put(self, state: CommandState) -> None:
        """Stores the new state of a command, and notes whether it was created or reopened."""
        self.commands[state.id] = state
        if state.version == 1 or state.reopened:
            self.opened.add(state.id)

    def fold(self, recorded: Recorded) -> None:
        """Folds one event in. The earlier state must be here, unless the event is the first of its stream."""
        kind = subject_kind(recorded.stream)
        if kind == "command":
            state = self.commands.get(recorded.stream) or self.before.get(recorded.stream)
            self.put(evolve(state, recorded))
        elif kind == "device":
            device_id = recorded.device_id or ""
            device = self.devices.get(device_id) or self.devices_before.get(device_id)
            self.devices[device_id] = evolve_device(device, recorded)
            if isinstance(recorded.event, Registered):
                self.names |= {device_id: device_id, recorded.event.hardware_id: device_id}
        elif isinstance(recorded.event, Defined):
            self.definitions[recorded.stream.removeprefix("type/")] = recorded.event.definition


def prepare(sql: Sql) -> None:
    """Creates the projections if there are none. Rebuilds them if another release made them differently."""
    if not is_current(sql):
        renew(sql)


def is_current(sql: Sql) -> bool:
    """Do the projections have the tables and fields of this release?"""
    kept = sql.execute("SELECT value FROM meta WHERE key = 'projections'").fetchone()
    return kept is not None and kept[0] == SHAPE


def renew(sql: Sql) -> None:
    """Rebuilds all projections, and stores the digest `SHAPE` of this release."""
    rebuild(sql)
    sql.execute("INSERT OR REPLACE INTO meta VALUES ('projections', ?)", (SHAPE,))


def create(sql: Sql) -> None:
    for part in PARTS:
        for statement in part.TABLES:
            sql.execute(statement)


def write(sql: Sql, touched: Touched) -> None:
    """Writes the touched states to the projections, in the caller's transaction."""
    if touched.commands:
        commands.write(sql, touched.commands.values(), touched.opened)
        lanes.apply(sql, touched.commands.values(), touched.opened)
    if touched.devices:
        devices.upsert(sql, touched.devices.values())
        devices.name(sql, touched.names.items())
    if touched.definitions:
        devices.define(sql, touched.definitions.items())


def rebuild(sql: Sql) -> None:
    """Drops every projection and rebuilds it from the log, in the caller's transaction."""
    for part in PARTS:
        for table in part.KEYS:
            sql.execute(f"DROP TABLE IF EXISTS {table}")
    replay(sql, sql)


def replay(source: Sql, target: Sql, progress: Callable[[int], None] = lambda _: None) -> None:
    """Builds the projections in `target` from the log in `source`; both may be the same database.

    Works page by page. Commands that can still change stay in memory; final ones are written and dropped.
    `progress` is called with the position after each page.
    """
    create(target)
    alive: dict[str, CommandState] = {}
    known: dict[str, DeviceState] = {}
    after = 0
    while page := log.rows(source, after, PAGE):
        after = page[-1].position
        touched = Touched(before=alive, devices_before=known)
        for row in page:
            if row.data is not None or subject_kind(row.stream) != "command":
                touched.fold(log.recorded(row))  # erased commands have no row in any projection
        write(target, touched)
        known |= touched.devices
        alive |= touched.commands
        for state in touched.commands.values():
            if state.state in FINAL:
                del alive[state.id]
        progress(after)


def difference(kept: Sql, made: Sql) -> str | None:
    """The first row that differs between the projections of two databases, as a sentence; None if none does.

    `kept`: the maintained projections. `made`: the rebuilt ones.
    """
    for part in PARTS:
        for table, key in part.KEYS.items():
            columns = [row[1] for row in made.execute(f"PRAGMA table_info({table})").fetchall()]
            query = f"SELECT {', '.join(columns)} FROM {table} ORDER BY {key}"
            left, right = kept.execute(query), made.execute(query)
            while (one := left.fetchone()) == (other := right.fetchone()):
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


def dump(sql: Sql) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of all projections, by module name; used to compare."""
    return {part.__name__: part.dump(sql) for part in PARTS}


def fault(kept: sqlite3.Connection, progress: Callable[[int], None]) -> str | None:
    """The first difference between the projections and the log, as a sentence; None if there is none.

    Call it inside one read transaction.
    """
    if not is_current(kept):
        return "another release made the projections; the next start of the broker rebuilds them"
    # The empty name makes a temporary database: SQLite keeps it in memory and moves it to disk if it grows.
    with closing(sqlite3.connect("")) as made:
        try:
            replay(kept, made, progress)
        except ValueError as error:
            return f"{error}; see ordain log verify"
        return difference(kept, made)
