"""The rows of a batch (`seams.SideRow`) as statements that the function `append` runs, each on a JSON value.

Rows of the same kind that follow each other become one statement, so that a fan-out's 500 idempotency keys
cost one. A key that comes twice starts a new statement: the later row must win.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from broker.log.rows import columns
from broker.seams import At, Change, Drop, Erase, EraseEvents, New, Purge, Put, SideRow, Unmatched, Value

_json = msgspec.json.Encoder().encode

ERASE = (
    "UPDATE events SET data = NULL, salt = NULL WHERE stream IN (SELECT jsonb_array_elements_text($1))",
    "DELETE FROM commands c USING events i WHERE c.position = i.position AND i.version = 1 "
    "AND i.stream IN (SELECT jsonb_array_elements_text($1))",
    "DELETE FROM unmatched WHERE command_id IN (SELECT jsonb_array_elements_text($1))",
)
ERASE_EVENTS = (
    "UPDATE events SET data = NULL, salt = NULL "
    "WHERE position IN (SELECT e::bigint FROM jsonb_array_elements($1) l, jsonb_array_elements_text(l) e)"
)
PURGE = (
    "SELECT begin_purge($2 + (p->>'position')::bigint, (p->>'cutoff')::bigint, (p->>'at')::bigint) "
    "FROM jsonb_array_elements($1) p"
)
UNMATCHED = (
    "INSERT INTO unmatched (at, project, device_id, reason, topic, command_id, payload) "
    "SELECT u.at, u.project, u.device_id, u.reason, u.topic, u.command_id, u.payload "
    "FROM jsonb_array_elements($1) WITH ORDINALITY AS e(value, place), "
    "jsonb_populate_record(NULL::unmatched, e.value) u ORDER BY e.place",
    "SELECT keep_unmatched(d.device, d.most) FROM (SELECT e.value->>'device_id' AS device, "
    "min((e.value->>'per_device')::bigint) AS most FROM jsonb_array_elements($1) e GROUP BY 1) d",
    "DELETE FROM unmatched WHERE id <= (SELECT max(id) FROM unmatched) - ($1->-1->>'in_all')::bigint",
)


class _Kind(NamedTuple):
    """What the rows of one statement have in common. `at`: the columns that hold positions of this batch."""

    what: type[SideRow]
    table: str = ""
    names: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    turn: int = 0


def statements(rows: Iterable[SideRow]) -> tuple[list[str], list[str]]:
    """The texts, and the JSON of each. In a text, $1 is the JSON and $2 the position of the first event."""
    texts: list[str] = []
    payloads: list[str] = []
    for kind, group in groupby(_sorted_out(rows), key=lambda each: each[0]):
        payload = _json([value for _, value in group]).decode()
        for text in _texts(kind):
            texts.append(text)
            payloads.append(payload)
    return texts, payloads


def _sorted_out(rows: Iterable[SideRow]) -> Iterator[tuple[_Kind, Any]]:
    """Each row's kind and its JSON value. `turn` rises when a key comes again."""
    seen: set[tuple[str, tuple[Value, ...]]] = set()
    turn = 0
    for row in rows:
        kind, value, key = _row(row)
        if key is not None and (kind.table, key) in seen:
            turn += 1
            seen.clear()
        if key is not None:
            seen.add((kind.table, key))
        yield kind._replace(turn=turn), value


def _row(row: SideRow) -> tuple[_Kind, Any, tuple[Value, ...] | None]:
    match row:
        case New(table, values):
            key, others = columns(table)
            return _kind(New, table, (*key, *others), values), _object((*key, *others), values), None
        case Put(table, values, only):
            key, others = columns(table)
            names = (*key, *others)
            kind = _kind(Put, table, names, values)._replace(only=only or tuple(others))
            return kind, _object(names, values), values[: len(key)]
        case Change(table, key_values, changed):
            key, _ = columns(table)
            names, values = tuple(changed), tuple(changed.values())
            value = _object((*key, *names), (*key_values, *values))
            return _kind(Change, table, names, values), value, key_values
        case Drop(table, key_values):
            key, _ = columns(table)
            return _kind(Drop, table, tuple(key), key_values), _object(tuple(key), key_values), key_values
        case Erase(stream):
            return _Kind(Erase), stream, None
        case EraseEvents(positions):
            return _Kind(EraseEvents), positions, None
        case Purge(position, cutoff, at):
            return _Kind(Purge), {"position": position.index, "cutoff": cutoff, "at": at}, None
        case Unmatched():
            names = row.__struct_fields__
            values = tuple(getattr(row, name) for name in names)
            return _Kind(Unmatched), _object(names, values), None


def _kind(what: type[SideRow], table: str, names: tuple[str, ...], values: tuple[Value, ...]) -> _Kind:
    at = tuple(name for name, value in zip(names, values, strict=True) if isinstance(value, At))
    return _Kind(what, table, names, at)


def _object(names: tuple[str, ...], values: tuple[Value, ...]) -> dict[str, object]:
    return {name: _plain(value) for name, value in zip(names, values, strict=True)}


def _plain(value: Value) -> object:
    match value:
        case bytes():
            return f"\\x{value.hex()}"
        case At(index):
            return index
        case _:
            return value


def _texts(kind: _Kind) -> tuple[str, ...]:
    if kind.what is Erase:
        return ERASE
    if kind.what is EraseEvents:
        return (ERASE_EVENTS,)
    if kind.what is Purge:
        return (PURGE,)
    if kind.what is Unmatched:
        return UNMATCHED
    key, _ = columns(kind.table)
    given = f"jsonb_populate_recordset(NULL::{kind.table}, $1) r"
    found = " AND ".join(f"t.{name} = r.{name}" for name in key)
    placed = {name: f"r.{name} + $2" if name in kind.at else f"r.{name}" for name in kind.names}
    if kind.what is Drop:
        return (f"DELETE FROM {kind.table} t USING {given} WHERE {found}",)
    if kind.what is Change:
        changed = ", ".join(f"{name} = {value}" for name, value in placed.items())
        return (f"UPDATE {kind.table} t SET {changed} FROM {given} WHERE {found}",)
    text = (
        f"INSERT INTO {kind.table} ({', '.join(kind.names)}) SELECT {', '.join(placed.values())} FROM {given}"
    )
    if kind.what is Put:
        changed = ", ".join(f"{name} = excluded.{name}" for name in kind.only)
        text += f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changed}"
    return (text,)
