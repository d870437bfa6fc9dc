"""A disk in memory under real SQLite, and the broker's storage on top of it, both on the virtual clock.

A power cut loses unsynced writes or tears them by sector; a killed process loses none of them. Creating and
deleting a file is durable at once: only in this the simulation is kinder than a real disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import random
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

import apsw

from broker.log.driven import read_now
from broker.seams import Batch, Broken, Conflict, Full, Placed, Sql, Sqlite
from projections.batches import TERM, Latest, carry_out
from projections.follower import open_log, renew
from tests.simulation.loop import SimLoop, current_node

T = TypeVar("T")
Operation = Literal["read", "write", "sync"]

SECTOR = 512
STATEMENTS = 400  # all that the broker and the checkers have: to prepare one takes longer than to run it
FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
_UNIQUE = (apsw.SQLITE_CONSTRAINT_UNIQUE, apsw.SQLITE_CONSTRAINT_PRIMARYKEY, apsw.SQLITE_CONSTRAINT_ROWID)
_BROKEN = (apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError, apsw.ConnectionClosedError)


class _File:
    """The file as programs see it. `_written`: since the last sync, from where to where, what was there."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._written: list[tuple[int, int, bytes]] = []
        self._durable_size = 0

    def write(self, data: bytes, offset: int) -> None:
        content, end = self.data, offset + len(data)
        if offset > (size := len(content)):
            self._written.append((size, end, b""))
            content.extend(bytes(offset - size))
        else:
            self._written.append((offset, end, bytes(content[offset:end])))
        content[offset:end] = data

    def truncate(self, size: int) -> None:
        self._written.append((size, len(self.data), bytes(self.data[size:])))
        del self.data[size:]

    def sync(self) -> None:
        self._written.clear()
        self._durable_size = len(self.data)

    def lose_power(self, rng: random.Random) -> None:
        undo = self.undo
        if undo or len(self.data) != self._durable_size:
            survives = rng.choice((0.0, 0.5, 0.9))
            size = len(self.data) if rng.random() < survives else self._durable_size
            for sector, old in undo.items():
                if rng.random() >= survives:
                    start = sector * SECTOR
                    self.data.extend(bytes(max(0, start + SECTOR - len(self.data))))
                    self.data[start : start + SECTOR] = old.ljust(SECTOR, b"\0")
            del self.data[size:]
            self.data.extend(bytes(size - len(self.data)))
        self.sync()

    @property
    def undo(self) -> dict[int, bytes]:
        """The durable content of each sector written since the last sync, in the order of writing."""
        durable, sectors = bytearray(self.data), dict[int, bytes]()
        for start, end, old in reversed(self._written):
            durable[start:end] = old
        for start, end, _ in self._written:
            for sector in range(start // SECTOR, (end - 1) // SECTOR + 1):
                sectors[sector] = bytes(durable[sector * SECTOR : (sector + 1) * SECTOR])
        return sectors


class SimDisk:
    """A disk in memory. Set `capacity` (bytes) for a full disk and `failing` for I/O errors."""

    _ids = itertools.count()

    def __init__(self, loop: SimLoop) -> None:
        self.files: dict[str, _File] = {}
        self.capacity: int | None = None
        self.failing: set[Operation] = set()
        self.slow_sec = 0.0  # how long a write takes, at most
        self.stopped = False
        self.epoch = 0
        self._id = str(next(self._ids))
        self._loop = loop
        self._random = loop.rng("disk")
        self._left = 0
        self._then: Callable[[], object] | None = None
        _VFS.disks[self._id] = self

    def connect(self, *, synchronous: str = "FULL", checkpoint_pages: int = 1000) -> apsw.Connection:
        path = f"/{self._id}/ordain.db"
        connection = apsw.Connection(path, flags=FLAGS, vfs=_VFS.NAME, statementcachesize=STATEMENTS)
        # No checkpoint on close: an orderly end then leaves a WAL like a kill does, and every start tests
        # recovery.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        # Otherwise this build of SQLite prepares some statements anew for each value. Python's does not.
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        # Must be set before WAL: then SQLite keeps the WAL index in the heap and this VFS needs no shared
        # memory.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute(f"PRAGMA synchronous={synchronous}").fetchall()
        connection.execute("PRAGMA temp_store=MEMORY").fetchall()
        connection.execute("PRAGMA secure_delete=ON").fetchall()
        connection.execute(f"PRAGMA wal_autocheckpoint={checkpoint_pages}").fetchall()
        return connection

    def stop_after(self, operations: int, then: Callable[[], object]) -> None:
        """Stops the disk after this many more writes and syncs, possibly in the middle of a transaction.

        `then` is called soon afterwards, outside of every node. It kills the process or cuts the power.
        """
        self._left, self._then = operations, then

    @property
    def armed(self) -> bool:
        """Whether a stop is still to come."""
        return self._then is not None

    def lose_process(self) -> None:
        """Kill -9: the kernel keeps all writes, synced or not."""
        self._loop.note("disk lost its process")
        self._begin_again()

    def lose_power(self) -> None:
        self._loop.note("disk lost power")
        for file in self.files.values():
            file.lose_power(self._random)
        self._begin_again()

    def _begin_again(self) -> None:
        self.epoch += 1
        self.stopped = False
        self._then = None

    def allow(self, operation: Operation, epoch: int) -> None:
        if epoch != self.epoch:
            raise apsw.IOError("this process is dead")
        if self.stopped or operation in self.failing:
            raise apsw.IOError(f"simulated I/O error: {operation}")
        if self._then is not None and operation != "read":
            if self._left == 0:
                self.stopped = True
                self._loop.call_soon(self._then, context=contextvars.Context())
                raise apsw.IOError("the machine stops here")
            self._left -= 1

    def make_room(self, growth: int) -> None:
        if self.capacity is not None and growth > 0:
            used = sum(len(file.data) for file in self.files.values())
            if used + growth > self.capacity:
                raise apsw.FullError("simulated disk is full")


class _Handle:
    """An open file. It works only in the disk epoch in which it was opened; after a crash it fails."""

    def __init__(self, disk: SimDisk, file: _File) -> None:
        self._disk = disk
        self._file = file
        self._epoch = disk.epoch

    def xRead(self, amount: int, offset: int) -> bytes:
        self._disk.allow("read", self._epoch)
        return bytes(self._file.data[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:
        disk, file = self._disk, self._file
        disk.allow("write", self._epoch)
        if disk.capacity is not None:
            disk.make_room(offset + len(data) - len(file.data))
        file.write(data, offset)

    def xTruncate(self, size: int) -> None:
        self._disk.allow("write", self._epoch)
        self._file.truncate(size)

    def xSync(self, _flags: int) -> None:
        self._disk.allow("sync", self._epoch)
        self._file.sync()

    def xFileSize(self) -> int:
        return len(self._file.data)

    def xLock(self, _level: int) -> None: ...

    def xUnlock(self, _level: int) -> None: ...

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, _operation: int, _pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return 4096

    def xDeviceCharacteristics(self) -> int:
        # SQLite assumes this of every disk under Linux: a write does not damage the bytes next to it.
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE

    def xClose(self) -> None: ...


class _Vfs(apsw.VFS):
    """SQLite's VFS for the simulated disks; the first part of a path names the disk."""

    NAME = "simulated"

    def __init__(self) -> None:
        self.disks: weakref.WeakValueDictionary[str, SimDisk] = weakref.WeakValueDictionary()
        super().__init__(self.NAME, "", iVersion=1)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> Any:
        if name is None:
            raise apsw.CantOpenError("temporary files are not simulated")
        path = name if isinstance(name, str) else name.filename()
        disk = self._disk(path)
        if not flags[0] & apsw.SQLITE_OPEN_CREATE and path not in disk.files:
            raise apsw.CantOpenError(f"no such file: {path}")
        flags[1] = flags[0]
        return _Handle(disk, disk.files.setdefault(path, _File()))

    def xDelete(self, filename: str, _sync_directory: bool) -> None:
        self._disk(filename).files.pop(filename, None)

    def xAccess(self, pathname: str, _flags: int) -> bool:
        return pathname in self._disk(pathname).files

    def xFullPathname(self, name: str) -> str:
        return name

    def xCurrentTime(self) -> float:
        return 2440587.5  # SQL that asks for the time gets 1970, because the broker must use its clock seam

    def _disk(self, path: str) -> SimDisk:
        return self.disks[path.split("/")[1]]


# A simulation has one thread, and nobody asks how much memory SQLite has.
apsw.shutdown()
apsw.config(apsw.SQLITE_CONFIG_SINGLETHREAD)
apsw.config(apsw.SQLITE_CONFIG_MEMSTATUS, False)
apsw.initialize()
_VFS = _Vfs()


class SimStorage:
    """`broker.seams.Storage` on a simulated disk: one queue for writes, concurrent reads, random latency.

    As with a database thread, cancelling a caller does not cancel its transaction. The storage belongs to the
    node that creates it; killing the node stops all work in progress at once.
    """

    def __init__(
        self,
        loop: SimLoop,
        disk: SimDisk,
        *,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        latency: tuple[float, float] = (0.0002, 0.004),
        checkpoint_pages: int = 200,
        on_commit: Callable[[apsw.Connection], object] | None = None,
        on_write: Callable[[int, bool], object] = lambda began, ok: None,
    ) -> None:
        self._loop = loop
        self._disk = disk
        self._latest = Latest()
        self.term = TERM
        self._latency = latency
        self._random = loop.rng(f"storage/{disk.epoch}")
        self._on_commit, self._on_write = on_commit, on_write
        self._writes: deque[tuple[Callable[[Sqlite], Any], asyncio.Future[Any], float]] = deque()
        node = current_node()
        if node is not None:
            node.on_kill.append(self._abandon)
        try:
            self._connection = disk.connect(synchronous=synchronous, checkpoint_pages=checkpoint_pages)
        except apsw.Error as error:
            raise _translated(error) from error

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        await self.write(lambda sql: open_log(sql, log_id, cursor_key))

    async def rebuild(self) -> None:
        await self.write(renew)

    def number(self) -> int:
        return self._latest.number()

    async def append(self, batch: Batch) -> Placed:
        known = self._latest.find(batch)
        if known is None:
            known = await self.write(lambda sql: carry_out(sql, batch))
            self._latest.keep(batch, known)
        return known

    async def landed(self, number: int) -> Placed | None:
        return self._latest.landed(number)

    async def write(self, work: Callable[[Sqlite], T]) -> T:
        outcome: asyncio.Future[T] = self._loop.create_future()
        self._writes.append((work, outcome, self._loop.time()))
        if len(self._writes) == 1:
            self._write_later()
        return await outcome

    async def read(self, work: Callable[[Sql], Awaitable[T]]) -> T:
        outcome: asyncio.Future[T] = self._loop.create_future()
        self._later(self._run, "BEGIN", lambda sql: read_now(sql, work), "ROLLBACK", outcome)
        return await outcome

    async def forget_old_pages(self) -> bool:
        outcome: asyncio.Future[bool] = self._loop.create_future()
        self._later(self._checkpoint, outcome)
        return await outcome

    def _checkpoint(self, outcome: asyncio.Future[bool]) -> None:
        error: Exception | None = None
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except apsw.Error as raised:
            error = _translated(raised)
        if not self._disk.stopped:
            self._later(_deliver, outcome, True, error)

    async def close(self) -> None:
        await self.write(lambda sql: None)
        self._connection.close()

    def _write_first(self) -> None:
        work, outcome, began = self._writes[0]
        ok = self._run("BEGIN IMMEDIATE", work, "COMMIT", outcome)
        if ok is None:
            return  # `_abandon` reports it
        self._writes.popleft()
        self._on_write(round(1_000 * began), ok)
        if self._writes:
            self._write_later()

    def _write_later(self) -> None:
        slow = self._random.uniform(0.3, 1) * self._disk.slow_sec if self._disk.slow_sec else 0.0
        self._loop.call_later(slow + self._random.uniform(*self._latency), self._write_first)

    def _run(
        self, begin: str, work: Callable[[Sqlite], T], end: str, outcome: asyncio.Future[T]
    ) -> bool | None:
        """Returns whether the transaction ended well; None: the machine has stopped, and nobody learns it."""
        result: T | None = None
        error: Exception | None = None
        try:
            self._connection.execute(begin)
            result = work(self._connection)
            self._connection.execute(end)
        except Exception as raised:
            error = _translated(raised)
            with contextlib.suppress(apsw.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        if self._disk.stopped:
            return None
        if end == "COMMIT" and self._on_commit is not None:
            # After an error too: the commit can succeed while its checkpoint finds the disk full.
            with contextlib.suppress(apsw.Error):
                self._on_commit(self._connection)
        self._later(_deliver, outcome, result, error)
        return error is None

    def _later(self, callback: Callable[..., object], *args: Any) -> None:
        self._loop.call_later(self._random.uniform(*self._latency), callback, *args)

    def _abandon(self) -> None:
        if self._writes:  # its outcome is lost with the process
            self._on_write(round(1_000 * self._writes[0][2]), False)
        self._disk.lose_process()
        with contextlib.suppress(apsw.Error):
            self._connection.close()


def _deliver(outcome: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if outcome.done():
        return
    if error is None:
        outcome.set_result(result)
    else:
        outcome.set_exception(error)


def _translated(error: Exception) -> Exception:
    if isinstance(error, apsw.FullError):
        return Full(str(error))
    if isinstance(error, apsw.ConstraintError) and getattr(error, "extendedresult", None) in _UNIQUE:
        return Conflict(str(error))
    if isinstance(error, _BROKEN):
        return Broken(str(error))
    return error
