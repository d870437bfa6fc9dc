"""Keeps the projections in step with the log: applies a batch, rebuilds from the first row, compares.

The same fold serves all three, so a projection that was rebuilt equals the one that was kept up.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import msgspec

from broker.events import Defined, Recorded, Registered, subject_kind
from broker.fleet import DeviceState, evolve_device
from broker.lifecycle import FINAL, CommandState, evolve
from broker.log import sqlite as log
from broker.seams import Sql
from projections import commands, devices, lanes

PARTS = (commands, lanes, devices)
PAGE = 5_000
# What the projections are made of. When a release changes it, they are made anew from the log.
SHAPE = sha256(
    repr(
        [part.TABLES for part in PARTS]
        + [[field.name for field in msgspec.structs.fields(kind)] for kind in (CommandState, DeviceState)]
    ).encode()
).hexdigest()[:16]


class Touched(msgspec.Struct, kw_only=True):
    """The latest state of everything that a run of events changed."""

    commands: dict[str, CommandState] = {}
    opened: set[str] = set()
    devices: dict[str, DeviceState] = {}
    names: dict[str, str] = {}
    definitions: dict[str, dict[str, Any]] = {}

    def put(self, state: CommandState) -> None:
        """The new state of a command; notes that it was created or came back."""
        self.commands[state.id] = state
        if state.version == 1 or state.reopened:
            self.opened.add(state.id)

    def fold(self, recorded: Recorded) -> None:
        """Takes in one event; the states before it must be here, unless it is the first of its stream."""
        kind = subject_kind(recorded.stream)
        if kind == "command":
            self.put(evolve(self.commands.get(recorded.stream), recorded))
        elif kind == "device":
            device_id = recorded.device_id or ""
            self.devices[device_id] = evolve_device(self.devices.get(device_id), recorded)
            if isinstance(recorded.event, Registered):
                self.names |= {device_id: device_id, recorded.event.hardware_id: device_id}
        elif isinstance(recorded.event, Defined):
            self.definitions[recorded.stream.removeprefix("type/")] = recorded.event.definition


def prepare(sql: Sql) -> None:
    """Makes the projections that are missing; makes all anew if another release made them otherwise."""
    kept = sql.execute("SELECT value FROM meta WHERE key = 'projections'").fetchone()
    if kept is None or kept[0] != SHAPE:
        rebuild(sql)
        sql.execute("INSERT OR REPLACE INTO meta VALUES ('projections', ?)", (SHAPE,))
    create(sql)


def create(sql: Sql) -> None:
    for part in PARTS:
        for statement in part.TABLES:
            sql.execute(statement)


def write(sql: Sql, touched: Touched) -> None:
    """Brings the projections up to what was touched, in the caller's transaction."""
    if touched.commands:
        commands.write(sql, touched.commands.values(), touched.opened)
        lanes.apply(sql, touched.commands.values(), touched.opened)
    if touched.devices:
        devices.upsert(sql, touched.devices.values())
        devices.name(sql, touched.names.items())
    if touched.definitions:
        devices.define(sql, touched.definitions.items())


def rebuild(sql: Sql) -> None:
    """Drops every projection and makes it anew from the log, in the caller's transaction.

    Page by page: what can still change stays in memory, what is final is written and forgotten.
    """
    for part in PARTS:
        for table in part.KEYS:
            sql.execute(f"DROP TABLE IF EXISTS {table}")
    create(sql)
    touched = Touched()
    after = 0
    while page := log.rows(sql, after, PAGE):
        after = page[-1].position
        for row in page:
            if row.data is not None or subject_kind(row.stream) != "command":
                touched.fold(log.recorded(row))  # an erased command is no row of any projection
        write(sql, touched)
        alive = {key: state for key, state in touched.commands.items() if state.state not in FINAL}
        touched = Touched(commands=alive, devices=touched.devices)


def dump(sql: Sql) -> dict[str, list[tuple[Any, ...]]]:
    """All projections, for comparing."""
    return {part.__name__: part.dump(sql) for part in PARTS}
