"""The current state of every command, one row each, and the questions asked of it.

A row is written in the transaction of the events that changed it, from the folded state; folding
the log again gives the same rows. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import msgspec

from broker.lifecycle import CommandState, State
from broker.seams import Sql

TABLES = (
    """CREATE TABLE IF NOT EXISTS commands (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, project TEXT NOT NULL, device_id TEXT NOT NULL,
        type TEXT NOT NULL, state TEXT NOT NULL, closed_at INTEGER, body BLOB NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS commands_device ON commands (device_id, position)",
    "CREATE INDEX IF NOT EXISTS commands_project ON commands (project, position)",
    "CREATE INDEX IF NOT EXISTS commands_late ON commands (closed_at) WHERE state = 'timed_out'",
)
NAMES = ("commands",)
UPSERT = """INSERT INTO commands (position, id, project, device_id, type, state, closed_at, body)
    VALUES (?,?,?,?,?,?,?,?)
    ON CONFLICT (position) DO UPDATE
    SET state = excluded.state, closed_at = excluded.closed_at, body = excluded.body"""
UPDATE = "UPDATE commands SET state = ?, closed_at = ?, body = ? WHERE position = ?"

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(CommandState).decode


def write(sql: Sql, states: Iterable[CommandState], opened: Container[str]) -> None:
    """Writes the latest state of each command touched; rows of those that were `opened` may be new."""
    new: list[tuple[Any, ...]] = []
    known: list[tuple[Any, ...]] = []
    for s in states:
        body = _encode(s)
        if s.id in opened:
            new.append((s.position, s.id, s.project, s.device_id, s.type, s.state.value, s.closed_at, body))
        else:
            known.append((s.state.value, s.closed_at, body, s.position))
    if new:
        sql.executemany(UPSERT, new)
    if known:
        sql.executemany(UPDATE, known)


def get(sql: Sql, command_id: str) -> CommandState | None:
    row = sql.execute("SELECT body FROM commands WHERE id = ?", (command_id,)).fetchone()
    return _decode(row[0]) if row else None


def get_many(sql: Sql, command_ids: Iterable[str]) -> dict[str, CommandState]:
    """Those of the commands that exist, by id."""
    found = {}
    for command_id in command_ids:
        if (state := get(sql, command_id)) is not None:
            found[command_id] = state
    return found


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """None means any. `before`: only commands created before this position (the cursor)."""

    project: str | None = None
    device_id: str | None = None
    type: str | None = None
    states: tuple[State, ...] | None = None
    before: int | None = None


def newest(sql: Sql, wanted: Filter, limit: int, offset: int = 0) -> list[CommandState]:
    """Newest first, by position of creation, so that a page stays where it is while others arrive."""
    where, values = ["1"], []
    for column, value in (
        ("project", wanted.project),
        ("device_id", wanted.device_id),
        ("type", wanted.type),
    ):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if wanted.states is not None:
        where.append(f"state IN ({','.join('?' * len(wanted.states))})")
        values += [state.value for state in wanted.states]
    bounds: list[Any] = []
    if wanted.before is not None:
        where.append("position < ?")
        bounds.append(wanted.before)
    found = sql.execute(
        f"SELECT body FROM commands WHERE {' AND '.join(where)} ORDER BY position DESC LIMIT ? OFFSET ?",
        (*values, *bounds, limit, offset),
    )
    return [_decode(row[0]) for row in found.fetchall()]


def timed_out_since(sql: Sql, at: int) -> list[CommandState]:
    """Commands that timed out at or after a time (ms), oldest first: a late answer may still come."""
    found = sql.execute(
        "SELECT body FROM commands WHERE state = 'timed_out' AND closed_at >= ? ORDER BY closed_at", (at,)
    )
    return [_decode(row[0]) for row in found.fetchall()]


def dump(sql: Sql) -> list[tuple[Any, ...]]:
    """Every row, for comparing a rebuilt projection with the one kept up."""
    found = sql.execute("SELECT * FROM commands ORDER BY position")
    return [tuple(row) for row in found.fetchall()]
