"""The cost of a command over real MQTT: a bare round trip (the lower bound), and a full life over HTTP.

Both use the same kind of devices and the same Mosquitto. The duration of a life is read from the log, so
measuring does not add load.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx2
import msgspec

from broker.world import open_for_reading
from scripts.bench import processes
from scripts.bench.devices import PREFIX, hardware_id
from scripts.bench.load import Report
from scripts.bench.mqtt import Client

IN_FLIGHT = 100
ROUND_WITHIN_SEC = 120
LOOK_AGAIN_SEC = 0.005
COMMAND = b'{"id":"cmd_%026d","type":"lock","params":{"duration_sec":30,"reason":"door 7","by":"bench"}}'
LIVES = """SELECT c.recorded_at, e.recorded_at FROM events c JOIN events e ON e.stream = c.stream
    WHERE c.type = 'created' AND e.type = 'executed' AND c.position > ?"""

Figures = dict[str, list[float]]


class Round(Protocol):
    """Makes one round of lives: one request for each command, or, `fan_out`, one for all devices. `rate`:
    requests a second; 0: as fast as possible."""

    def __call__(self, *, fan_out: bool = False, rate: float = 0) -> Awaitable[dict[str, float]]: ...


class _Trips:
    """Keeps IN_FLIGHT commands unanswered at a time until the wanted number is answered."""

    def __init__(self, devices: int) -> None:
        self._topics = [f"{PREFIX}/{hardware_id(number)}/rls".encode() for number in range(devices)]
        self._sent = self._wanted = self._answered = 0
        self._done: asyncio.Future[None]
        self.client: Client

    async def run(self, count: int) -> None:
        self._sent = self._answered = 0
        self._wanted = count
        self._done = asyncio.get_running_loop().create_future()
        for _ in range(min(IN_FLIGHT, count)):
            self._send()
        self.client.flush()
        await self._done

    def answer(self, _topic: bytes, _payload: bytes) -> None:
        self._answered += 1
        if self._sent < self._wanted:
            self._send()
        elif self._answered == self._wanted:
            self._done.set_result(None)

    def _send(self) -> None:
        self.client.publish(self._topics[self._sent % len(self._topics)], COMMAND % self._sent)
        self._sent += 1


async def round_trips(home: Path, rounds: int, count: int, devices: int, connections: int) -> Figures:
    """Sends a command and waits for one answer; stores nothing. Measures the limit of MQTT alone."""
    figures: Figures = {name: [] for name in ("round trips/s", "client CPU µs per round trip")}
    trips = _Trips(devices)
    async with processes.mosquitto_server(home) as (port, _):
        async with processes.devices(home, port, devices, connections, ["executed"]):
            trips.client = await Client.open(port, "bench", trips.answer)
            await trips.client.subscribe([f"{PREFIX}/+/ack"])
            for number in range(rounds + 1):
                since, cpu = time.perf_counter(), time.process_time()
                async with asyncio.timeout(ROUND_WITHIN_SEC):
                    await trips.run(count)
                if number:  # round 0 is the warm-up
                    figures["round trips/s"].append(count / (time.perf_counter() - since))
                    cpu_each = (time.process_time() - cpu) / count
                    figures["client CPU µs per round trip"].append(cpu_each * 1e6)
            trips.client.close()
    return figures


async def lives(
    home: Path, rounds: int, count: int, devices: int, connections: int, profile: Path | None
) -> Figures:
    """Full lives: created over HTTP, published, acknowledged, executed. Every step is durable."""
    figures: Figures = {}
    async with living(home, count, devices, connections, profile=profile) as one_round:
        for number in range(rounds + 1):
            found = await one_round()
            fan_out = await one_round(fan_out=True)
            found |= {f"fan-out: {name}": value for name, value in fan_out.items()}
            if number:
                for name, value in found.items():
                    figures.setdefault(name, []).append(value)
    return figures


@asynccontextmanager
async def living(
    home: Path, count: int, devices: int, connections: int, *, own: bool = False, profile: Path | None = None
) -> AsyncIterator[Round]:
    """Runs a broker with its devices. Yields what makes one round of `count` lives and measures it.

    `own`: the devices connect to the broker's own MQTT server, each with its token, else to a Mosquitto.
    """
    async with AsyncExitStack() as stack:
        pids: dict[str, int] = {}
        mqtt_port = processes.unused_port()
        if not own:
            mqtt_port, pids["Mosquitto"] = await stack.enter_async_context(processes.mosquitto_server(home))
        served = processes.broker(home, mqtt_port, profile, own=own)
        port, pids["broker"] = await stack.enter_async_context(served)
        scopes = ["--scope", "devices:read", "--scope", "devices:write"]
        key = processes.ordain("keys", "create", "--project", "bench", *scopes, "--data", str(home))
        tokens = await register(port, key, devices)
        answers = ["acknowledged", "executed"]
        fleet = processes.devices(home, mqtt_port, devices, connections, answers, tokens if own else None)
        pids["devices"] = await stack.enter_async_context(fleet)
        log = open_for_reading(home)
        stack.callback(log.close)

        async def one_round(*, fan_out: bool = False, rate: float = 0) -> dict[str, float]:
            async with asyncio.timeout(ROUND_WITHIN_SEC):
                load = _load(port, key, devices, count, fan_out, rate)
                return await _round(log, load, count - count % devices if fan_out else count, pids)

        yield one_round


async def register(port: int, key: str, devices: int) -> dict[str, str]:
    """Registers the devices. Returns their tokens by hardware id."""
    headers, tokens = {"Authorization": f"Bearer {key}"}, {}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
        for number in range(devices):
            body = {"hardware_id": hardware_id(number), "type": "generic"}
            answer = (await client.post("/v1/devices", json=body)).raise_for_status()
            tokens[hardware_id(number)] = answer.json()["device_token"]
    return tokens


async def _round(
    log: sqlite3.Connection, load: Coroutine[Any, Any, Report], count: int, pids: dict[str, int]
) -> dict[str, float]:
    """One round: from the first request of a load process until the last command is executed."""
    (after,) = log.execute("SELECT max(position) FROM events").fetchone()
    before = {name: processes.cpu_sec(pid) for name, pid in pids.items()}
    report = await load
    while log.execute("SELECT 1 FROM commands WHERE closed_at IS NULL LIMIT 1").fetchone():  # noqa: ASYNC110 - another process's
        await asyncio.sleep(LOOK_AGAIN_SEC)
    spent = {name: processes.cpu_sec(pid) - before[name] for name, pid in pids.items()}
    spent["load"] = report.cpu_sec
    times = log.execute(LIVES, (after,)).fetchall()
    if len(times) != count:
        raise AssertionError(f"{count} commands were accepted, but {len(times)} were executed")
    seconds = (max(end for _, end in times) - min(start for start, _ in times)) / 1_000
    p50, p99 = quantiles([float(end - start) for start, end in times])
    http_p50, http_p99 = quantiles(report.latencies_ms)
    return {
        "lives/s": count / seconds,
        **{f"{name} CPU µs per life": value / count * 1e6 for name, value in spent.items()},
        "created to executed, p50 ms": p50,
        "created to executed, p99 ms": p99,
        "POST answered, p50 ms": http_p50,
        "POST answered, p99 ms": http_p99,
    }


async def _load(port: int, key: str, devices: int, count: int, fan_out: bool, rate: float) -> Report:
    program = [sys.executable, "-m", "scripts.bench.load", "--port", str(port), "--key", key]
    program += ["--devices", str(devices), "--count", str(count), "--rate", str(rate)]
    program += ["--fan-out"] if fan_out else []
    load = await asyncio.create_subprocess_exec(*program, cwd=processes.ROOT, stdout=asyncio.subprocess.PIPE)
    try:
        said, _ = await load.communicate()
    finally:
        if load.returncode is None:
            load.kill()
            await load.wait()
    if load.returncode:
        raise ConnectionError("the load could not be sent")
    return msgspec.json.decode(said, type=Report)


def quantiles(values: list[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
