"""HTTP/1.1 to another node, over connections that stay open.

A connection carries one request at a time. It is used again only if the answer ended where its head said that
it would, and nothing came after it. An answer that only the end of the connection ends is none: a node never
gives one, and nobody could tell it from one that broke off. Nothing is sent twice here.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import httptools

from broker.log.postgresql.vanished import watch
from broker.settings import address as host_and_port

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case

CONNECT_SEC = 2.0
QUIET_SEC = 120.0  # longer than any request waits, and than an event stream is silent
VANISHED_SEC = 8  # a node whose machine confirms nothing for so long gives no answer any more
KEPT = 100
KEPT_SEC = 5.0
HEAD_BYTES = 65_536
AHEAD_BYTES = 65_536  # of a body: received, and not read yet; then the other node has to wait
WITH_BODY = ("POST", "PUT", "PATCH")


class Lost(Exception):
    """The other node gave no answer. `reached`: it may have got the request."""

    def __init__(self, *, reached: bool) -> None:
        super().__init__("the other node gave no answer")
        self.reached = reached


class Request(NamedTuple):
    """`headers`: without those of the connection and of the body's length."""

    method: str
    target: bytes
    headers: Headers
    body: bytes


class Answer(Protocol):
    """An answer that has begun. It has to be closed."""

    status: int
    headers: Headers

    async def piece(self) -> bytes:
        """The next part of the body; empty at its end.

        Raises:
            Lost: it broke off.
        """

    def close(self) -> None:
        """The rest is not wanted."""


class Transport(Protocol):
    async def ask(self, address: str, request: Request) -> Answer:
        """Raises:
        Lost: there is no answer.
        """

    def close(self) -> None:
        """Ends all connections."""


class Connections(Transport):
    """The connections of this node to others. Here is no bound of their number: the entrance bounds the
    requests that wait, and the owner each project's streams. `kept_sec`: how long one stays open without a
    request."""

    def __init__(self, kept_sec: float = KEPT_SEC) -> None:
        self._kept_sec = kept_sec
        self._open = set[_Connection]()
        self._idle = dict[_Connection, None]()  # in order: the one used last is the last

    async def ask(self, address: str, request: Request) -> Answer:
        connection = self._kept(address) or await self._connect(address)
        answer = connection.send(request)
        try:
            await answer.begun()
        except BaseException:
            answer.close()
            raise
        return answer

    def close(self) -> None:
        for each in self._open:
            each.end()

    def _kept(self, address: str) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - self._kept_sec
        while self._idle:
            found, _ = self._idle.popitem()
            if found.address == address and found.idle_since > oldest and not found.ends():
                return found
            found.end()
        return None

    async def _connect(self, address: str) -> _Connection:
        host, port = host_and_port("advertise", address)
        made = _Connection(address, self._open, self._idle)
        try:
            async with asyncio.timeout(CONNECT_SEC):
                await asyncio.get_running_loop().create_connection(lambda: made, host, port)
        except OSError as error:  # TimeoutError is one
            raise Lost(reached=False) from error
        if made.ends():  # an answer would be waited for in vain
            made.end()
            raise Lost(reached=False)
        self._open.add(made)  # not earlier: uvloop does not say that one is lost if this wait is cancelled
        return made


