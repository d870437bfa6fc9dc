"""Reading a log on PostgreSQL: each read sees one snapshot, on a connection of a small pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from broker.log.postgresql.connection import (
    FAILURES,
    Connection,
    connect,
    end,
    goodbye,
    translated,
)
from broker.log_url import Address

T = TypeVar("T")

CONNECTIONS = 8
BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


@lru_cache(2_000)
def translation(text: str) -> str:
    """A text of the common subset as PostgreSQL takes it: `$1` for `?`, and JOIN for CROSS JOIN … ON."""
    pieces = text.replace("CROSS JOIN", "JOIN").split("?")
    return pieces[0] + "".join(f"${number}{piece}" for number, piece in enumerate(pieces[1:], 1))


class Snapshot:
    """`seams.Sql` over one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def all(self, text: str, values: Sequence[Any] = (), /) -> list[Any]:
        return await self._connection.fetch(translation(text), *values)

    async def one(self, text: str, values: Sequence[Any] = (), /) -> Any | None:
        return await self._connection.fetchrow(translation(text), *values)

    async def each(self, text: str, values: Sequence[Any] = (), /) -> AsyncIterator[Any]:
        async for row in self._connection.cursor(translation(text), *values, prefetch=1_000):
            yield row


class Readers:
    """At most `CONNECTIONS` reads at once; the next ones wait."""

    def __init__(self, where: Address) -> None:
        self._where = where
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._busy: set[Connection] = set()

    async def read(self, work: Callable[[Snapshot], Awaitable[T]]) -> T:
        """Runs `work` in a read-only transaction.

        Raises:
            Unknown: the server cannot be reached, or the connection was lost.
        """
        async with self._free:
            connection = await self._begun()
            self._busy.add(connection)
            try:
                value = await work(Snapshot(connection))
                await connection.execute("COMMIT")
            except FAILURES as error:
                end(connection)
                raise translated(error) from error
            except Exception:  # of `work`
                await self._undo(connection)
                raise
            except BaseException:  # cancelled, maybe in the middle of a query
                end(connection)
                raise
            finally:
                self._busy.discard(connection)
                if not connection.is_closed():
                    self._idle.append(connection)
            return value

    async def _begun(self) -> Connection:
        """A connection in a new transaction. One that the server closed while it was idle is replaced."""
        while self._idle:
            connection = self._idle.pop()
            try:
                await connection.execute(BEGIN)
            except FAILURES:
                end(connection)
            else:
                return connection
        connection = await connect(self._where)
        try:
            await connection.execute(BEGIN)
        except FAILURES as error:
            end(connection)
            raise translated(error) from error
        return connection

    async def _undo(self, connection: Connection) -> None:
        try:
            await connection.execute("ROLLBACK")
        except FAILURES:
            end(connection)

    async def close(self) -> None:
        for connection in self._busy:
            end(connection)
        for connection in self._idle:
            await goodbye(connection)
        self._idle.clear()
