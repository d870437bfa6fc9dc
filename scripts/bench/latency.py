"""How long one command takes: at low load beside its floors, and at 70 % of what the broker can hold.

    python -m scripts.bench.latency

At low load one command at a time is sent to a device at a Mosquitto; this process is client and device, so
one clock measures both. The floors alternate with the commands: an fsync of 4 KiB on the same disk, and one
message through the same Mosquitto. The load at 70 % has its requests at fixed times, and a request that waits
for a free connection waits as part of its latency. It only prints figures.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import IO

import uvloop

from scripts.bench import processes
from scripts.bench.devices import PREFIX, RESULTS, hardware_id
from scripts.bench.life import living, quantiles, register
from scripts.bench.load import BODY, REQUEST
from scripts.bench.mqtt import Client

SHARE = 0.7
PAUSE_SEC = 0.02
BLOCK = bytes(4_096)
WITHIN_SEC = 10
SCOPES = ("--scope", "devices:read", "--scope", "devices:write")

Figures = dict[str, list[float]]


class _Device:
    """A client of the broker and its device. Also the two ends of a bare message."""

    def __init__(self) -> None:
        self.came: asyncio.Future[float]
        self.client: Client

    def message(self, topic: bytes, payload: bytes) -> None:
        if not self.came.done():  # a command that is sent again
            self.came.set_result(time.perf_counter())
        if topic.endswith(b"/rls"):
            command_id = payload.partition(b'"id":"')[2].partition(b'"')[0]
            for answer in RESULTS.values():
                self.client.publish(topic.removesuffix(b"rls") + b"ack", answer % command_id)

    def wait(self) -> asyncio.Future[float]:
        self.came = asyncio.get_running_loop().create_future()
        return self.came


async def low(home: Path, count: int) -> Figures:
    """The time of each command until it is answered and until it is at the device, and of the floors, ms."""
    figures: Figures = {name: [] for name in ("fsync", "one-way", "POST answered", "at the device")}
    async with AsyncExitStack() as stack:
        mqtt_port, _ = await stack.enter_async_context(processes.mosquitto_server(home))
        port, _ = await stack.enter_async_context(processes.broker(home, mqtt_port, None))
        key = processes.ordain("keys", "create", "--project", "bench", *SCOPES, "--data", str(home))
        await register(port, key, 1)
        device, name = _Device(), hardware_id(0)
        device.client = await Client.open(mqtt_port, name, device.message)
        await device.client.subscribe([f"{PREFIX}/{name}/rls", "bare"])
        device.client.publish(f"{PREFIX}/{name}/status".encode(), b"online", retain=True)
        await device.client.settled()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        path = f"/v1/devices/{name}/commands".encode()
        request = REQUEST % (path, key.encode(), len(BODY), BODY)
        file = stack.enter_context((home / "fsync").open("wb", buffering=0))
        for number in range(count + count // 10):
            floors = _fsync(file), await _bare(device)
            found = (*floors, *await _command(device, reader, writer, request))
            if number >= count // 10:  # the first ones are the warm-up
                for values, value in zip(figures.values(), found, strict=True):
                    values.append(value * 1_000)
    return figures


def _fsync(file: IO[bytes]) -> float:
    file.write(BLOCK)
    since = time.perf_counter()
    os.fsync(file.fileno())
    return time.perf_counter() - since


async def _fsyncs(path: Path, times: list[float]) -> None:
    """Measures an fsync again and again, until it is cancelled; ms."""
    with path.open("wb", buffering=0) as file:
        while True:
            times.append(await asyncio.to_thread(_fsync, file) * 1_000)
            await asyncio.sleep(PAUSE_SEC)


async def _bare(device: _Device) -> float:
    came, since = device.wait(), time.perf_counter()
    device.client.publish(b"bare", BODY)
    device.client.flush()
    return await came - since


async def _command(
    device: _Device, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[float, float]:
    """Until the answer, and until the command is at the device. Then waits until its answers are recorded."""
    came, since = device.wait(), time.perf_counter()
    writer.write(request)
    async with asyncio.timeout(WITHIN_SEC):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        answered = time.perf_counter() - since
        assert head.startswith(b"HTTP/1.1 201"), head
        arrived = await came - since
        await device.client.settled()
    await asyncio.sleep(PAUSE_SEC)
    return answered, arrived


async def loaded(home: Path, rounds: int, count: int) -> Figures:
    """Rounds at full speed, each followed by one at 70 % of its rate, and fsyncs of this process."""
    figures: Figures = {}
    async with living(home, count, 100, 4) as one_round:
        for number in range(rounds + 1):
            most = (await one_round())["lives/s"]
            times: list[float] = []
            syncing = asyncio.create_task(_fsyncs(home / "fsync", times))
            found = await one_round(rate=most * SHARE)
            syncing.cancel()
            if number:
                found = {name: value for name, value in found.items() if name.endswith("ms")}
                found |= {"fsync, p50 ms": statistics.median(times), "fsync, p99 ms": quantiles(times)[1]}
                for name, value in {"lives/s at full speed": most, **found}.items():
                    figures.setdefault(name, []).append(value)
    return figures


def show(figures: Figures) -> None:
    p50, p99 = {}, {}
    for name, values in figures.items():
        p50[name], p99[name] = quantiles(values)
        print(f"{name:20} p50 {p50[name]:7.2f} ms   p99 {p99[name]:7.2f} ms", flush=True)
    floor = p50["fsync"] + p50["one-way"]
    for name, above in (("POST answered", p50["fsync"]), ("at the device", floor)):
        print(f"{name:20} p50 - floor {p50[name] - above:6.2f} ms   p99 / p50 {p99[name] / p50[name]:5.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000, help="commands at low load")
    parser.add_argument("--lives", type=int, default=4_000, help="in each round of the load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="directory for the log; not a file system in memory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ordain-latency-", dir=given.dir) as home:
        for part in ("low", "loaded"):
            (Path(home) / part).mkdir()
        show(uvloop.run(low(Path(home) / "low", given.count)))
        for name, values in uvloop.run(loaded(Path(home) / "loaded", given.rounds, given.lives)).items():
            print(f"70 % load  {name:32} " + "  ".join(f"{value:8.1f}" for value in values))


if __name__ == "__main__":
    main()
