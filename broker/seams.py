"""The doors through which the broker reaches the world: time, ids, randomness, storage, MQTT, HTTP out.

Production (`broker/world.py`) and simulation give different things behind them. Nothing else in
`broker/` or `projections/` may read a clock, draw a random number, start a thread or open a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

T = TypeVar("T")


class Clock(Protocol):
    """Two readings in whole milliseconds: the wall (Unix time, may step) and one that never steps."""

    def wall_ms(self) -> int: ...

    def monotonic_ms(self) -> int: ...


class Entropy(Protocol):
    """Randomness: secrets and ids from `token`, jitter from `uniform`."""

    def token(self, size: int) -> bytes: ...

    def uniform(self, low: float, high: float) -> float: ...


class Rows(Protocol):
    """What a statement gives back."""

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Sql(Protocol):
    """The part of a SQLite connection that the log and the projections use (sqlite3 or apsw)."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Rows: ...

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Any: ...


class Storage(Protocol):
    """Whole transactions, never single statements, so that cancellation cannot leave a half-open one.

    `write` runs `work` between BEGIN IMMEDIATE and COMMIT on the one writing connection and returns
    after the COMMIT is durable; `read` runs it in a read transaction on another connection.
    Raises `Conflict`, `Full` or `Broken` (below); anything `work` raises rolls back and is re-raised.
    """

    async def write(self, work: Callable[[Sql], T]) -> T: ...

    async def read(self, work: Callable[[Sql], T]) -> T: ...

    async def forget_old_pages(self) -> bool:
        """Empties the write-ahead log, where pages stand as they were before something was erased.

        False if a reader stood in the way: ask again later.
        """
        ...

    async def close(self) -> None: ...


class Conflict(Exception):
    """A unique index refused the transaction: somebody else was first. Decide again."""


class Full(Exception):
    """No space left to write: nothing was recorded. Reads go on."""


class Broken(Exception):
    """The storage failed (I/O error, corrupt file): the outcome of the transaction is unknown."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One MQTT message that reached us. `token` is the link's own handle for the PUBACK.

    `arrived_at`: when it came to the intake, in ms of the broker's clock; it may wait there. `foreign`: the
    device that said this on a topic that is not its own, where the MQTT server is ours and knows.
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
    """One QoS 1, never retained, MQTT message to send. The last four travel only with MQTT 5."""

    topic: str
    payload: bytes
    correlation: bytes | None = None
    response_topic: str | None = None
    expiry_sec: int | None = None
    user_properties: tuple[tuple[str, str], ...] = ()


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one hand-over to the MQTT server.

    `written`: the bytes were given to the network. `reason`: the PUBACK's reason code (0 on MQTT
    3.1.1), or None when no PUBACK was seen (link died, time-out): the outcome is then unknown.
    """

    written: bool
    reason: int | None


class LinkEvents(Protocol):
    """What a link tells its owner, always from the event loop, never re-entrantly from `publish`."""

    def link_up(self) -> None: ...

    def link_down(self, why: str) -> None: ...

    def message(self, message: Message) -> None: ...


class Link(Protocol):
    """The broker's connection to the MQTT server; keeps itself connected until closed."""

    @property
    def up(self) -> bool: ...

    @property
    def direct(self) -> bool:
        """Whether devices connect to us, without an MQTT server in between: receipts then come from the
        device itself, and what it could not tell us while we were away comes when it is back."""
        ...

    def listens(self, topic: str) -> bool:
        """False: nobody is there for what is sent to this topic. True where that cannot be known."""
        ...

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        """Hands the bytes to the network in the next turn of the loop at the latest, before whatever is
        scheduled after this. `done` is called exactly once, later, from the loop.

        False, and `done` is never called, if the link is down: nothing is written.
        """
        ...

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        """Acknowledges one message; does nothing if the connection it came from is gone.

        `reason` (a code of MQTT 5) and `text` tell its sender what was wrong with it, where that is possible.
        """
        ...


class Presence(Protocol):
    """Whom the embedded MQTT server tells that devices come and go (their user name is `hardware_id`)."""

    def device_online(self, hardware_id: str) -> None:
        """The device is connected and has subscribed to its command topic."""
        ...

    def device_offline(self, hardware_id: str) -> None: ...


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one outgoing POST. `status` None: no answer was seen, and `error` says why; it may
    have arrived all the same. `retry_after`: the header as it came."""

    status: int | None = None
    error: str | None = None
    retry_after: str | None = None


class Outbound(Protocol):
    """HTTP to addresses that others chose: nothing is sent to where it may not go."""

    async def fault(self, url: str) -> str | None:
        """Why nothing may be sent to this URL, as half a sentence; None if it may."""
        ...

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        """Sends once and follows no redirect. Never raises for what the network or the far end does."""
        ...
