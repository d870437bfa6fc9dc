"""The floor of a command's life: gmqtt publishes a command and gets the device's two answers through the same
Mosquitto. There is no HTTP and no log. gmqtt is a plain asyncio client, as a service would use it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from gmqtt import Client  # type: ignore[import-untyped]

from scripts.bench import processes
from scripts.bench.devices import PREFIX, hardware_id

IN_FLIGHT = 100
ANSWERS = ("acknowledged", "executed")
ROUND_WITHIN_SEC = 120
COMMAND = '{"id":"cmd_%026d","type":"lock","params":{"duration_sec":30,"reason":"door 7","by":"bench"}}'

Figures = dict[str, list[float]]


class _Trips:
    """Keeps IN_FLIGHT commands unanswered at a time until the wanted number has both answers."""

    def __init__(self, client: Client, devices: int) -> None:
        self._client = client
        self._topics = [f"{PREFIX}/{hardware_id(number)}/rls" for number in range(devices)]
        self._sent = self._heard = self._wanted = 0
        self._done: asyncio.Future[None]
        client.on_message = self._answered

    async def run(self, count: int) -> None:
        self._sent, self._heard, self._wanted = 0, 0, count
        self._done = asyncio.get_running_loop().create_future()
        for _ in range(min(IN_FLIGHT, count)):
            self._send()
        await self._done

    def _send(self) -> None:
        self._client.publish(self._topics[self._sent % len(self._topics)], COMMAND % self._sent, qos=1)
        self._sent += 1

    async def _answered(self, *_: Any) -> int:
        self._heard += 1
        if self._heard % len(ANSWERS) == 0 and self._sent < self._wanted:
            self._send()
        if self._heard == self._wanted * len(ANSWERS):
            self._done.set_result(None)
        return 0


async def floors(home: Path, rounds: int, count: int, devices: int, connections: int) -> Figures:
    """Commands with two answers a second, and the CPU time of the client for each."""
    figures: Figures = {name: [] for name in ("commands/s", "client CPU µs per command")}
    async with processes.mosquitto_server(home) as (port, _):
        async with processes.devices(home, port, devices, connections, ANSWERS):
            client = Client("bench")
            trips = _Trips(client, devices)
            await client.connect("127.0.0.1", port)
            client.subscribe(f"{PREFIX}/+/ack", qos=1)
            for number in range(rounds + 1):
                since, cpu = time.perf_counter(), time.process_time()
                async with asyncio.timeout(ROUND_WITHIN_SEC):
                    await trips.run(count)
                if number:  # round 0 is the warm-up
                    figures["commands/s"].append(count / (time.perf_counter() - since))
                    cpu_each = (time.process_time() - cpu) / count
                    figures["client CPU µs per command"].append(cpu_each * 1e6)
            await client.disconnect()
    return figures
