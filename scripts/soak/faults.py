"""`make faults`: real processes under faults at random moments, and at named points of the broker's start.

The broker is killed, stopped and ended; its wall clock is stepped; Mosquitto is stopped and restarted; the
connections between them and the devices are slow, cut and half-open; writes fail; the disk is full and loses
power (as root). Backups are taken meanwhile. When all faults are over, `judge` compares the log with the
devices' books.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

from scripts.bench import processes
from scripts.soak.drive import Drive
from scripts.soak.judge import Figures, judge
from scripts.soak.load import Load
from scripts.soak.proxy import Proxy
from scripts.soak.stepped import Step
from scripts.soak.world import World, until

# Longer than any fault, so that every command is executed in the end.
DEVICE_TYPE = 'name = "soak"\nopen = true\nack_timeout_sec = 10\nresult_timeout_sec = 120\n'
SLOW, SLOW_SEC = 0.3, (0.2, 3.0)
PAUSE_SEC = 4.0
HALF_OPEN_SEC, STOPPED_SEC, DELAY_SEC, FULL_SEC = (2.0, 8.0), (1.0, 15.0), (0.05, 1.0), (1.0, 8.0)
DAY_SEC, STEPPED_SEC = 86_400.0, (1.0, 8.0)
ENDS_WITHIN_SEC, CLOSED_WITHIN_SEC = 60, 900
LONGEST_FILE = 2 << 20  # shorter than the journal gets between two checkpoints, longer than what is logged
POINTS = ("ordain.sock", "event=broker.serving", "event=mqtt.link_up")
LAST = "SELECT position, hash FROM events ORDER BY position DESC LIMIT 1"
HASH = "SELECT hash FROM events WHERE position = {}"


async def run(home: Path, given: argparse.Namespace, figures: Figures) -> list[str]:
    """Runs it and fills in the figures. Returns the faults as sentences."""
    drive = _drive(home)
    figures["disk faults"] = "yes" if drive else "no: they need root, mkfs.ext4 and loop devices"
    ports = processes.unused_port(), processes.unused_port()
    clock = Step(home / "clock")
    data = drive.root / "data" if drive else None
    world = World(home, DEVICE_TYPE, data=data, via=ports, clock=home / "clock")
    proxies = [Proxy(port, world.mqtt_port) for port in ports]
    trouble = Trouble(world, drive, proxies, clock, random.Random(given.seed))
    try:
        for proxy in proxies:
            await proxy.start()
        await world.open(given.devices, slow=SLOW, slow_sec=SLOW_SEC)
        await world.tell_fleet("online")
        load = Load(world.port, world.key, world.names)
        async with asyncio.TaskGroup() as group:
            creating = group.create_task(load.run(round(60 * given.minutes * given.rate), given.rate))
            await trouble.run(60 * given.minutes)
            await creating
        await until(lambda: not world.open_commands(), "all is closed", CLOSED_WITHIN_SEC)
        figures |= {f"faults: {name}": count for name, count in sorted(trouble.counts.items())}
        figures["backups"] = len(trouble.backups)
        figures["requests retried: no answer"] = load.broken
        figures["requests retried: 429 or 503"] = load.refused
        return trouble.found + trouble.no_prefix() + await judge(world, load.accepted.values(), figures)
    finally:
        await world.close()
        for proxy in proxies:
            proxy.close()
        if drive is not None:
            drive.close()


def _drive(home: Path) -> Drive | None:
    if os.geteuid() != 0:
        return None
    drive = Drive(home)
    try:
        drive.open()
    except (OSError, subprocess.CalledProcessError):  # a container may be root and not allowed to mount
        drive.close()
        return None
    return drive


class Trouble:
    """All faults, one after the other. Each is over when its method returns."""

    def __init__(
        self, world: World, drive: Drive | None, proxies: list[Proxy], clock: Step, draw: random.Random
    ) -> None:
        self.found: list[str] = []
        self.counts: Counter[str] = Counter()
        self.backups: list[Path] = []
        self._world, self._drive, self._proxies, self._clock = world, drive, proxies, clock
        self._random = draw
        self._faults: dict[Callable[[], Awaitable[None]], int] = {
            self._kill: 4,
            self._kill_at_a_point: 3,
            self._stop: 3,
            self._end: 2,
            self._stop_mosquitto: 1,
            self._restart_mosquitto: 2,
            self._delay: 2,
            self._cut: 3,
            self._halve: 3,
            self._back_up: 2,
            self._step_clock: 2,
            self._fail: 1,
        }
        if drive is not None:
            self._faults |= {self._fill: 2, self._lose_power: 3}

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self._random.expovariate(1 / PAUSE_SEC)))
            fault = self._random.choices(list(self._faults), list(self._faults.values()))[0]
            self.counts[fault.__name__.strip("_").replace("_", " ")] += 1
            await fault()

    def no_prefix(self) -> list[str]:
        """O5: every backup is a prefix of the log."""
        found = []
        for backup in self.backups:
            with closing(sqlite3.connect(backup)) as sql:
                position, digest = sql.execute(LAST).fetchone()
            if self._world.ask(HASH.format(int(position))) != [(digest,)]:
                found.append(f"{backup.name} with {position} events is no prefix of the log")
        return found

    # --- the broker

    async def _kill(self) -> None:
        await self._world.broker.end()
        await self._world.start_broker()

    async def _kill_at_a_point(self) -> None:
        """Kills it during its start, which goes on from the work of the life before."""
        world, point = self._world, self._random.choice(POINTS)
        await world.broker.end()
        said = world.broker.log.stat().st_size
        (world.data / point).unlink(missing_ok=True)
        await world.broker.start()
        await until(lambda: self._is_there(point, said), point)
        await self._kill()

    def _is_there(self, point: str, said: int) -> bool:
        if "=" not in point:
            return (self._world.data / point).exists()
        with self._world.broker.log.open("rb") as log:
            log.seek(said)
            return point.encode() in log.read()

    async def _stop(self) -> None:
        await self._hold(self._world.broker.running)

    async def _end(self) -> None:
        broker = self._world.broker.running
        await self._world.broker.end(signal.SIGTERM)
        if broker.returncode != 0:
            self.found.append(f"after SIGTERM the broker ended with {broker.returncode}")
        await self._world.start_broker()

    async def _step_clock(self) -> None:
        """The wall clock jumps, and comes back. A start before the last event sends nothing until then."""
        by = self._random.uniform(-DAY_SEC, DAY_SEC)
        self._clock.set(by)
        if by < 0:
            await self._world.broker.end()
            await self._world.broker.start()
        await asyncio.sleep(self._random.uniform(*STEPPED_SEC))
        self._clock.set(0)
        await self._world.ready()

    async def _hold(self, process: asyncio.subprocess.Process) -> None:
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._random.uniform(*STOPPED_SEC))
        process.send_signal(signal.SIGCONT)

    async def _back_up(self) -> None:
        file = self._world.home / f"backup-{self.counts['back up']}.db"
        before = int(self._world.ask(LAST)[0][0] or 0)
        try:
            await asyncio.to_thread(processes.ordain, "backup", str(file), "--data", str(self._world.data))
        except subprocess.CalledProcessError as error:
            self.found.append(f"no backup: {error.stderr}")
            return
        self.backups.append(file)
        with closing(sqlite3.connect(file)) as sql:
            if sql.execute(LAST).fetchone()[0] < before:
                self.found.append(f"{file.name} ends before position {before}, which was there before it")

    async def _fail(self) -> None:
        """O3: after the first I/O error the broker ends, and says so. The error: a file may not grow."""
        broker = self._world.broker.running
        resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (LONGEST_FILE, resource.RLIM_INFINITY))
        try:
            async with asyncio.timeout(ENDS_WITHIN_SEC):
                if await broker.wait() == 0:
                    self.found.append("after an I/O error the broker ended with 0")
        except TimeoutError:
            self.found.append(f"{ENDS_WITHIN_SEC} s after an I/O error the broker still runs")
        await self._kill()

    # --- Mosquitto, and the ways to it

    async def _stop_mosquitto(self) -> None:
        assert self._world.mosquitto is not None
        await self._hold(self._world.mosquitto.running)

    async def _restart_mosquitto(self) -> None:
        assert self._world.mosquitto is not None
        await self._world.mosquitto.end(signal.SIGTERM)  # killed, it would lose what it acknowledged
        await asyncio.sleep(self._random.uniform(0, 5))
        await self._world.start_mosquitto()

    async def _delay(self) -> None:
        proxy = self._random.choice(self._proxies)
        proxy.delay_sec = self._random.uniform(*DELAY_SEC)
        await asyncio.sleep(self._random.uniform(2, 10))
        proxy.delay_sec = 0.0

    async def _cut(self) -> None:
        self._random.choice(self._proxies).cut()

    async def _halve(self) -> None:
        await self._random.choice(self._proxies).halve(self._random.uniform(*HALF_OPEN_SEC))

    # --- the disk

    async def _fill(self) -> None:
        assert self._drive is not None
        await asyncio.to_thread(self._drive.fill)
        await asyncio.sleep(self._random.uniform(*FULL_SEC))
        self._drive.make_room()

    async def _lose_power(self) -> None:
        assert self._drive is not None
        self._drive.lose_power()
        await self._world.broker.end()
        await asyncio.to_thread(self._drive.mend)
        await self._world.start_broker()
