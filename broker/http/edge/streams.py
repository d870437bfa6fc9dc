"""Open streams of server-sent events. Their number per project is limited.

A stream ends when its key is revoked or when the broker stops. A slow reader delays only its own stream.
A stream keeps at most one batch of events in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from litestar import Request, Response
from litestar.types import ASGIApp, Receive, Scope, Send

from broker.domain.cloudevents import Entry, Wanted, encoded
from broker.domain.errors import Refusal, Unavailable
from broker.engine.commands import Caller
from broker.http.edge.positions import full
from broker.seams import Unknown
from broker.subscriptions.feed import Feed, Subscription

PING_SEC = 15.0
PIECE_BYTES = 65_536
# The first message has an id but no data: it tells the client the current position. If a stream that began
# "now" breaks before its first event, the client continues from this position, not from a later "now".
BEGIN = b"retry: 3000\nid: %b\n\n"
PING = b": ping\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
# In JSON a line break is only white space between tokens. In an event stream it would end the field.
ONE_LINE = bytes.maketrans(b"\r\n", b"  ")


class Streams:
    """`most`: limit of open streams per project. `sent`: called with the number of events of each write."""

    def __init__(self, feed: Feed, log_id: str, most: int, sent: Callable[[int], None]) -> None:
        self._sent = sent
        self._feed = feed
        self._log_id = log_id
        self._most = most
        self._open: dict[Subscription, Caller] = {}
        self._closing = False
        self._followed = 0  # streams so far

    @property
    def open(self) -> int:
        return len(self._open)

    @property
    def most(self) -> int:
        return self._most

    def of(self, project: str | None) -> int:
        """The number of open streams of a project; None: of admin keys."""
        return sum(other.project == project for other in self._open.values())

    @property
    def lag(self) -> int:
        """The lag of the slowest stream, in events."""
        return max((subscription.lag for subscription in self._open), default=0)

    def close(self) -> None:
        """Ends every stream and refuses new ones, because the broker stops."""
        self._closing = True
        for subscription in self._open:
            subscription.end()

    def revoked(self, actor: str) -> None:
        """Ends the streams of a key that was revoked or has expired. `actor`: `key:` and the key's id."""
        for subscription, caller in self._open.items():
            if caller.actor == actor:
                subscription.end()

    @contextmanager
    def opened(self, caller: Caller, wanted: Wanted, after: int) -> Iterator[Subscription]:
        """Opens a subscription for one stream and counts it for its project.

        Raises:
            Refusal: rate_limit_exceeded, if the project has too many open streams.
            Unavailable: the broker is stopping.
        """
        if self._closing:
            raise Unavailable("the broker is stopping")
        if self.of(caller.project) >= self._most:
            raise Refusal("rate_limit_exceeded", f"this project already has {self._most} open streams")
        with self._feed.subscribed(wanted, after) as subscription:
            self._open[subscription] = caller
            try:
                yield subscription
            finally:
                del self._open[subscription]

    async def run(self, subscription: Subscription, after: int, receive: Receive, send: Send) -> None:
        """Writes events until the client disconnects or the subscription ends."""
        gone = asyncio.create_task(_gone(receive, subscription))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await _say(send, BEGIN % full(self._log_id, after).encode())
            # If the log is away, the client comes again, and goes on after its last event.
            with suppress(Unknown):
                await self._follow(subscription, send)
            await _say(send, b"", more=False)
        finally:
            gone.cancel()
            await asyncio.wait({gone})

    async def _follow(self, subscription: Subscription, send: Send) -> None:
        time = asyncio.get_running_loop().time
        # Each stream has a pause of its own: all together would block the loop.
        self._followed += 1
        pause = PING_SEC * (1 - self._followed % 128 / 512)
        due = time() + pause
        while not subscription.ended:
            entries = await subscription.next(max(0.0, due - time()))
            if entries:
                self._sent(len(entries))
                for piece, reached in self._pieces(entries):
                    if not subscription.ended:
                        await _say(send, piece)
                    if subscription.stale:
                        subscription.give_back(reached)
                        break
            elif subscription.ended or (entries is not None and time() < due):
                continue
            else:
                await _say(send, PING)
            due = time() + pause

    def _pieces(self, entries: list[Entry]) -> Iterator[tuple[bytes, int]]:
        """The bytes of each write, and the position of the last event in it."""
        piece, log_id = bytearray(), self._log_id.encode()
        for entry in entries:
            data = encoded(self._log_id, entry).translate(ONE_LINE)
            piece += b"id: %b:%d\ndata: %b\n\n" % (log_id, entry.position, data)
            if len(piece) >= PIECE_BYTES:
                yield bytes(piece), entry.position
                piece.clear()
        if piece:
            yield bytes(piece), entries[-1].position


class Stream(Response[Any]):
    """The streaming answer. `check` runs just before the stream opens: the key may be revoked by then."""

    def __init__(
        self,
        streams: Streams,
        caller: Caller,
        wanted: Wanted,
        after: int,
        check: Callable[[], Awaitable[None]],
    ) -> None:
        self.streams, self.caller, self.wanted, self.after, self.check = streams, caller, wanted, after, check

    def to_asgi_response(  # type: ignore[override]
        self, app: None, request: Request[Any, Any, Any], **_: Any
    ) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await self.check()
            with self.streams.opened(self.caller, self.wanted, self.after) as subscription:
                if cast(dict[str, Any], scope).get("head"):  # HEAD: send only the headers
                    subscription.end()
                await self.streams.run(subscription, self.after, receive, send)

        return answer


async def _gone(receive: Receive, subscription: Subscription) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    subscription.end()


async def _say(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
