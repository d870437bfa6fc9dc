"""The effect of a purge on sending: latency of sends without a purge, and while old commands are erased.

    python -m scripts.bench.purge --commands 1000000 --dir /tmp/bench

The old commands are written directly into the log, with times a year ago. The sends use the real core on a
real disk, one after the other at a steady pace, each until it is durable. It only prints figures.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from pathlib import Path

import msgspec
import structlog
import uvloop

from broker.core import Core
from broker.domain.events import Created, Event, Executed, Published, Recorded
from broker.domain.fleet import DeviceState
from broker.engine.commands import Caller, Order
from broker.engine.registry import NewDevice
from broker.log import sqlite as log
from broker.seams import Message, Outgoing, Receipt, Sqlite
from broker.settings import Settings
from broker.world import DATABASE, SqliteStorage, SystemClock, SystemEntropy
from devices.types import shipped_types
from projections import follower
from projections.follower import Fold
from tests.reading import tamper

DEVICES = 1_000
CHUNK = 5_000
YEAR_MS = 365 * 86_400_000
PAUSE_SEC = 0.01
ADMIN = Caller(actor="key:bench", project=None)
PARAMS = msgspec.Raw(b'{"duration_sec":30,"reason":"door 7, delivery of the morning","by":"bench"}')
RESULT = msgspec.Raw(b'{"locked":true,"battery_percent":87,"took_ms":1204}')


class Taken:
    """A link to an MQTT server that accepts everything and whose devices answer at once."""

    up = True

    def __init__(self, core: Core) -> None:
        self._core = core

    def publish(self, outgoing: Outgoing, done) -> bool:  # type: ignore[no-untyped-def]
        asyncio.get_running_loop().call_soon(self._answer, outgoing, done)
        return True

    def _answer(self, outgoing: Outgoing, done) -> None:  # type: ignore[no-untyped-def]
        done(Receipt(written=True, reason=0))
        said = b'{"id":"%s","status":"executed"}' % (outgoing.correlation or b"")
        self._core.intake.message(Message(topic=outgoing.topic.replace("/rls", "/ack"), payload=said))

    direct = False

    def listens(self, topic: str) -> bool:
        return True

    def puback(self, message: object, reason: int = 0, text: str = "") -> None:
        return


async def fill(core: Core, devices: list[DeviceState], commands: int) -> None:
    """Writes closed commands with three events each, at the current end of the log."""
    written = 0
    while written < commands:
        count = min(CHUNK, commands - written)
        head = await core.storage.read(log.head)
        events, fold = _lives(head.position, head.recorded_at, written, count, devices)

        def work(sql: Sqlite, after=head, events=events, fold=fold) -> None:  # type: ignore[no-untyped-def]
            log.append(sql, after, events, core.writer.entropy.token(16 * len(events)))
            follower.write(sql, fold)

        await tamper(core.storage, work)
        written += count


def _lives(
    position: int, at: int, first: int, count: int, devices: list[DeviceState]
) -> tuple[list[Recorded], Fold]:
    events, fold = list[Recorded](), Fold()
    for number in range(first, first + count):
        device = devices[number % len(devices)]
        created = Created(
            hardware_id=device.hardware_id,
            type="lock",
            device_type="generic",
            definition="bench",
            topic=f"iotee/dev/{device.hardware_id}/rls",
            params=PARAMS,
        )
        life: tuple[Event, ...] = (created, Published(attempt=1), Executed(result=RESULT))
        for version, event in enumerate(life, 1):
            position += 1
            events.append(
                Recorded(
                    position=position,
                    stream=f"cmd_{number:026d}",
                    version=version,
                    recorded_at=at,
                    decided_at=at,
                    project="bench",
                    device_id=device.id,
                    actor="key:bench",
                    event=event,
                )
            )
            fold.fold(events[-1])
    return events, fold


async def sends(core: Core, devices: list[DeviceState], until: asyncio.Event | float) -> list[float]:
    """Sends a command every 10 ms. Returns the time of each until it is durable, ms."""
    took: list[float] = []
    end = time.monotonic() + until if isinstance(until, float) else None
    while time.monotonic() < end if end is not None else not until.is_set():  # type: ignore[union-attr]
        device = devices[len(took) * 7919 % len(devices)]
        start = time.perf_counter()
        order = Order(device=device.id, type="lock", params={"number": len(took)}, ttl_sec=None)
        await core.commands.create(ADMIN, order)
        took.append((time.perf_counter() - start) * 1_000)
        await asyncio.sleep(max(0, PAUSE_SEC - took[-1] / 1_000))
    return took


def told(name: str, took: list[float]) -> None:
    took = sorted(took)
    at = {f"p{part:g}": took[min(len(took) - 1, int(len(took) * part / 100))] for part in (50, 90, 99, 99.9)}
    figures = "  ".join(f"{name} {ms:8.2f} ms" for name, ms in at.items())
    print(f"{name:24} {len(took):7} sends  {figures}  max {took[-1]:8.2f} ms", flush=True)


async def measure(directory: Path, commands: int, quiet_sec: float) -> None:
    storage = await SqliteStorage.open(directory)
    core = Core(storage, SystemClock(), SystemEntropy(), shipped_types(), Settings())
    past = await _made_in_the_past(core, commands)
    core.attach(Taken(core))
    async with core.running("embedded"):
        core.intake.link_up()
        for device in past:
            core.intake.device_online(device.hardware_id)
        await asyncio.sleep(3)
        print(f"{commands} old commands, {_size(directory)} MB, {_memory()} MB of memory", flush=True)
        told("without a purge", await sends(core, past, quiet_sec))
        over = asyncio.Event()
        sending = asyncio.create_task(sends(core, past, over))
        start = time.perf_counter()
        purged = await core.erasures.purge(ADMIN, 30)
        answered = time.perf_counter() - start
        await core.erasures.finished()
        took = time.perf_counter() - start
        over.set()
        told("while it is purged", await sending)
        print(
            f"{purged.amount} commands: answered in {answered * 1_000:.0f} ms, erased in {took:.1f} s "
            f"({purged.amount / took:.0f}/s); {_memory()} MB of memory, {_size(directory)} MB on the disk"
        )
    await storage.close()


async def _made_in_the_past(core: Core, commands: int) -> list[DeviceState]:
    """Registers devices and writes the old commands with the clock set back a year; then resets the clock."""
    writer = core.writer
    writer._since_ms -= YEAR_MS
    await core.open(embedded=True)
    running = asyncio.create_task(writer.run())
    issued = []
    for number in range(DEVICES):
        new = NewDevice(hardware_id=f"bench-{number}", type="generic", project="bench")
        issued.append(asyncio.create_task(core.registry.register(ADMIN, new)))
    devices = [(await each).device for each in issued]
    await writer.drain()
    running.cancel()
    await fill(core, devices, commands)
    writer._since_ms += YEAR_MS
    await writer.start()
    return devices


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_024


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob(f"{DATABASE}*")) // 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commands", type=int, default=1_000_000)
    parser.add_argument("--quiet-sec", type=float, default=20.0)
    parser.add_argument("--dir", type=Path, help="directory for the log; not a file system in memory")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    with tempfile.TemporaryDirectory(prefix="ordain-purge-", dir=given.dir) as home:
        uvloop.run(measure(Path(home) / "data", given.commands, given.quiet_sec))


if __name__ == "__main__":
    main()
