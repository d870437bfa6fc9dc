"""The cost of one command to very many devices over HTTP, and its effect on another project's requests.

The devices are offline, so the benchmark measures durable acceptance, not delivery.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable
from pathlib import Path

import httpx2
import msgspec

from scripts.bench import processes
from scripts.bench.devices import hardware_id

DEVICES = 10_000
AT_ONCE = 50
WITHIN_SEC = 120
BODY = {"type": "lock", "params": {"duration_sec": 30, "reason": "door 7", "by": "bench"}}
JSON = {"Content-Type": "application/json"}

Figures = dict[str, list[float]]


async def fan_outs(home: Path, rounds: int) -> Figures:
    figures: Figures = {}
    async with (
        processes.mosquitto_server(home) as (mqtt_port, _),
        processes.broker(home, mqtt_port, None) as (port, broker),
        _client(home, port, "bench") as client,
        _client(home, port, "other") as neighbour,
    ):
        names = [hardware_id(number) for number in range(DEVICES)]
        for start in range(0, DEVICES, AT_ONCE):
            await asyncio.gather(*(_register(client, name) for name in names[start : start + AT_ONCE]))
        await _register(neighbour, "neighbour")
        for number in range(rounds + 1):
            found = {"neighbour's POST alone, ms p99": _p99(await _posts(neighbour, asyncio.sleep(1)))}
            for kind, key in (("without a key", None), ("with a key", f"k{number}"), ("again", f"k{number}")):
                body = BODY | {"devices": names} | ({} if key is None else {"idempotency_key": key})
                encoded, cpu = msgspec.json.encode(body), processes.cpu_sec(broker)
                since = time.perf_counter()
                sent = asyncio.create_task(_send(client, encoded))
                waited = await _posts(neighbour, sent) if key is None else []
                await sent
                seconds, cpu = time.perf_counter() - since, processes.cpu_sec(broker) - cpu
                found[f"devices/s, {kind}"] = DEVICES / seconds
                found[f"CPU µs per device, {kind}"] = cpu / DEVICES * 1e6
                if waited:
                    found["neighbour's POST meanwhile, ms p99"] = _p99(waited)
            if number:  # round 0 is the warm-up
                for name, value in found.items():
                    figures.setdefault(name, []).append(value)
    return figures


def _client(home: Path, port: int, project: str) -> httpx2.AsyncClient:
    scopes = ["--scope", "devices:read", "--scope", "devices:write"]
    key = processes.ordain("keys", "create", "--project", project, *scopes, "--data", str(home))
    return httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=WITHIN_SEC
    )


async def _register(client: httpx2.AsyncClient, name: str) -> None:
    body = {"hardware_id": name, "type": "generic"}
    (await client.post("/v1/devices", json=body)).raise_for_status()


async def _send(client: httpx2.AsyncClient, body: bytes) -> None:
    answer = await client.post("/v1/commands", content=body, headers=JSON)
    outcomes = answer.raise_for_status().json().values()
    assert sum("command_id" in outcome for outcome in outcomes) == DEVICES


async def _posts(client: httpx2.AsyncClient, until: Awaitable[None]) -> list[float]:
    """Sends single commands, one after the other, until `until` is done. Returns the time of each, ms."""
    done = asyncio.ensure_future(until)
    taken = []
    while not done.done():
        since = time.perf_counter()
        (await client.post("/v1/devices/neighbour/commands", json=BODY)).raise_for_status()
        taken.append((time.perf_counter() - since) * 1_000)
    return taken


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]
