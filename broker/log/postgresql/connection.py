"""Connections to PostgreSQL: how they are made, and what the server's errors mean for the log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, TypeAlias

import asyncpg
from asyncpg import exceptions as pg

from broker.log.postgresql.tables import SCHEMA
from broker.log.postgresql.vanished import watch
from broker.log_url import Address
from broker.seams import Broken, Conflict, Fenced, Full, Unknown, UnknownFormat

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

OLDEST = 15
CONNECT_SEC = 5.0
VANISHED_SEC = 8  # a server of which nothing is heard for so long is gone; see `vanished`
SETTINGS = {
    "application_name": "ordain",
    "search_path": SCHEMA,
    "default_transaction_isolation": "read committed",
    "jit": "off",
    "bytea_output": "hex",
    "array_nulls": "on",  # else the NULL in an array of texts would be the word
    # A backend whose client is gone must not hold a snapshot for hours.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "idle_in_transaction_session_timeout": "600000",
}
# For the connection that appends. Its statements find rows by key, in tables of any size. A plan that was
# made while a table was small must not be kept when it has grown. And the server must not plan the statements
# of a small batch again each time: that takes longer than to carry them out.
APPENDING = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}


class Connect(Protocol):
    """How a connection is made: `connect`, or in the simulation a connection to a simulated server."""

    async def __call__(self, where: Address, settings: Mapping[str, str] = ..., /) -> Connection: ...


async def connect(where: Address, settings: Mapping[str, str] = {}) -> Connection:
    """A new connection.

    Raises:
        Unknown: the server cannot be reached now.
        Broken: it refuses us, or it is not a server that can hold a log.
    """
    try:
        connection: Connection = await asyncpg.connect(
            where.url,
            password=where.password,
            timeout=CONNECT_SEC,
            server_settings={**SETTINGS, **settings},
            statement_cache_size=400,
        )
        try:
            await _set_up(connection, where)
        except BaseException:
            connection.terminate()
            raise
    except (pg.InvalidAuthorizationSpecificationError, pg.InvalidCatalogNameError) as error:
        raise Broken(f"{where.shown}: {error}") from error
    except ValueError as error:  # of the URL
        raise Broken(f"{where.shown}: {error}") from error
    except FAILURES as error:
        raise Unknown(f"{where.shown} cannot be reached: {error or type(error).__name__}") from error
    return connection


async def _set_up(connection: Connection, where: Address) -> None:
    # asyncpg has no setting for it, so this reads a private attribute of its. A test looks at the result.
    transport = connection._transport  # type: ignore[attr-defined]
    watch(transport.get_extra_info("socket"), VANISHED_SEC)
    if connection.get_server_version().major < OLDEST:
        raise Broken(
            f"{where.shown} is PostgreSQL {connection.get_server_version().major}; "
            f"the log needs {OLDEST} or later"
        )
    # PostgreSQL adds up whole numbers to `numeric`; for us they stay whole numbers.
    await connection.set_type_codec(
        "numeric", encoder=str, decoder=_number, schema="pg_catalog", format="text"
    )


def _number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text else int(text)


def end(connection: Connection | None) -> None:
    """Closes the socket at once. `close` would wait for an answer, and ask the server to cancel."""
    if connection is not None and not connection.is_closed():
        connection.terminate()


async def goodbye(connection: Connection | None) -> None:
    """Closes a connection in order, or at once if the server does not answer."""
    if connection is None or connection.is_closed():
        return
    try:
        with suppress(TimeoutError, OSError, pg.PostgresError, asyncpg.InterfaceError):
            async with asyncio.timeout(1):
                await connection.close()
    finally:
        end(connection)


FAILURES = (pg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
_CONFLICTS = ("23505", "OD002", "OD003", "OD004")
_BROKEN = ("XX001", "XX002", "58030")
# Lost connection, rollback, resources, locks, an operator's act, the server's system.
_PASSING = ("08", "40", "53", "55", "57", "58")


def passes(error: BaseException | None) -> bool:
    """True if the same statement may succeed later. What the server refuses as such, it refuses again."""
    return not isinstance(error, pg.PostgresError) or (error.sqlstate or "")[:2] in _PASSING


def translated(error: BaseException) -> Exception:
    """An error of the driver as an exception of the seams."""
    if isinstance(error, ValueError):  # a value that the driver cannot send
        return ValueError(str(error))
    if not isinstance(error, pg.PostgresError):
        return Unknown(str(error) or type(error).__name__)
    code, text = error.sqlstate or "", str(error)
    if code in _CONFLICTS:
        return Conflict(text)
    if code == "OD001":
        return Fenced(int(text))
    if code == "OD005":
        return UnknownFormat(text)
    if code in ("53100", "53200"):
        return Full(text)
    if code[:2] == "22" or code[:2] == "23":
        return ValueError(text)
    if code in _BROKEN or code[:2] in ("42", "3D", "3F", "28"):
        return Broken(f"{code}: {text}")
    return Unknown(f"{code}: {text}")
