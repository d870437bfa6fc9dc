"""A reader of an event stream, directly on the ASGI app. It can stop reading and sees how the answer ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from litestar.types import ASGIApp


class Reader:
    """Collects what has arrived. While `reading` is not set it accepts nothing. `taken` is awaited with each
    piece before the next one."""

    def __init__(self) -> None:
        self.taken: Callable[[str], Awaitable[None]] | None = None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.text = ""
        self.ended = False
        self.reading = asyncio.Event()
        self.reading.set()
        self._news = asyncio.Condition()
        self._asked = False
        self._left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.text += message["body"].decode()
            self.ended = not message["more_body"]
            if self.taken is not None:
                await self.taken(message["body"].decode())
        async with self._news:
            self._news.notify_all()

    def leave(self) -> None:
        self._left.set()

    @property
    def events(self) -> list[dict[str, Any]]:
        """All complete CloudEvents. Asserts that each SSE id names its event's log and position."""
        found = []
        for block in self.text.split("\n\n")[1:-1]:  # the first block holds only the start position
            fields = [line.partition(": ") for line in block.split("\n")]
            assert [name for name, _, _ in fields if name not in ("", "retry")] == ["id", "data"]
            values = {name: value for name, _, value in fields}
            event = json.loads(values["data"])
            assert values["id"] == f"{event['source'].removeprefix('/ordain/')}:{event['id']}"
            found.append(event)
        return found

    @property
    def positions(self) -> list[int]:
        return [int(event["id"]) for event in self.events]

    async def has(self, count: int) -> list[dict[str, Any]]:
        """Waits for `count` events and returns the first `count`."""
        await self._when(lambda: len(self.events) >= count)
        return self.events[:count]

    async def end(self) -> None:
        await self._when(lambda: self.ended)

    async def _when(self, fact: Any) -> None:
        async with asyncio.timeout(120), self._news:
            await self._news.wait_for(fact)


@asynccontextmanager
async def reading(
    app: ASGIApp, key: str, query: str = "", *, method: str = "GET", **headers: str
) -> AsyncIterator[Reader]:
    """Opens `/v1/events` as a stream; the reader disconnects at the end."""
    reader = Reader()
    sent = {"accept": "text/event-stream", "authorization": f"Bearer {key}"} | headers
    scope: Any = {
        "type": "http",
        "method": method,
        "path": "/v1/events",
        "raw_path": b"/v1/events",
        "root_path": "",
        "scheme": "http",
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()],
    }
    task: asyncio.Task[None] = asyncio.create_task(app(scope, reader.receive, reader.send))  # type: ignore[arg-type]
    try:
        yield reader
    finally:
        reader.leave()
        reader.reading.set()
        await task
