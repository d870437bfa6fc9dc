"""The benchmark's load: creates commands over keep-alive HTTP, one request at a time per connection, as fast
as they are answered or at a fixed rate.

It is a separate process, so that it does not use the CPU time of the measured process. It prints one line of
JSON: seconds, CPU seconds, and the latencies of the requests in ms. A status that is not 200 or 201 ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import cast

import msgspec
import uvloop

from scripts.bench.devices import hardware_id

CONNECTIONS = 32
BODY = b'{"type":"lock","params":{"duration_sec":30,"reason":"door 7","by":"bench"}}'
FAN_OUT = b'{"devices":%s,"type":"lock","params":{"duration_sec":30,"reason":"door 7","by":"bench"}}'
REQUEST = (
    b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %s\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)
LENGTH = b"\r\ncontent-length: "


class Report(msgspec.Struct, kw_only=True):
    """The result of the load. `latencies_ms` has one entry per request, from the time at which it was due."""

    seconds: float
    cpu_sec: float
    latencies_ms: list[float]


class _Load:
    """The shared state of all connections: the requests, and how many are still to be sent. `gap`: seconds
    between two requests; 0: as fast as they are answered. `idle`: connections that wait for a request."""

    def __init__(self, key: str, devices: int, count: int, fan_out: bool, gap: float) -> None:
        self._gap = gap
        self._start = time.perf_counter()
        self.idle: list[_Connection] = []
        names = [hardware_id(number) for number in range(devices)]
        bodies = {f"/v1/devices/{name}/commands": BODY for name in names}
        if fan_out:
            bodies = {"/v1/commands": FAN_OUT % msgspec.json.encode(names)}
        self._requests = [
            REQUEST % (path.encode(), key.encode(), len(body), body) for path, body in bodies.items()
        ]
        self._count = count // devices if fan_out else count
        self._sent = 0
        self.latencies_ms: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        self._start = time.perf_counter()

    def next(self) -> tuple[bytes, float] | None:
        """A request and when it is due; None if none is due now."""
        due = self._start + self._sent * self._gap if self._gap else time.perf_counter()
        if self._sent == self._count or due > time.perf_counter():
            return None
        self._sent += 1
        return self._requests[self._sent % len(self._requests)], due

    async def pace(self) -> None:
        """Gives each request to an idle connection when it is due."""
        while self._gap and self._sent < self._count:
            await asyncio.sleep(max(0, self._start + self._sent * self._gap - time.perf_counter()))
            waiting, self.idle = self.idle, []
            for connection in waiting:
                connection.send()
            if not waiting:
                await asyncio.sleep(self._gap)  # all are busy: the next one that is answered takes it

    def answered(self, seconds: float) -> None:
        self.latencies_ms.append(seconds * 1_000)
        if len(self.latencies_ms) == self._count:
            self.done.set_result(None)

    def failed(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(why))


class _Connection(asyncio.Protocol):
    def __init__(self, load: _Load) -> None:
        self._load = load
        self._rest = b""
        self._since = 0.0
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's class is not a subclass of it

    def connection_lost(self, error: Exception | None) -> None:
        self._load.failed(f"the broker closed a connection: {error}")

    def send(self) -> None:
        if (found := self._load.next()) is None:
            self._load.idle.append(self)
        else:
            request, self._since = found
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        head, blank, body = self._rest.partition(b"\r\n\r\n")
        if not blank:
            return
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
            self._load.failed(f"expected 200 or 201, got {self._rest.decode(errors='replace')[:300]}")
            return
        if len(body) >= int(head.partition(LENGTH)[2].partition(b"\r\n")[0]):
            self._rest = b""
            self._load.answered(time.perf_counter() - self._since)
            self.send()


async def _run(port: int, key: str, devices: int, count: int, fan_out: bool, rate: float) -> Report:
    load = _Load(key, devices, count, fan_out, 1 / rate if rate else 0)
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: _Connection(load), "127.0.0.1", port))[1]
        for _ in range(CONNECTIONS)
    ]
    since, cpu = time.perf_counter(), time.process_time()
    load.begin()
    for connection in connections:
        connection.send()
    await load.pace()
    await load.done
    return Report(
        seconds=time.perf_counter() - since,
        cpu_sec=time.process_time() - cpu,
        latencies_ms=load.latencies_ms,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--port", "--devices", "--count"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--rate", type=float, default=0, help="requests a second; 0: as fast as possible")
    parser.add_argument("--fan-out", action="store_true", help="each request is for all devices")
    given = parser.parse_args()
    try:
        report = uvloop.run(
            _run(given.port, given.key, given.devices, given.count, given.fan_out, given.rate)
        )
    except OSError as error:
        sys.exit(f"load: {error}")
    print(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main()
