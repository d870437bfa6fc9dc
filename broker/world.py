"""The seams in production: the system's clock and randomness, and SQLite on a disk.

The only module of the broker that reads a clock, draws random bytes or opens the database.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import aiosqlite

from broker.engine.ids import new_id
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.seams import Batch, Broken, Conflict, Full, Placed, Sql, Sqlite
from broker.seams import InUse as InUse
from projections.batches import TERM, Latest, carry_out
from projections.follower import open_log, renew

T = TypeVar("T")

DATABASE = "ordain.db"
LOCK = "ordain.lock"
RUN = "-- run"
TIMEOUT_SEC = 10
PATIENCE_MS = 20


class SystemClock:
    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


def boot_ms() -> int:  # never steps, and goes on while the machine sleeps
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


class SystemEntropy:
    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def token(self, size: int) -> bytes:
        return os.urandom(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


class _One:
    """A cursor-like object that returns one value as its only row."""

    def __init__(self, value: object) -> None:
        self._value = value

    def fetchall(self) -> list[object]:
        return [self._value]


class _Transactions(sqlite3.Connection):
    """A connection that runs a whole transaction in one call, so that aiosqlite's thread is used once."""

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        if sql is not RUN:
            return super().execute(sql, parameters)
        begin, work = parameters
        if begin is None:
            return _One(work(self))
        super().execute(begin)
        try:
            value = work(self)
            super().execute("COMMIT")
        except BaseException:
            if self.in_transaction:
                super().execute("ROLLBACK")
            raise
        return _One(value)


