"""The SQL for the rows of a batch (`seams.SideRow`): one text for every storage."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from broker.seams import At, Change, Drop, New, Put, SideRow, Unmatched, Value

# Table -> its columns; those of the primary key come first, before the bar.
SIDE = {
    "meta": "key | value",
    "idempotency": "project key scope | digest command_id created_at",
    "api_keys": "id | digest project scopes name created_at revoked_at",
    "key_terms": "id | terms pepper last_used_at",
    "grant_keys": "kid | private created_at retired_at",
    "device_secrets": "device_id | secret",
    "webhooks": "id | endpoint progress",
    "purges": "position | cutoff bound at",
    "names": "name | device_id",
    "definitions": "digest | body",
}
LONGEST = 2**63


def columns(table: str) -> tuple[list[str], list[str]]:
    """The columns of a table's primary key, and its other columns."""
    key, _, others = SIDE[table].partition("|")
    return key.split(), others.split()


def check(row: SideRow) -> None:
    """Checks that every storage can store the values of a row.

    Raises:
        ValueError: a text has a NUL or is not Unicode, a number has more than 64 bits, or a value has a type
            that no column has.
    """
    match row:
        case New(values=values) | Put(values=values):
            pass
        case Change():
            values = (*row.key, *row.columns.values())
        case Drop():
            values = row.key
        case Unmatched():
            values = (row.at, row.project, row.device_id, row.reason, row.topic, row.command_id, row.payload)
        case _:
            return
    for value in values:
        _check(value)


def _check(value: object) -> None:
    match value:
        case None | bytes() | At():
            return
        case str():
            value.encode()
            if "\0" in value:
                raise ValueError(f"a text must not have a NUL: {value[:64]!r}")
        case int():
            if not -LONGEST <= value < LONGEST:
                raise ValueError(f"{value} has more than 64 bits")
        case _:
            raise ValueError(f"{type(value).__name__} is no type of a column")


def statement(row: New | Put | Change | Drop, first: int) -> tuple[str, tuple[Any, ...]]:
    """The statement that carries out a row, with its values. `first`: the position of the batch's first
    event."""
    match row:
        case New():
            return insert(row.table), _placed(row.values, first)
        case Put():
            return upsert(row.table, row.only), _placed(row.values, first)
        case Change():
            return update(row.table, tuple(row.columns)), _placed((*row.columns.values(), *row.key), first)
        case Drop():
            return delete(row.table), _placed(row.key, first)


def _placed(values: tuple[Value, ...], first: int) -> tuple[Any, ...]:
    return tuple([first + value.index if type(value) is At else value for value in values])


@lru_cache(64)
def insert(table: str) -> str:
    key, others = columns(table)
    names = key + others
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


@lru_cache(64)
def upsert(table: str, only: tuple[str, ...] = ()) -> str:
    key, others = columns(table)
    changed = ", ".join(f"{name} = excluded.{name}" for name in only or others)
    return f"{insert(table)} ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changed}"


@lru_cache(64)
def update(table: str, names: tuple[str, ...]) -> str:
    changed = ", ".join(f"{name} = ?" for name in names)
    return f"UPDATE {table} SET {changed} WHERE {_where(table)}"


@lru_cache(64)
def delete(table: str) -> str:
    return f"DELETE FROM {table} WHERE {_where(table)}"


def _where(table: str) -> str:
    return " AND ".join(f"{name} = ?" for name in columns(table)[0])
