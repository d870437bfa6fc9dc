"""Reading a SQLite connection as the seams have it: coroutines, which here never wait.

A read is written once, as a coroutine over `seams.Sql`. SQLite answers at once, so one step drives it to its
end, in whatever thread the connection belongs to. No event loop is needed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from broker.seams import Readable, Rows

T = TypeVar("T")
P = ParamSpec("P")


class Driven:
    """`seams.Sql` over a connection of SQLite."""

    __slots__ = ("_execute", "connection")

    def __init__(self, connection: Readable) -> None:
        self.connection = connection
        self._execute = connection.execute

    async def all(self, text: str, values: Sequence[Any] = (), /) -> list[Any]:
        return self._execute(text, values).fetchall()

    async def one(self, text: str, values: Sequence[Any] = (), /) -> Any:
        return self._execute(text, values).fetchone()

    def each(self, text: str, values: Sequence[Any] = (), /) -> Each:
        return Each(self._execute(text, values))

    async def form(self) -> str | None:
        own: Callable[[], str | None] | None = getattr(self.connection, "form", None)
        if own is not None:  # the command line reads a log on PostgreSQL through the same calls
            return own()
        from broker.log import sqlite  # it reads through this module

        return await sqlite.sound(self)


class Each:
    """The rows of a statement, one by one."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __aiter__(self) -> Each:
        return self

    async def __anext__(self) -> Any:
        if (row := self._rows.fetchone()) is None:
            raise StopAsyncIteration
        return row


def drive(work: Awaitable[T]) -> T:
    """Runs a coroutine that reads SQLite to its end, without an event loop.

    Raises:
        RuntimeError: it waits for something else than SQLite, which a read must never do.
    """
    steps = work.__await__()
    try:
        next(iter(steps))
    except StopIteration as done:
        value: T = done.value
        return value
    raise RuntimeError("a read of the log must wait for nothing but the log")


def read_now(
    connection: Readable,
    work: Callable[Concatenate[Driven, P], Awaitable[T]],
    *more: P.args,
    **named: P.kwargs,
) -> T:
    """What `work` reads from a connection of SQLite."""
    return drive(work(Driven(connection), *more, **named))
