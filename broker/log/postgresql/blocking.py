"""A log on PostgreSQL for the command line: read like a connection of SQLite, without an event loop.

The driver needs a loop, so one runs in a thread of its own. Every call waits for its answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from broker.log.postgresql import form, making
from broker.log.postgresql.connection import FAILURES, Connection, connect, goodbye, translated
from broker.log.postgresql.reading import BEGIN, translation
from broker.log_url import Address
from broker.seams import Broken, Unknown

T = TypeVar("T")

AT_ONCE = 1_000


class Blocking:
    """`seams.Readable`. `BEGIN` and `COMMIT` begin and end a snapshot."""

    def __init__(self, where: Address) -> None:
        """Raises:
        Broken: the server cannot be reached, or has no log that this release reads.
        """
        self.where = where
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connection: Connection | None = None
        try:
            self._connection = self._wait(connect(where))
            self._wait(making.check(self._connection, where))
        except Unknown as error:
            self.close()
            raise Broken(str(error)) from error
        except BaseException:
            self.close()
            raise

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Answered:
        """Raises:
        Broken: the server cannot be reached, or refuses the statement.
        """
        connection = self._open()
        if sql in ("BEGIN", "COMMIT", "ROLLBACK"):
            self._wait(connection.execute(BEGIN if sql == "BEGIN" else sql))
            return Answered(self, None)
        if not connection.is_in_transaction():
            return Answered(self, None, self._wait(connection.fetch(translation(sql), *parameters)))
        return Answered(self, self._wait(self._cursor(connection, translation(sql), parameters)))

    async def _cursor(self, connection: Connection, text: str, values: Sequence[Any]) -> Any:
        return await connection.cursor(text, *values)

    def form(self) -> str | None:
        """What is wrong with the form of the tables, as a sentence, or None."""
        return self._wait(form.fault(self._open()))

    def more(self, cursor: Any) -> list[Any]:
        found: list[Any] = self._wait(cursor.fetch(AT_ONCE))
        return found

    def _open(self) -> Connection:
        assert self._connection is not None
        return self._connection

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except FAILURES as error:
            raise Broken(f"{self.where.shown}: {translated(error)}") from error

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(goodbye(self._connection), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Answered:
    """The rows of a statement: all of them, or what a cursor still gives."""

    def __init__(self, log: Blocking, cursor: Any, rows: Sequence[Any] = ()) -> None:
        self._log, self._cursor = log, cursor
        self._rows, self._next = list(rows), 0

    def fetchone(self) -> Any:
        if self._next == len(self._rows) and self._cursor is not None:
            self._rows, self._next = self._log.more(self._cursor), 0
            if len(self._rows) < AT_ONCE:
                self._cursor = None
        if self._next == len(self._rows):
            return None
        self._next += 1
        return self._plain(self._rows[self._next - 1])

    def fetchall(self) -> list[Any]:
        found = []
        while (row := self.fetchone()) is not None:
            found.append(row)
        return found

    def _plain(self, row: Any) -> tuple[Any, ...]:
        return tuple(row)
