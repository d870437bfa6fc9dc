"""The server side of part e, in a process of its own: the listener or the floor, without a broker.

It prints its port, and then one line of JSON for each line of JSON that it reads: what it measured.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvloop

from broker.mqtt.access import Access
from broker.mqtt.listener import Listener
from broker.mqtt.services import Services
from broker.mqtt.sockets import Sockets
from broker.mqtt.tls import Certificates
from broker.seams import Message, Outgoing, Receipt
from broker.settings import MqttLimits
from broker.subscriptions.feed import Feed
from devices.mqtt_url import Endpoint
from scripts.bench.floor import Floor

COMMAND = b'{"id":"cmd_01m8cqx018ehrt8srw7z3bz3vs","type":"open","params":{},"attempt":1}'
# What the broker sends with it on MQTT 5.
PROPERTIES: dict[str, Any] = {
    "correlation": b"cmd_01m8cqx018ehrt8srw7z3bz3vs",
    "response_topic": "iotee/dev/device-000/ack",
    "expiry_sec": 10,
    "user_properties": (("attempt", "1"),),
}


class Trips:
    """Keeps `window` commands under way to `names`, in turn, and takes the time of each."""

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


class Owner:
    """Lets everybody in; acknowledges in the next turn, as a commit would at the soonest."""

    def __init__(self) -> None:
        self.listener: Listener
        self.here: dict[str, None] = {}
        self.trips: Trips | None = None

    async def check(self, hardware_id: str, token: str | None) -> str | None:
        return None

    def link_up(self) -> None: ...

    def link_down(self, why: str) -> None: ...

    def device_online(self, hardware_id: str) -> None:
        self.here[hardware_id] = None

    def device_offline(self, hardware_id: str) -> None:
        self.here.pop(hardware_id, None)

    def message(self, message: Message) -> None:
        asyncio.get_running_loop().call_soon(self.listener.puback, message)
        if self.trips is not None:
            self.trips.answered(message.topic.split("/")[2])

    def send(self, name: str) -> None:
        message = Outgoing(topic=f"iotee/dev/{name}/rls", payload=COMMAND, **PROPERTIES)
        self.listener.publish(message, _ignore)


def _ignore(receipt: Receipt) -> None: ...


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["listener", "floor"])
    parser.add_argument("--certificate", default="")
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if given.kind == "floor":
        await _floor()
    else:
        await _listener(given.certificate)


async def _listener(certificate: str) -> None:
    owner = Owner()
    bounds = MqttLimits(strangers=50_000, strangers_per_address=50_000)
    access = Access(prefix="iotee", check_device=owner.check)
    # No service comes in, so that its feed is never asked.
    services = Services(cast(Feed, None), access.events, lambda: "", lambda name: None)
    owner.listener = Listener(access, owner, services, bounds)
    endpoint = Endpoint("127.0.0.1", 0, tls=bool(certificate))
    certificates = Certificates(certificate, "") if certificate else None
    sockets = Sockets(owner.listener, [endpoint], certificates=certificates)
    owner.listener.start()
    await sockets.open()

    def trips() -> Trips:
        owner.trips = Trips(list(owner.here), owner.send)
        return owner.trips

    await _serve(sockets.endpoints[0].port, lambda: len(owner.here), trips)


async def _floor() -> None:
    clients: list[Floor] = []
    current: list[Trips] = []

    def said(client: Floor, payload: bytes) -> None:
        if current:
            current[-1].answered(client)

    server = await asyncio.get_running_loop().create_server(
        lambda: Floor(clients, said), "127.0.0.1", 0, backlog=4_096
    )

    def trips() -> Trips:
        current.append(Trips(list(clients), lambda client: client.send(COMMAND)))
        return current[-1]

    await _serve(server.sockets[0].getsockname()[1], lambda: len(clients), trips)


async def _serve(port: int, connected: Callable[[], int], trips: Callable[[], Trips]) -> None:
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


if __name__ == "__main__":
    uvloop.run(main())
