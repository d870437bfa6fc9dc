"""Lets a test look into the tables of SQLite with an ordinary function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from broker.log.driven import Driven
from broker.seams import Sql, Sqlite, Storage

R = TypeVar("R")


def plain(work: Callable[[Sqlite], R]) -> Callable[[Sql], Awaitable[R]]:
    """The function as a read of the storage: it gets the connection itself."""

    async def read(sql: Sql) -> R:
        return work(cast(Sqlite, cast(Driven, sql).connection))

    return read


async def tamper(storage: Storage, work: Callable[[Sqlite], R]) -> R:
    """Runs a function in a writing transaction of the storage, past the broker."""
    return cast(R, await cast(Any, storage).write(work))
