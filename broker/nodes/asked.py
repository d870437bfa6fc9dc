"""One HTTP request that waits at this node: its body is read, so that it can be sent more than once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar, cast

import msgspec
from litestar.types import Message, Receive, Send

from broker.http.edge.errors import HEADERS, STATUS, error_body
from broker.http.edge.strangers import PASSED
from broker.nodes.connections import Headers

T = TypeVar("T")

BODY_BYTES = 4_194_304 + 65_536  # no route takes more
# Harmless if done twice: answers of devices, and the end of a command.
REPEATABLE = re.compile(
    r"DELETE /v1/devices/[^/]+/commands/[^/]+"
    r"|POST /v1/devices/[^/]+/commands/[^/]+/(ack|result)"
    r"|POST /v1/commands/[^/]+/abandon"
)
# Harmless if done twice with an `Idempotency-Key`. All other routes ignore that header.
KEYED = re.compile(
    r"POST /v1/commands|POST /v1/app/command/send"
    r"|POST (/v1)?/devices/[^/]+/commands"
    r"|POST (/v1)?/commands/[^/]+/retry"
    r"|POST /v1/devices/[^/]+/commands/[^/]+/retry"
)


class Gone(Exception):
    """The client has closed its connection."""


class NoRoom(Exception):
    """The bodies of the requests that wait at this node fill the memory that they may have."""


class Room:
    """The memory for those bodies, in bytes. They are read before any key is checked."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0


class Asked:
    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.scope = scope
        self.method: str = self.scope["method"]
        self.headers: list[tuple[bytes, bytes]] = list(self.scope["headers"])
        self.body = b""
        self.started = self.accepted = False
        self.receive, self._send = receive, send
        self._gone: asyncio.Task[None] | None = None
        self._ends: asyncio.Timeout | None = None  # of the work that is under way
        self._room, self._taken = Room(0), 0

    @property
    def target(self) -> str:
        query = self.scope["query_string"].decode("latin-1")
        path: str = self.scope["raw_path"].decode("latin-1")
        return f"{path}?{query}" if query else path

    @property
    def path(self) -> str:
        """As the routes see it."""
        path: str = self.scope["path"].rstrip("/")
        return path

    @property
    def repeatable(self) -> bool:
        """Whether it does no harm if it is done twice."""
        if self.method in ("GET", "HEAD", "OPTIONS"):
            return not self.path.endswith("/commands/pending")  # it hands commands over
        keyed = any(name == b"idempotency-key" for name, _ in self.headers)
        route = f"{self.method} {self.path}"
        return (keyed and KEYED.fullmatch(route) is not None) or REPEATABLE.fullmatch(route) is not None

    @property
    def lasts(self) -> bool:
        """Whether its answer may take long: an event stream, or one that waits for the end of a command."""
        accepts = any(
            name == b"accept" and b"text/event-stream" in value.lower() for name, value in self.headers
        )
        return accepts or b"wait=" in self.scope["query_string"]

    async def read(self, room: Room) -> None:
        """Reads the body, and from then on watches whether the client goes away.

        Raises:
            Gone: it did.
            ValueError: the body is too large.
            NoRoom: too much is read already, of other requests.
        """
        self._room, body, more = room, bytearray(), True
        while more:
            event = cast(dict[str, Any], await self.receive())
            if event["type"] == "http.disconnect":
                raise Gone
            piece: bytes = event.get("body", b"")
            self._taken += len(piece)
            room.taken += len(piece)
            if room.taken > room.most:
                raise NoRoom
            body += piece
            more = event.get("more_body", False)
            if len(body) > BODY_BYTES:
                raise ValueError("the body is too large")
        self.body = bytes(body)
        self._gone = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while cast(dict[str, Any], await self.receive())["type"] != "http.disconnect":
            pass
        if self._ends is not None:
            self._ends.reschedule(0)

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises:
        Gone: the client went away first; the work was cancelled.
        """
        assert self._gone is not None
        if self._gone.done():
            work.close()
            raise Gone
        ends = self._ends = asyncio.timeout(None)
        try:
            async with ends:
                return await work
        except TimeoutError:
            if ends.expired():
                raise Gone from None
            raise
        finally:
            self._ends = None

    def close(self) -> None:
        self._room.taken -= self._taken
        self._taken = 0
        if self._gone is not None:
            self._gone.cancel()

    def replay(self) -> Receive:
        """What an app of this node receives: the body, then the end."""
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return cast(Message, {"type": "http.request", "body": self.body, "more_body": False})
            assert self._gone is not None
            await asyncio.shield(self._gone)
            return cast(Message, {"type": "http.disconnect"})

        return cast(Receive, receive)

    def passed(self) -> None:
        """A key was accepted on this connection."""
        if (told := self.scope.get(PASSED)) is not None:
            told()

    def report_passed(self) -> None:
        """From now on, an accepted key is noted in `accepted`: the connection is another node's."""

        def accepted() -> None:
            self.accepted = True

        self.scope[PASSED] = accepted

    # --- answering ---

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        start = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await self._send(cast(Message, start))

    async def piece(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def whole(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """A whole answer of this node itself."""
        given = {"content-length": str(len(body)), **headers}
        given |= {"cache-control": "no-store", "x-content-type-options": "nosniff"}
        await self.start(status, [(name.lower().encode(), text.encode()) for name, text in given.items()])
        await self.piece(b"" if self.method == "HEAD" else body, more=False)

    async def json(self, status: int, value: object, headers: Mapping[str, str] = {}) -> None:
        await self.whole(status, msgspec.json.encode(value), {"content-type": "application/json", **headers})

    async def refuse(
        self, code: str, message: str, details: dict[str, Any] | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        body = error_body(code, message, details)
        await self.json(STATUS[code], body, {**HEADERS.get(code, {}), **headers})
