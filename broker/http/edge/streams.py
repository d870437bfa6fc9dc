"""Open streams of server-sent events: bounded for each project, ended with their key or with us.

A stream waits for its reader and nobody waits for a stream; it holds a batch of events and no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from litestar import Request, Response
from litestar.types import ASGIApp, Receive, Scope, Send

from broker.domain.cloudevents import Entry, Wanted, encoded
from broker.domain.errors import Refusal, Unavailable
from broker.engine.commands import Caller
from broker.subscriptions.feed import Feed, Subscription

PING_SEC = 15.0
PIECE_BYTES = 65_536
# An id without data is no event, and says where the stream stands: one that began "now" and broke before its
# first event goes on from there, and not from a later "now".
BEGIN = b"retry: 3000\nid: %d\n\n"
PING = b": ping\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
# In JSON a line's end is only space between tokens; in a stream it would end the field.
ONE_LINE = bytes.maketrans(b"\r\n", b"  ")


class Streams:
    """`most` is how many streams a project may have open; `sent` is told how many events go out."""

    def __init__(self, feed: Feed, log_id: str, most: int, sent: Callable[[int], None]) -> None:
        self._sent = sent
        self._feed = feed
        self._log_id = log_id
        self._most = most
        self._open: dict[Subscription, Caller] = {}
        self._closing = False

    @property
    def open(self) -> int:
        return len(self._open)

    @property
    def lag(self) -> int:
        """Of the one that is furthest behind, in events."""
        return max((subscription.lag for subscription in self._open), default=0)

    def close(self) -> None:
        """We end: every stream does, and no new one begins."""
        self._closing = True
        for subscription in self._open:
            subscription.end()

    def revoked(self, actor: str) -> None:
        """A key was taken away, and its streams with it."""
        for subscription, caller in self._open.items():
            if caller.actor == actor:
                subscription.end()

    @contextmanager
    def opened(self, caller: Caller, wanted: Wanted, after: int) -> Iterator[Subscription]:
        """A place for one stream.

        Raises:
            Refusal: rate_limit_exceeded, if the project has too many open.
            Unavailable: we are about to end.
        """
        if self._closing:
            raise Unavailable("the broker is ending")
        if sum(other.project == caller.project for other in self._open.values()) >= self._most:
            raise Refusal("rate_limit_exceeded", f"this project has {self._most} streams open already")
        with self._feed.subscribed(wanted, after) as subscription:
            self._open[subscription] = caller
            try:
                yield subscription
            finally:
                del self._open[subscription]

    async def run(self, subscription: Subscription, after: int, receive: Receive, send: Send) -> None:
        """Writes until the reader has gone or the subscription was ended."""
        gone = asyncio.create_task(_gone(receive, subscription))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await _say(send, BEGIN % after)
            await self._follow(subscription, send)
            await _say(send, b"", more=False)
        finally:
            gone.cancel()
            await asyncio.wait({gone})

    async def _follow(self, subscription: Subscription, send: Send) -> None:
        time = asyncio.get_running_loop().time
        due = time() + PING_SEC
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
            due = time() + PING_SEC

    def _pieces(self, entries: list[Entry]) -> Iterator[tuple[bytes, int]]:
        """What is sent at once, and the position that is reached with it."""
        piece = bytearray()
        for entry in entries:
            data = encoded(self._log_id, entry).translate(ONE_LINE)
            piece += b"id: %d\ndata: %b\n\n" % (entry.position, data)
            if len(piece) >= PIECE_BYTES:
                yield bytes(piece), entry.position
                piece.clear()
        if piece:
            yield bytes(piece), entries[-1].position


class Stream(Response[Any]):
    """The answer that does not end. `check` comes last before it opens: the key may have gone by now."""

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
                if cast(dict[str, Any], scope).get("head"):  # only what it would begin with is asked for
                    subscription.end()
                await self.streams.run(subscription, self.after, receive, send)

        return answer


async def _gone(receive: Receive, subscription: Subscription) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    subscription.end()


async def _say(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
