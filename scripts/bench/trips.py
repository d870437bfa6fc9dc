"""Round trips for all servers of part e. It must import nothing of the broker: one server runs old code."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = b'{"id":"cmd_01m8cqx018ehrt8srw7z3bz3vs","type":"open","params":{},"attempt":1}'
# The properties that the broker sends with a command on MQTT 5.
PROPERTIES: dict[str, Any] = {
    "correlation": b"cmd_01m8cqx018ehrt8srw7z3bz3vs",
    "response_topic": "iotee/dev/device-000/ack",
    "expiry_sec": 10,
    "user_properties": (("attempt", "1"),),
}


class Trips:
    """Keeps `window` commands in flight to `names`, in turn, and measures the time of each."""

    def __init__(self, names: list[Any], send: Callable[[Any], None]) -> None:
        self._names = deque(names)
        self._send = send
        self._since: dict[Any, float] = {}
        self._took: list[float] = []
        self._left = 0
        self._done: asyncio.Future[None]

    async def run(self, count: int, window: int, rate: float) -> dict[str, float]:
        self._took, self._left = [], count
        self._done = asyncio.get_running_loop().create_future()
        cpu, began = time.process_time(), time.perf_counter()
        self._paced = rate > 0
        if self._paced:
            await self._pace(count, rate)
        else:
            for _ in range(min(window, len(self._names))):
                self._next()
        await self._done
        took, seconds = sorted(self._took), time.perf_counter() - began
        return {
            "trips_per_sec": len(took) / seconds,
            "cpu_us": (time.process_time() - cpu) / len(took) * 1e6,
            "p50_ms": took[len(took) // 2] * 1e3,
            "p99_ms": took[len(took) * 99 // 100] * 1e3,
        }

    async def _pace(self, count: int, rate: float) -> None:
        began, sent = time.perf_counter(), 0
        while sent < count:
            due = min(count, int((time.perf_counter() - began) * rate))
            while sent < due and self._names:
                self._next()
                sent += 1
            await asyncio.sleep(0.001)

    def _next(self) -> None:
        name = self._names.popleft()
        self._since[name] = time.perf_counter()
        self._send(name)

    def answered(self, name: Any) -> None:
        since = self._since.pop(name, None)
        if since is None:
            return
        self._took.append(time.perf_counter() - since)
        self._names.append(name)
        self._left -= 1
        if not self._left:
            self._done.set_result(None)
        elif not self._paced and len(self._since) < self._left:
            self._next()


async def serve(port: int, connected: Callable[[], int], trips: Callable[[], Trips]) -> None:
    """Prints the port, and then one line of JSON for each line of JSON that it reads: what it measured."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    print(json.dumps({"port": port, "rss": _rss()}), flush=True)
    while line := await reader.readline():
        order = json.loads(line)
        if "connected" in order:
            while connected() < order["connected"]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            answer: dict[str, float] = {"rss": _rss(), "cpu": time.process_time()}
        else:
            answer = await trips().run(order["count"], order["window"], order.get("rate", 0))
        print(json.dumps(answer), flush=True)


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