class SqliteStorage:
    """One writing and one reading connection to the database of a data directory; holds its lock.

    WAL with synchronous=FULL, because NORMAL loses acknowledged commits at a power loss. Only the
    writing connection checkpoints: otherwise SQLite before 3.51.3 can lose a WAL that was reset.
    """

    def __init__(
        self, writer: aiosqlite.Connection, reader: aiosqlite.Connection, opened: AsyncExitStack
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._opened = opened
        self._latest = Latest()
        self.term = TERM

    @classmethod
    async def open(cls, directory: Path) -> SqliteStorage:
        """Opens the database, or creates it. Only the owner can read the directory and its files.

        Raises:
            InUse: another broker uses the directory.
            Broken: the file is not a database, or SQLite does not give the required guarantees.
            UnknownFormat: a later release wrote it.
            OSError: the directory cannot be created or written.
        """
        os.makedirs(directory, mode=0o700, exist_ok=True)
        path = directory / DATABASE
        try:
            # If a later step fails, close what is open: the thread of a connection would never end.
            async with AsyncExitStack() as opened:
                opened.enter_context(lock(directory / LOCK))
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                writer = await opened.enter_async_context(_connection(path))
                await writer.execute_fetchall(RUN, ("BEGIN", lambda sql: log.check_format(sql, path)))
                await writer.execute_fetchall(RUN, (None, lambda sql: _keep_format_1(sql, path)))
                await writer.execute_fetchall("PRAGMA secure_delete = ON")
                mode = next(iter(await writer.execute_fetchall("PRAGMA journal_mode = WAL")))[0]
                await writer.execute_fetchall("PRAGMA synchronous = FULL")
                level = next(iter(await writer.execute_fetchall("PRAGMA synchronous")))[0]
                if (mode, level) != ("wal", 2):
                    raise Broken(
                        f"SQLite gives journal_mode {mode} and synchronous {level}, not wal and 2 (FULL)"
                    )
                reader = await opened.enter_async_context(_connection(path))
                await reader.execute_fetchall("PRAGMA query_only = ON")
                await reader.execute_fetchall("PRAGMA wal_autocheckpoint = 0")
                return cls(writer, reader, opened.pop_all())
        except sqlite3.Error as error:
            raise Broken(f"{path}: {error}") from error

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        await self.write(lambda sql: open_log(sql, log_id, cursor_key))

    async def rebuild(self) -> None:
        await self.write(renew)

    def number(self) -> int:
        return self._latest.number()

    async def append(self, batch: Batch) -> Placed:
        known = self._latest.find(batch)
        if known is None:
            known = await self._run(self._writer, "BEGIN IMMEDIATE", lambda sql: carry_out(sql, batch))
            self._latest.keep(batch, known)
        return known

    async def landed(self, number: int) -> Placed | None:
        return self._latest.landed(number)

    async def write(self, work: Callable[[Sqlite], T]) -> T:
        return await self._run(self._writer, "BEGIN IMMEDIATE", work)

    async def read(self, work: Callable[[Sql], Awaitable[T]]) -> T:
        return await self._run(self._reader, "BEGIN", lambda connection: read_now(connection, work))

    async def forget_old_pages(self) -> bool:
        def work(sql: Sqlite) -> bool:
            # Give up soon: a long reader, such as `ordain log verify`, must not delay the writer.
            sql.execute(f"PRAGMA busy_timeout = {PATIENCE_MS}")
            try:
                return not sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                sql.execute(f"PRAGMA busy_timeout = {TIMEOUT_SEC * 1_000}")

        return await self._run(self._writer, None, work)

    async def _run(
        self, connection: aiosqlite.Connection, begin: str | None, work: Callable[[Sqlite], T]
    ) -> T:
        # The transaction is one call in the thread, so it finishes even if the caller is cancelled.
        try:
            rows = await connection.execute_fetchall(RUN, (begin, work))
        except sqlite3.Error as error:
            raise _translated(error) from error
        return cast(T, next(iter(rows)))

    async def keep(self) -> None:
        """The lock of the directory shows it."""

    async def close(self) -> None:
        """Closes the reader first: the last connection checkpoints, and that must be the writing one."""
        await self._opened.aclose()


def open_for_reading(directory: Path) -> sqlite3.Connection:
    """A read-only connection to the log of a data directory, with or without a running broker.

    Raises:
        Broken: there is no log, or it cannot be read.
    """
    there_is_a_log(directory)
    return open_file(directory / DATABASE)


def there_is_a_log(directory: Path) -> None:
    """Checks that the directory has a log.

    Raises:
        Broken: it has none.
    """
    if not (directory / DATABASE).exists():
        raise Broken(f"there is no log at {directory}: name another directory with --data")


def open_file(path: Path) -> sqlite3.Connection:
    """A read-only connection to one file with a log.

    Raises:
        Broken: the file does not exist, is not a log, or cannot be read.
        UnknownFormat: a later release wrote it.
    """
    if not path.is_file():
        raise Broken(f"{path} does not exist")
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("SELECT 1 FROM events LIMIT 1")
        log.check_format(connection, path)
        log.show_as_format_2(connection)
        connection.execute("PRAGMA query_only = ON")
    except (sqlite3.Error, Broken) as error:
        connection.close()
        if isinstance(error, Broken):
            raise
        none = "no such table: events" in str(error)
        raise Broken(f"{path}: {'it holds no log yet; a broker makes one' if none else error}") from error
    return connection


def new_file(directory: Path) -> sqlite3.Connection:
    """A connection to a new, empty database that only the owner can read.

    Raises:
        OSError: the file cannot be created, or it exists already.
    """
    path = directory / DATABASE
    create(path)
    return sqlite3.connect(path, isolation_level=None)


def part_of(path: Path) -> Path:
    """A name in the same directory that nobody can foresee, for a file that is not complete yet."""
    return path.with_name(f"{path.name}.{os.urandom(8).hex()}.part")


def create(path: Path) -> None:
    """Creates an empty file that only the owner can read. It never follows a link and never replaces a file.

    Raises:
        OSError: it cannot be created, or it exists already.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))


def back_up(sql: sqlite3.Connection, to: Path) -> None:
    """Copies one consistent state of an open database to a file, durably, without its free pages.

    Only the owner can read the file.

    Raises:
        Broken: the database cannot be read.
        Full: there is no space for the copy.
        OSError: the file cannot be created.
    """
    # Create the file with mode 0600 before SQLite does, so that others can never read it.
    create(to)
    try:
        sql.execute("PRAGMA query_only = OFF")  # VACUUM INTO needs this, although it writes only the new file
        log.copy(sql, str(to))
    except sqlite3.Error as error:
        raise _translated(error) from error
    with open(to, "rb") as made:
        os.fsync(made.fileno())


def compact(directory: Path) -> tuple[int, int]:
    """Gives free pages back to the disk; returns the size of the file before and after, in bytes.

    No row changes.

    Raises:
        InUse: a broker uses the directory, or a process reads the log.
        Broken: there is no log, or it cannot be read.
        Full: there is no space for the temporary copy.
    """
    open_for_reading(directory).close()
    path = directory / DATABASE
    with lock(directory / LOCK), closing(sqlite3.connect(path, isolation_level=None, timeout=1)) as sql:
        # SQLite puts its temporary copy here. In /tmp there may be no space, and others could read it.
        os.environ["SQLITE_TMPDIR"] = str(directory)
        try:
            sql.execute("PRAGMA secure_delete = ON")
            sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            before = path.stat().st_size
            pages, free, size = (
                sql.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
            # Space for the temporary copy, and for the same data again in the write-ahead log.
            needed, room = 2 * (pages - free) * size, shutil.disk_usage(directory).free
            if needed > room:
                raise Full(f"compacting {path} needs {needed:,} bytes of free space; there are {room:,}")
            sql.execute("VACUUM")
            busy = sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise InUse(f"another process reads {path}; compact it when none does") from error
            raise _translated(error) from error
        finally:
            del os.environ["SQLITE_TMPDIR"]
        if busy:
            raise InUse(f"another process reads {path}; compact it when none does")
    return before, path.stat().st_size


def rename_log(path: Path) -> str:
    """Gives a log that no broker serves a new log id, durably. The old id is kept as `restored_from`."""
    log_id = new_id("log", SystemClock().wall_ms(), SystemEntropy())
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA synchronous = FULL")
        sql.execute(
            "INSERT INTO meta SELECT 'restored_from', value FROM meta WHERE key = 'log_id' "
            "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        )
        sql.execute("UPDATE meta SET value = ? WHERE key = 'log_id'", (log_id,))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return log_id


def _keep_format_1(sql: sqlite3.Connection, path: Path) -> None:
    """Copies a log of format 1 to `ordain.db.format-1` beside it, before it is upgraded.

    Raises:
        Broken: the copy cannot be made; the log was not changed.
    """
    if log.format_of(sql) != "1":
        return
    kept = path.with_name(f"{path.name}.format-1")
    part = part_of(kept)
    try:
        back_up(sql, part)
        os.replace(part, kept)
    except (OSError, Full) as error:
        raise Broken(
            f"{path} has format 1 and must be copied to {kept} before it is upgraded: {error}; "
            "give the disk as much free space as the log has"
        ) from error
    finally:
        part.unlink(missing_ok=True)
        sql.execute("PRAGMA query_only = OFF")


def _connection(path: Path) -> aiosqlite.Connection:
    return aiosqlite.connect(path, factory=_Transactions, isolation_level=None, timeout=TIMEOUT_SEC)


def lock(path: Path) -> IO[str]:
    lock = open(path, "a+", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        who = f" (process {owner})" if owner else ""
        raise InUse(f"another broker{who} serves {path.parent}; one data directory has one broker") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _translated(error: sqlite3.Error) -> Exception:
    """Translates an error of the SQLite driver into an exception of the seams."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, sqlite3.IntegrityError):
        return Conflict(str(error))
    if code == sqlite3.SQLITE_FULL:
        return Full(str(error))
    if isinstance(error, log.UNWRITABLE):
        return error
    return Broken(f"{getattr(error, 'sqlite_errorname', 'error')}: {error}")
