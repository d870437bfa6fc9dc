"""Reading a log on PostgreSQL: each read sees one snapshot, on a connection of a small pool."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import structlog

from broker.log.postgresql.connection import (
    FAILURES,
    Connect,
    Connection,
    end,
    goodbye,
    passes,
    translated,
)
from broker.log.postgresql.form import fault
from broker.log_url import Address
from broker.seams import Unknown, patience

T = TypeVar("T")

logger = structlog.get_logger()

CONNECTIONS = 8
AGAIN_SEC = 0.5
PAGE = 1_000
HINT = re.compile(r" INDEXED BY \w+")
FIELD = re.compile(r"json_extract\(CAST\((\w+) AS TEXT\), '\$\.(\w+)'\)")
BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


@lru_cache(2_000)
def translation(text: str) -> str:
    """A text of the common subset as PostgreSQL takes it: `$1` for `?`, JOIN for CROSS JOIN … ON, no hint
    about an index, and its own way into a JSON object."""
    text = FIELD.sub(r"(convert_from(\1, 'UTF8')::jsonb ->> '\2')", HINT.sub("", text))
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
        cursor = await self._connection.cursor(translation(text), *values)
        while page := await cursor.fetch(PAGE):
            for row in page:
                yield row

    async def form(self) -> str | None:
        return await fault(self._connection)


class Readers:
    """At most `CONNECTIONS` reads at once; the next ones wait."""

    def __init__(self, where: Address, connect: Connect) -> None:
        self._where, self._connect = where, connect
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._busy: set[Connection] = set()

    async def read(self, work: Callable[[Snapshot], Awaitable[T]]) -> T:
        """Runs `work` in a read-only transaction. While the server is away it tries again, as long as the
        `patience` of this task lasts.

        Raises:
            Unknown: the server cannot be reached, the connection was lost, or it refuses what `work` asks.
        """
        loop, bound = asyncio.get_running_loop(), patience.get()
        until = None if bound is None else loop.time() + bound
        while True:
            try:
                return await self._read(work)
            except Unknown as error:
                if not passes(error.__cause__) or (until is not None and loop.time() >= until):
                    raise
                logger.warning("log.read_waits", error=str(error))
            await asyncio.sleep(AGAIN_SEC)

    async def _read(self, work: Callable[[Snapshot], Awaitable[T]]) -> T:
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
        connection = await self._connect(self._where)
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
