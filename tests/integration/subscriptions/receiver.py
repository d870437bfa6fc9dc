"""The receiver of a webhook: a real HTTP server that keeps its requests and answers as a test says."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from tests.streams import stream_server


class Got(msgspec.Struct, frozen=True):
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.body)
        return event

    @property
    def position(self) -> int:
        return int(self.event["id"])


Reply = tuple[int, dict[str, str]]


class Receiver:
    """`reply` returns the answer to each request. While `gate` is not set, no answer is sent."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.connections = 0
        self.port = 0
        self.reply: Callable[[Got], Reply] = lambda _: (204, {})
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.body = b""
        self._news = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def until(self, fact: Callable[[], bool], within_sec: float = 120) -> None:
        async with asyncio.timeout(within_sec), self._news:
            await self._news.wait_for(fact)

    async def count(self, number: int) -> list[Got]:
        """Waits for this many requests and returns them."""
        await self.until(lambda: len(self.got) >= number)
        return self.got

    async def served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:])
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                got = Got(head[0].split()[1], headers, body)
                async with self._news:
                    self.got.append(got)
                    self.waiting += 1
                    self._news.notify_all()
                await self.gate.wait()
                self.waiting -= 1
                status, more = self.reply(got)
                fields = "".join(f"{key}: {value}\r\n" for key, value in more.items())
                answer = f"HTTP/1.1 {status} X\r\n{fields}"
                if status != 204:
                    answer += f"content-length: {len(self.body)}\r\n"
                writer.write(answer.encode() + b"\r\n" + self.body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving(
    host: str = "127.0.0.1", context: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with stream_server(receiver.served, host, port, context) as receiver.port:
        yield receiver
