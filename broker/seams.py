"""The interfaces to the outside world: time, randomness, storage, MQTT and outgoing HTTP.

Production (`broker/world.py`) and simulation implement them differently. No other code in `broker/` or
`projections/` may read a clock, draw a random number, start a thread or open a socket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import msgspec

from broker.domain.batches import At as At
from broker.domain.batches import Batch as Batch
from broker.domain.batches import Change as Change
from broker.domain.batches import Drop as Drop
from broker.domain.batches import Erase as Erase
from broker.domain.batches import EraseEvents as EraseEvents
from broker.domain.batches import New as New
from broker.domain.batches import Newest as Newest
from broker.domain.batches import Node as Node
from broker.domain.batches import Placed as Placed
from broker.domain.batches import Purge as Purge
from broker.domain.batches import Put as Put
from broker.domain.batches import SideRow as SideRow
from broker.domain.batches import Unmatched as Unmatched
from broker.domain.batches import Value as Value
from broker.domain.batches import View as View

T = TypeVar("T")


class Clock(Protocol):
    """Two clocks in whole milliseconds: the wall clock (Unix time, may step) and one that never steps."""

    def wall_ms(self) -> int: ...

    def monotonic_ms(self) -> int: ...


class Entropy(Protocol):
    """Randomness: `token` (that many bytes) for secrets and ids, `uniform` for jitter."""

    def token(self, size: int) -> bytes: ...

    def uniform(self, low: float, high: float) -> float: ...


# --- the storage ----------------------------------------------------------------------------------


class Rows(Protocol):
    """The result rows of a statement."""

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Sql(Protocol):
    """What a read may ask of a log, in one snapshot. The text is the same for every storage: `?` stands for a
    value, and nothing in it is of one storage alone. Each row is a sequence."""

    async def all(self, text: str, values: Sequence[Any] = ..., /) -> list[Any]: ...

    async def one(self, text: str, values: Sequence[Any] = ..., /) -> Any:
        """The first row; None if there is none."""
        ...

    def each(self, text: str, values: Sequence[Any] = ..., /) -> AsyncIterator[Any]:
        """The rows one by one, so that not all are in memory."""
        ...

    async def form(self) -> str | None:
        """What is wrong with the tables or the file, which no hash shows, as a sentence; None if nothing."""
        ...


class Readable(Protocol):
    """The part of a SQLite connection that is used for reading (sqlite3 or apsw)."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Rows: ...


class Sqlite(Readable, Protocol):
    """The part that is used for writing."""

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Any: ...


class Storage(Protocol):
    """Runs whole transactions, never single statements: a cancelled caller cannot leave one half done.

    `append` carries out a batch, whole or not at all, and returns after it is durable. `read` runs the
    coroutine `work` in one snapshot; it must wait for nothing but the log. Both raise `Full` or `Broken`
    (below); `append` also `Conflict` and `Fenced`. An exception of `work` is raised again.
    """

    @property
    def term(self) -> int:
        """The term in which this process owns the log. With SQLite one process owns everything in term 1."""
        ...

    def number(self) -> int:
        """A number for the next batch, which no batch of this process has had."""
        ...

    async def append(self, batch: Batch) -> Placed: ...

    async def landed(self, number: int) -> Placed | None:
        """What the log gave the batch with this number of this process; None: it was not recorded, and it
        never will be."""
        ...

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        """Creates what is missing: the tables, with these two in a new log, and the projections.

        Raises:
            UnknownFormat: the file has rows, views or triggers that no release writes.
        """
        ...

    async def rebuild(self) -> None:
        """Computes all projections again from the log."""
        ...

    async def read(self, work: Callable[[Sql], Awaitable[T]]) -> T: ...

    async def forget_old_pages(self) -> bool:
        """Empties the write-ahead log, which may contain pages from before an erasure.

        Returns False if a reader prevented it: call it again later.
        """
        ...

    async def close(self) -> None: ...


class Served(Storage, Protocol):
    """The storage of a process that serves its log."""

    async def keep(self) -> None:
        """To be run while the log is served: shows others that it is.

        Raises:
            Fenced: another process has claimed it.
        """
        ...


class Conflict(Exception):
    """A unique index refused the transaction: another writer was first. Decide again."""


