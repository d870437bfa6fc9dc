"""Measures reads of past states (`as_of`, diff) over HTTP, on a log of ten million events, per kind of read.

`python -m scripts.bench.travel` fills a log in a temporary directory (several GB, some minutes), or uses the
log in `--data`. A real broker serves it, and one client reads at random points, one read at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx2
import msgspec

from broker.domain.events import (
    SYSTEM,
    Acknowledged,
    CommandEvent,
    Created,
    Defined,
    Event,
    Executed,
    Failed,
    Online,
    Published,
    Recorded,
    Registered,
    Started,
    TimedOut,
    definition_stream,
    device_stream,
)
from broker.domain.events import Error as EventError
from broker.engine.ids import new_id
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.world import DATABASE, SystemEntropy
from devices.clock import rfc3339
from devices.types import shipped_types
from projections import follower
from projections.follower import Fold
from scripts.bench.processes import broker, mosquitto_server, ordain

SINCE = 1_780_000_000_000  # time of the first event, ms
BUSY = 5  # devices with a long history; together they have a fifth of all commands
TOGETHER = 2_500  # commands whose lives overlap in the log
PROJECT, ACTOR = "bench", "key:key_01kagbx5wpf2ts6n8y7zq3v4me"
PARAMS = msgspec.Raw(b'{"duration_sec":30,"reason":"door 7","by":"bench"}')
DONE = Executed(result=msgspec.Raw(b'{"ok":true,"battery_percent":87}'))
DIGEST = "5d41402abc4b2a76b9719d911017c592"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--commands", type=int, default=2_500_000, help="four events each")
    options.add_argument("--devices", type=int, default=10_000)
    options.add_argument("--reads", type=int, default=300, help="reads of each kind")
    options.add_argument("--data", type=Path, help="directory of the log; an existing log is used again")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="ordain-travel-") as home:
        data = given.data or Path(home) / "data"
        if not (data / DATABASE).exists():
            since = time.perf_counter()
            data.mkdir(parents=True, exist_ok=True)
            fill(data / DATABASE, given.commands, given.devices)
            print(f"filled in {time.perf_counter() - since:.0f} s", flush=True)
        size = (data / DATABASE).stat().st_size / 1e9
        asyncio.run(measure(data, Path(home), given.reads, size))


def fill(path: Path, commands: int, devices: int) -> None:
    """Fills a log with whole command lives and its projections."""
    draw = random.Random(1)
    write(path, _batches(commands, devices, draw), draw)


def write(path: Path, batches: Iterable[list[Recorded]], draw: random.Random) -> None:
    """Makes a log of these events, and its projections. Uses the broker's own functions, one transaction for
    each batch."""
    sql = sqlite3.connect(path, isolation_level=None)
    sql.execute("PRAGMA journal_mode = WAL")
    sql.execute("PRAGMA synchronous = OFF")
    sql.execute("PRAGMA cache_size = -1000000")
    log.create(sql, "log_bench", "00" * 32)
    follower.prepare(sql)
    head = log.Head()
    for batch in batches:
        fold = Fold()
        for recorded in batch:
            fold.fold(recorded)
        sql.execute("BEGIN")
        head = log.append(sql, head, batch, draw.randbytes(16 * len(batch)))
        follower.write(sql, fold)
        sql.execute("COMMIT")
        if head.position % 1_000_000 < len(batch):
            print(f"{head.position:,} events", flush=True)
    sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sql.close()


def _batches(commands: int, devices: int, draw: random.Random) -> Iterator[list[Recorded]]:
    positions = iter(range(1, 10**9))

    def at(stream: str, version: int, device_id: str | None, event: Event) -> Recorded:
        position = next(positions)
        return Recorded(
            position=position,
            stream=stream,
            version=version,
            recorded_at=SINCE + position,
            decided_at=SINCE + position,
            project=PROJECT if device_id else "",
            device_id=device_id,
            actor=ACTOR,
            event=event,
        )

    definition = msgspec.to_builtins(shipped_types()["generic"].definition("lock"))
    names = [f"bench_{number:05}" for number in range(devices)]
    yield [
        at(SYSTEM, 1, None, Started(release="bench", mqtt="external")),
        at(definition_stream(DIGEST), 1, None, Defined(definition=definition)),
    ]
    registered: list[Event] = [
        Registered(hardware_id=name, device_type="generic", token_digest="x") for name in names
    ]
    rounds: tuple[tuple[int, list[Event]], ...] = ((1, registered), (2, [Online()] * devices))
    yield [
        at(device_stream(f"dev_{name}"), version, f"dev_{name}", event)
        for version, events in rounds
        for name, event in zip(names, events, strict=True)
    ]
    entropy = SystemEntropy()
    for start in range(0, commands, TOGETHER):
        chosen = [
            names[draw.randrange(BUSY) if draw.random() < 0.2 else draw.randrange(devices)]
            for _ in range(min(TOGETHER, commands - start))
        ]
        ids = [new_id("cmd", SINCE + start * 4 + each, entropy) for each in range(len(chosen))]
        ends = [_end(draw) for _ in chosen]
        batch = []
        for version in range(1, 5):
            for name, command_id, end in zip(chosen, ids, ends, strict=True):
                event = _created(name) if version == 1 else end[version - 2]
                batch.append(at(command_id, version, f"dev_{name}", event))
        yield batch


def _created(name: str) -> Created:
    return Created(
        hardware_id=name,
        type="lock",
        device_type="generic",
        definition=DIGEST,
        topic=f"iotee/dev/{name}/rls",
        params=PARAMS,
    )


def _end(draw: random.Random) -> tuple[CommandEvent, ...]:
    """The events after `created`: most commands are executed, some of them late, and a few fail."""
    chance = draw.random()
    if chance < 0.001:
        error = EventError(code="jammed", message="it does not move")
        return Published(attempt=1), Acknowledged(), Failed(error=error)
    if chance < 0.05:
        return Published(attempt=1), TimedOut(reason="no_answer"), msgspec.structs.replace(DONE, late=True)
    return Published(attempt=1), Acknowledged(), DONE


async def measure(data: Path, home: Path, reads: int, size: float) -> None:
    with sqlite3.connect(data / DATABASE) as sql:
        head = read_now(sql, log.head).position
        ids = [
            row[0]
            for row in sql.execute("SELECT stream FROM events WHERE type = 'created' AND position % 997 = 0")
        ]
        devices = sql.execute("SELECT count(*) FROM devices").fetchone()[0]
    sql.close()
    print(f"{head:,} events, {size:.1f} GB", flush=True)
    draw = random.Random(2)

    def point() -> str:
        position = draw.randrange(devices * 2 + 3, head)
        return str(position) if draw.random() < 0.5 else rfc3339(SINCE + position)

    def few() -> str:
        return f"bench_{draw.randrange(BUSY, devices):05}"

    def many() -> str:
        return f"bench_{draw.randrange(BUSY):05}"

    def between() -> str:
        start = draw.randrange(head - head // 100)
        return f"/v1/diff?from={start}&to={start + draw.randrange(head // 100)}&limit=100"

    kinds = {
        "one command": lambda: f"/v1/commands/{draw.choice(ids)}?as_of={point()}",
        "commands, 100": lambda: f"/v1/commands?limit=100&as_of={point()}",
        "commands, state=published": lambda: f"/v1/commands?limit=100&state=published&as_of={point()}",
        "commands, state=failed (1 in 1,000)": lambda: f"/v1/commands?limit=100&state=failed&as_of={point()}",
        "commands of a device": lambda: f"/v1/devices/{few()}/commands?limit=100&as_of={point()}",
        "commands of a device with 100,000": lambda: (
            f"/v1/devices/{many()}/commands?limit=100&as_of={point()}"
        ),
        "lane": lambda: f"/v1/devices/{few()}/lane?as_of={point()}",
        "lane of a device with 100,000": lambda: f"/v1/devices/{many()}/lane?as_of={point()}",
        "one device": lambda: f"/v1/devices/{few()}?as_of={point()}",
        "devices, 100": lambda: f"/v1/devices?limit=100&as_of={point()}",
        "diff, a page of 100": between,
    }
    print(f"{'ms, one read at a time':40} {'p50':>8} {'p95':>8} {'p99':>8} {'max':>8}", flush=True)
    made = ("--data", str(data), "--project", PROJECT, "--scope", "devices:read")
    headers = {"X-API-Key": ordain("keys", "create", *made)}
    async with (
        mosquitto_server(home) as (mqtt_port, _),
        broker(data, mqtt_port, None) as (port, _),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client,
    ):
        for name, make in kinds.items():
            took = []
            for _ in range(reads):
                path = make()
                since = time.perf_counter()
                answer = await client.get(path)
                took.append((time.perf_counter() - since) * 1e3)
                if answer.status_code not in (200, 404):
                    raise SystemExit(f"{path}: {answer.text}")
            cuts = statistics.quantiles(took, n=100)
            print(f"{name:40} {cuts[49]:8.1f} {cuts[94]:8.1f} {cuts[98]:8.1f} {max(took):8.1f}", flush=True)


if __name__ == "__main__":
    main()
