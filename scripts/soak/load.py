"""The soak's load: creates commands over keep-alive HTTP, and retries until each is answered.

When a connection ends or the broker is away, it waits and sends the same request with the same idempotency
key. It must never create two commands with the same number.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

import msgspec

NAMES = ("lock", "unlock", "dim", "refresh")
CONNECTIONS = 32
AGAIN_SEC = 0.05
ANSWER_WITHIN_SEC = 30
REQUEST = (
    "POST /v1/devices/{device}/commands HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
    "content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
)
BODY = '{{"type":"{name}","params":{{"number":{number}}},"ttl_sec":null,"idempotency_key":"soak-{number}"}}'
TAKEN = (200, 201)
# A full queue, a rate limit, or a broker that is not ready: the request is retried.
LATER = (429, 503)


class _Created(msgspec.Struct):
    id: str


_created = msgspec.json.Decoder(_Created).decode


class Load:
    """Sends all commands of a run to the devices in turn. `accepted`: command id by number."""

    def __init__(self, port: int, key: str, devices: Sequence[str]) -> None:
        self._port, self._key, self._devices = port, key, devices
        self._next = 0
        self.accepted: dict[int, str] = {}
        self.refused = 0
        self.broken = 0
        self.no_time = 0  # refusals that do not say when to come again

    async def run(self, count: int, rate: float | None = None) -> None:
        """Creates `count` more commands, `rate` a second. Returns when all are answered."""
        numbers = iter(range(self._next, self._next + count))
        start, first = time.monotonic(), self._next
        self._next += count
        async with asyncio.TaskGroup() as group:
            for _ in range(min(CONNECTIONS, count)):
                group.create_task(self._connection(numbers, first, start, rate))

    async def _connection(self, numbers: Iterator[int], first: int, start: float, rate: float | None) -> None:
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for number in numbers:
            if rate is not None:
                await asyncio.sleep(start + (number - first) / rate - time.monotonic())
            while number not in self.accepted:
                try:
                    line = line or await asyncio.open_connection("127.0.0.1", self._port)
                    async with asyncio.timeout(ANSWER_WITHIN_SEC):
                        status, head, body = await self._ask(*line, number)
                except (OSError, EOFError):  # OSError includes TimeoutError
                    self.broken += line is not None
                    if line is not None:
                        line[1].close()
                    line = None
                    await asyncio.sleep(AGAIN_SEC)
                    continue
                if status in TAKEN:
                    self.accepted[number] = _created(body).id
                elif status in LATER:
                    self.refused += 1
                    self.no_time += b"\r\nretry-after: " not in head
                    await asyncio.sleep(AGAIN_SEC)
                else:
                    raise ValueError(f"command {number} was answered {status}: {body.decode()[:300]}")
        if line is not None:
            line[1].close()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> tuple[int, bytes, bytes]:
        device = self._devices[number % len(self._devices)]
        name = NAMES[number // len(self._devices) % len(NAMES)]
        body = BODY.format(name=name, number=number)
        writer.write(REQUEST.format(device=device, key=self._key, length=len(body), body=body).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
        return int(head[9:12]), head, await reader.readexactly(length)