class Fenced(Exception):
    """Another node owns the log now: nothing was recorded. `term`: the term that the log has."""

    def __init__(self, term: int) -> None:
        super().__init__(f"the log is in term {term}: another node owns it")
        self.term = term


class InUse(Exception):
    """Another broker serves this log."""


class Full(Exception):
    """No space left to write: nothing was recorded. Reads go on."""


class Unknown(Exception):
    """The storage does not answer, or lost the connection: whether the batch was recorded is unknown. Ask
    `landed`. A read that raises it may be tried again."""


class Broken(Exception):
    """The storage failed (I/O error, corrupt file): the outcome of the transaction is unknown."""


class UnknownFormat(Broken):
    """Another release wrote the file, in a format that this one does not read. Nothing was changed."""


UNREADABLE = (Full, Unknown, Broken)  # what `Storage.read` raises if it cannot read now


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One received MQTT message. `token`: the link's own handle for the PUBACK.

    `correlation`: Correlation Data (MQTT 5). `arrived_at`: when the intake got it, in ms of broker time; it
    may wait there. `foreign`: the hardware id of the device that sent it, if that device published on a
    topic of another device; only the embedded MQTT server knows this.
    """

    topic: str
    payload: bytes
    qos: int = 1
    dup: bool = False
    retain: bool = False
    correlation: bytes | None = None
    token: Any = None
    arrived_at: int = 0
    foreign: str | None = None


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """One MQTT message to send, with QoS 1. A command is never retained. The last four fields need MQTT 5."""

    topic: str
    payload: bytes
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None
    expiry_sec: int | None = None
    user_properties: tuple[tuple[str, str], ...] = ()


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one publish to the MQTT server.

    `written`: the bytes were given to the network. `reason`: the reason code of the PUBACK (0 in MQTT
    3.1.1). None: no PUBACK came (link lost, time-out), so the outcome is unknown.
    """

    written: bool
    reason: int | None


class LinkEvents(Protocol):
    """The callbacks of a link. They run in the event loop, and never inside a call of `publish`."""

    def link_up(self) -> None: ...

    def link_down(self, why: str) -> None: ...

    def message(self, message: Message) -> None: ...


class Link(Protocol):
    """The broker's connection to the MQTT server. It reconnects by itself until it is closed."""

    @property
    def up(self) -> bool: ...

    @property
    def direct(self) -> bool:
        """True if devices connect to the broker's own listener, without another MQTT server in between.

        Receipts then come from the device itself, and a device sends the messages that it kept during our
        absence when it reconnects.
        """
        ...

    def listens(self, topic: str) -> bool:
        """False if no client subscribes to this topic. True if there is one, or if that is not known."""
        ...

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        """Gives the bytes to the network, at the latest in the next turn of the event loop and before all
        callbacks that are scheduled after this call. Calls `done` exactly once, later, from the loop.

        Returns False if the link is down: nothing is written, and `done` is never called.
        """
        ...

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        """Acknowledges one message. Does nothing if its connection is closed.

        `reason` (an MQTT 5 reason code) and `text` tell the sender what is wrong with the message, if its
        MQTT version allows it.
        """
        ...


# How many seconds a read may wait for a storage that is away, in this task; None: as long as it takes.
# Somebody waits for the answer of an HTTP request. Tasks of the broker itself cannot go on without the log.
patience: ContextVar[float | None] = ContextVar("patience", default=None)


class Presence(Protocol):
    """Gets the presence of devices from the embedded MQTT server. A device's user name is `hardware_id`."""

    def device_online(self, hardware_id: str) -> None:
        """The device is connected and has subscribed to its command topic."""
        ...

    def device_offline(self, hardware_id: str) -> None: ...


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one outgoing POST. `status` None: no answer came, and `error` says why; the request may
    still have arrived. `retry_after`: the value of the Retry-After header, unchanged."""

    status: int | None = None
    error: str | None = None
    retry_after: str | None = None


# The project that the requests of this task are made for: its lookups of host names have a bound.
of_project: ContextVar[str] = ContextVar("of_project", default="")


class Outbound(Protocol):
    """HTTP to addresses that users configure. Nothing is sent to an address that is not allowed."""

    async def fault(self, url: str) -> str | None:
        """The reason why nothing may be sent to this URL, as half a sentence; None if it is allowed."""
        ...

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        """Sends once and follows no redirect. Errors of the network or the receiver are in the `Answer`."""
        ...
