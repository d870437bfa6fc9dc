"""A connection of a process to the simulated database, with the calls of asyncpg that the log uses.

A request is carried out when it arrives, whether or not its sender still lives. Its answer may be lost.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from asyncpg import exceptions as pg

from broker.log_url import Address
from broker.seams import Unknown
from tests.simulation.nodes.net import DATABASE, Way

if TYPE_CHECKING:
    import sqlite3

    from tests.simulation.nodes.database import SimDatabase

Answer = list[Any] | Exception
CONNECT_SEC = 5.0
LOCKING = ("SELECT * FROM append", "SELECT * FROM landed")


class Request:
    """One statement on its way. `locks`: it takes the lock of appends."""

    def __init__(self, connection: SimConnection, text: str, values: tuple[Any, ...]) -> None:
        self.connection, self.text, self.values = connection, text, values
        self.locks = text.startswith(LOCKING)
        self._answer: asyncio.Future[list[Any]] = connection.database.loop.create_future()

    def reply(self, answer: Answer, *, warning: bool = False) -> None:
        database = self.connection.database
        if self.locks and database.random.random() < database.lose_replies:
            self.connection.lose()
            return
        if warning:
            self.connection.arrive(self.connection.warn)
        self.connection.arrive(lambda: self.settle(answer))

    def settle(self, answer: Answer) -> None:
        if self._answer.done():
            return
        if isinstance(answer, Exception):
            self._answer.set_exception(answer)
        else:
            self._answer.set_result(answer)

    async def answered(self) -> list[Any]:
        return await self._answer


class Warned:
    """The server's message when a commit no longer waits for the standby."""

    severity = severity_en = "WARNING"

    def __str__(self) -> str:
        return "canceling wait for synchronous replication"


class Cursor:
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    async def fetch(self, count: int) -> list[Any]:
        page, self._rows = self._rows[:count], self._rows[count:]
        return page


class SimConnection:
    """`machine`: where the process `incarnation` runs. `reading`: the snapshot of its transaction. `served`:
    the server has not ended it."""

    def __init__(self, database: SimDatabase, machine: str, incarnation: str) -> None:
        self.database, self.machine, self.incarnation = database, machine, incarnation
        self.listeners: dict[str, list[Callable[..., object]]] = defaultdict(list)
        self.reading: sqlite3.Connection | None = None
        self.served = True
        self._warned: list[Callable[..., object]] = []
        self._closed = False
        self._now: Request | None = None
        self._there = Way(database.net, machine, DATABASE)
        self._back = Way(database.net, DATABASE, machine, contextvars.copy_context())
        database.connections[self] = None

    # --- on the network ---

    def arrive(self, call: Callable[[], object]) -> None:
        """Calls something in the process, if it is connected and lives when that arrives."""

        def come() -> None:
            if not self._closed:
                call()

        self._back.send(come)

    def lose(self) -> None:
        """The server ends the connection; the process learns it later."""
        self.served = False
        self.database.connections.pop(self, None)
        self._back.send(self._lost)

    def _lost(self) -> None:
        self._closed = True
        if self._now is not None:
            self._now.settle(pg.ConnectionDoesNotExistError("connection was closed"))

    def warn(self) -> None:
        for each in self._warned:
            each(self, Warned())

    # --- asyncpg's calls ---

    async def fetch(self, text: str, *values: Any) -> list[Any]:
        if self._closed:
            raise pg.ConnectionDoesNotExistError("connection is closed")
        self._now = request = Request(self, text, values)
        self._there.send(lambda: self.database.take(request))
        try:
            return await request.answered()
        except asyncio.CancelledError:
            self._there.send(lambda: self.database.cancel(self))
            raise

    async def fetchrow(self, text: str, *values: Any) -> Any:
        return next(iter(await self.fetch(text, *values)), None)

    async def fetchval(self, text: str, *values: Any) -> Any:
        row = await self.fetchrow(text, *values)
        return None if row is None else row[0]

    async def execute(self, text: str, *values: Any) -> None:
        await self.fetch(text, *values)

    async def cursor(self, text: str, *values: Any) -> Cursor:
        return Cursor(await self.fetch(text, *values))

    async def add_listener(self, channel: str, listener: Callable[..., object]) -> None:
        self.listeners[channel].append(listener)

    def add_log_listener(self, listener: Callable[..., object]) -> None:
        self._warned.append(listener)

    def is_closed(self) -> bool:
        return self._closed

    def terminate(self) -> None:
        """Closes the socket. What was sent may still arrive, and be carried out."""
        self._lost()
        self._there.send(self._gone)

    async def close(self) -> None:
        self.terminate()

    def _gone(self) -> None:
        self.database.connections.pop(self, None)


async def connect(
    database: SimDatabase, machine: str, incarnation: str, where: Address, settings: Mapping[str, str] = {}, /
) -> Any:
    """As `connection.connect` of the real log."""
    await asyncio.sleep(3 * database.net.delay())
    if not database.net.reaches(machine, DATABASE):
        await asyncio.sleep(CONNECT_SEC)
        raise Unknown("the database does not answer")
    if not database.up:
        raise Unknown("the database cannot be reached")
    return SimConnection(database, machine, incarnation)
