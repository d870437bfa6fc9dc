"""The longest queue: commands wait for very many devices that are offline; then all come online at once.

The log is filled directly, since a million requests would take longer than what is measured. The devices are
those of the benchmark, many on one connection, and answer at once. Each device's commands must be handed over
in the order of their creation, each once, and none may be lost. It gives the rate, the memory of a waiting
command, and how long a device waits until its queue is empty.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from broker.domain.events import (
    SYSTEM,
    Created,
    Defined,
    Event,
    Recorded,
    Registered,
    Started,
    definition_stream,
    device_stream,
)
from broker.engine.ids import new_id
from broker.world import DATABASE, SystemEntropy, open_for_reading
from devices.types import shipped_types
from scripts.bench import processes
from scripts.bench.devices import PREFIX, hardware_id
from scripts.bench.travel import write
from scripts.soak.judge import STATES, Figures

CONNECTIONS = 4
BATCH = 5_000  # events
READY_WITHIN_SEC, DRAINED_WITHIN_SEC = 300, 3_600
LOOK_AGAIN_SEC = 0.5
DIGEST = "5d41402abc4b2a76b9719d911017c592"
PARAMS = msgspec.Raw(b'{"duration_sec":30,"reason":"door 7","by":"soak"}')
TTL_MS = 86_400_000
ORDER = "SELECT device_id, stream FROM events WHERE type = ? ORDER BY position"
# From the `online` of a device to its last `executed`, ms.
WAITS = """SELECT max(CASE WHEN type = 'executed' THEN recorded_at END)
    - min(CASE WHEN type = 'online' THEN recorded_at END) FROM events
    WHERE type IN ('online', 'executed') GROUP BY device_id"""
MOST_RATIO = 3  # of the longest wait to the median


async def run(home: Path, given: argparse.Namespace, figures: Figures) -> list[str]:
    """Runs it and fills in the figures. Returns the faults as sentences."""
    alone = await _memory(home / "alone", given.devices, 0)
    data = home / "data"
    _fill(data, given.devices, given.count)
    async with processes.mosquitto_server(home) as (mqtt_port, _):
        since = time.monotonic()
        served = processes.broker(data, mqtt_port, None, within=READY_WITHIN_SEC)
        async with served as (_, pid):
            figures["start with the queue, s"] = time.monotonic() - since
            figures["start with the queue, CPU s"] = processes.cpu_sec(pid)
            figures["memory of a waiting command, bytes (aim: 1,000)"] = (_rss(pid) - alone) / given.count
            since, cpu = time.monotonic(), processes.cpu_sec(pid)
            fleet = processes.devices(
                home, mqtt_port, given.devices, CONNECTIONS, ["executed"], within=READY_WITHIN_SEC
            )
            async with fleet, asyncio.timeout(DRAINED_WITHIN_SEC):
                while _ask(data, "SELECT 1 FROM commands WHERE closed_at IS NULL LIMIT 1"):  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(LOOK_AGAIN_SEC)
            figures["commands/s"] = given.count / (time.monotonic() - since)
            figures["broker CPU µs of each"] = (processes.cpu_sec(pid) - cpu) / given.count * 1e6
            figures["broker RSS peak, MB"] = _rss(pid, "VmHWM") / 1e6
    waits = [wait for (wait,) in _ask(data, WAITS) if wait is not None]
    ratio = max(waits) / max(1, statistics.median(waits))
    figures["wait of a device, median, s"] = statistics.median(waits) / 1_000
    figures["wait of a device, longest / median"] = ratio
    faults = _judge(data, given.count)
    if ratio > MOST_RATIO:
        faults.append(f"the longest wait is {ratio:.1f} times the median; at most {MOST_RATIO} are right")
    return faults


def _judge(data: Path, count: int) -> list[str]:
    """Compares the order of hand-over with the order of creation, and the states with what must be."""
    faults = []
    created, published, executed = [_in_order(data, event) for event in ("created", "published", "executed")]
    first = {device: [*dict.fromkeys(commands)] for device, commands in published.items()}  # without resends
    for what, order in (("got", first), ("executed", executed)):
        wrong = [device for device, commands in created.items() if order.get(device) != commands]
        if wrong:
            faults.append(f"{len(wrong)} devices {what} commands in another order or number: {wrong[:3]}")
    if (states := _ask(data, STATES)) != [("executed", count)]:
        faults.append(f"{count} commands were created, but their states are {states}")
    return faults


def _in_order(data: Path, event: str) -> dict[str, list[str]]:
    """The commands of each device that have this event, in its order in the log."""
    order: dict[str, list[str]] = {}
    for device, command in _ask(data, ORDER, event):
        order.setdefault(device, []).append(command)
    return order


async def _memory(data: Path, devices: int, count: int) -> float:
    """The memory of a broker with this many devices and commands, bytes."""
    _fill(data, devices, count)
    async with processes.mosquitto_server(data) as (mqtt_port, _):
        served = processes.broker(data, mqtt_port, None, within=READY_WITHIN_SEC)
        async with served as (_, pid):
            return _rss(pid)


def _rss(pid: int, field: str = "VmRSS") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1_024 for line in lines if line.startswith(f"{field}:"))


def _ask(data: Path, question: str, *values: str) -> list[Any]:
    with closing(open_for_reading(data)) as log:
        return log.execute(question, values).fetchall()


def _fill(data: Path, devices: int, count: int) -> None:
    data.mkdir(parents=True)
    write(data / DATABASE, _batches(devices, count), random.Random(1))


def _batches(devices: int, count: int) -> Iterator[list[Recorded]]:
    batch: list[Recorded] = []
    for position, (stream, device_id, event) in enumerate(_events(devices, count), 1):
        at = time.time_ns() // 1_000_000
        batch.append(
            Recorded(
                position=position,
                stream=stream,
                version=1,
                recorded_at=at,
                decided_at=at,
                project="soak" if device_id else "",
                device_id=device_id,
                actor="operator",
                event=event,
            )
        )
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def _events(devices: int, count: int) -> Iterator[tuple[str, str | None, Event]]:
    """The first events of streams: stream, device id, event. The commands go to the devices in turn."""
    definition = msgspec.to_builtins(shipped_types()["generic"].definition("lock"))
    yield SYSTEM, None, Started(release="soak", mqtt="external")
    yield definition_stream(DIGEST), None, Defined(definition=definition)
    entropy = SystemEntropy()
    now = time.time_ns() // 1_000_000
    ids = [new_id("dev", now, entropy) for _ in range(devices)]
    for number, device_id in enumerate(ids):
        about = Registered(hardware_id=hardware_id(number), device_type="generic", token_digest="x")
        yield device_stream(device_id), device_id, about
    for number in range(count):
        name = hardware_id(number % devices)
        now = time.time_ns() // 1_000_000
        yield (
            new_id("cmd", now, entropy),
            ids[number % devices],
            Created(
                hardware_id=name,
                type="lock",
                device_type="generic",
                definition=DIGEST,
                topic=f"{PREFIX}/{name}/rls",
                params=PARAMS,
                expires_at=now + TTL_MS,
                ttl_ms=TTL_MS,
            ),
        )