class _Connection(asyncio.Protocol):
    """`open_`, `idle`: all connections, and those that carry no request."""

    def __init__(self, address: str, open_: set[_Connection], idle: dict[_Connection, None]) -> None:
        self.address, self.idle_since = address, 0.0
        self._all, self._idle = open_, idle
        self._parser = httptools.HttpResponseParser(self)
        self._answer: _Answer | None = None  # the one that is due
        self._reusable = False

    def send(self, request: Request) -> _Answer:
        self._answer = _Answer(self._transport, bodiless=request.method == "HEAD")
        # Not an empty part: from Python 3.12 on, asyncio would try to write it again and again.
        self._transport.writelines([part for part in _encoded(request) if part])
        return self._answer

    def ends(self) -> bool:
        """Whether it is closed, or something came unasked: also an end that the event loop has not read yet,
        because it was held up."""
        if self._transport.is_closing():
            return True
        unread = select.poll()
        unread.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(unread.poll(0))

    def end(self) -> None:
        self._transport.abort()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        watch(transport.get_extra_info("socket"), VANISHED_SEC)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        self._idle.pop(self, None)
        if self._answer is not None:
            self._answer.lose()

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.end()
            return
        if answer is not None and not answer.ended:
            answer.bound(len(data))
        elif answer is not None:
            self._answer = None
            if self._reusable and len(self._idle) < KEPT:
                self.idle_since = asyncio.get_running_loop().time()
                self._idle[self] = None
            else:
                self.end()

    # --- what the parser calls; when one raises, it fails ---

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.ended:
            raise ValueError("nothing more was asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._answer is not None
        if not self._answer.status:  # else it is a trailer
            self._answer.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._answer is not None
        self._reusable = self._parser.should_keep_alive() and not self._answer.bodiless
        self._answer.begin(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        assert self._answer is not None
        self._answer.add(body)

    def on_message_complete(self) -> None:
        assert self._answer is not None
        if self._answer.status:  # else more follows: it was 1xx
            self._answer.end()


class _Answer(Answer):
    """`bodiless`: its head is all of it, whatever that says about a body."""

    def __init__(self, transport: asyncio.Transport, *, bodiless: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.bodiless, self.ended, self.paused = bodiless, False, False
        self._transport = transport
        self._lost = False
        self._head_bytes = 0
        self._ahead: deque[bytes] = deque()
        self._ahead_bytes = 0
        self._wakes: asyncio.Future[None] | None = None

    # --- for who asked ---

    async def begun(self) -> None:
        """Raises:
        Lost: it will not begin.
        """
        while not self.status:
            await self._more()

    async def piece(self) -> bytes:
        while not self._ahead and not self.ended:
            await self._more()
        piece = self._ahead.popleft() if self._ahead else b""
        self._ahead_bytes -= len(piece)
        if self.paused and self._ahead_bytes <= AHEAD_BYTES and not self._transport.is_closing():
            self.paused = False
            self._transport.resume_reading()
        return piece

    def close(self) -> None:
        if not self.ended:
            self._transport.abort()

    async def _more(self) -> None:
        if self._lost:
            raise Lost(reached=True)
        self._wakes = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(QUIET_SEC):
                await self._wakes
        except TimeoutError as error:
            raise Lost(reached=True) from error
        finally:
            self._wakes = None

    # --- for its connection ---

    def begin(self, status: int) -> None:
        if status < 200:  # another head follows
            self.headers.clear()
            return
        self.status = status
        self.ended = self.bodiless
        self._wake()

    def add(self, body: bytes) -> None:
        self._ahead.append(body)
        self._ahead_bytes += len(body)
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def lose(self) -> None:
        self._lost = True
        self._wake()

    def bound(self, received: int) -> None:
        """Limits what has to be kept, after so many more bytes."""
        if not self.status:
            self._head_bytes += received
            if self._head_bytes > HEAD_BYTES:
                self._transport.abort()
        elif self._ahead_bytes > AHEAD_BYTES:
            self.paused = True
            self._transport.pause_reading()

    def _wake(self) -> None:
        if self._wakes is not None and not self._wakes.done():
            self._wakes.set_result(None)


def _encoded(request: Request) -> tuple[bytes, bytes]:
    """Head and body, for one write: two would be two packets, and wake the other node twice. What the headers
    consist of was read by a strict parser, so there are no line breaks in it."""
    parts = [request.method.encode(), b" ", request.target, b" HTTP/1.1\r\n"]
    for name, value in request.headers:
        parts += (name, b": ", value, b"\r\n")
    if request.body or request.method in WITH_BODY:
        parts.append(b"content-length: %d\r\n" % len(request.body))
    parts.append(b"\r\n")
    return b"".join(parts), request.body
