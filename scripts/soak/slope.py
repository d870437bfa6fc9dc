"""Memory growth: the broker's RSS over cycles of creating and executing commands on online devices.

RSS is sampled between cycles, when no command is open, so the samples show only memory that stays. After a
warm-up a straight line is fitted to at least three samples.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from pathlib import Path

from scripts.soak.backlog import DEVICE_TYPE, DONE_WITHIN_SEC
from scripts.soak.judge import Figures, judge
from scripts.soak.load import Load
from scripts.soak.world import World, until

# Commands per device in one cycle; a device's queue holds at most 100 per name.
EACH = 50
PER = 100_000


async def run(home: Path, given: argparse.Namespace, figures: Figures) -> list[str]:
    """Runs it and fills in the figures. Returns the faults as sentences."""
    world = World(home, DEVICE_TYPE, trace=given.trace)
    try:
        await world.open(given.devices)
        await world.tell_fleet("online")
        load = Load(world.port, world.key, world.names)
        samples: list[tuple[int, float]] = []
        since, cpu = time.monotonic(), world.broker.cpu_sec()
        for closed in _steps(given.count, given.devices * EACH):
            await load.run(closed - len(load.accepted))
            await until(lambda: not world.open_commands(), "a cycle is executed", DONE_WITHIN_SEC)
            if closed % given.every < given.devices * EACH:
                if given.trace:
                    world.broker.running.send_signal(signal.SIGUSR2)
                rss = world.broker.rss_mb()
                figures[f"broker RSS after {closed}, MB"] = rss
                samples.append((closed, rss))
        took = time.monotonic() - since
        figures["lives/s"] = given.count / took
        figures["broker CPU µs per life"] = (world.broker.cpu_sec() - cpu) / given.count * 1e6
        figures["broker RSS peak, MB"] = world.broker.peak_mb()
        late = [(closed, rss) for closed, rss in samples if closed >= given.warm_up]
        if len(late) > 2:
            line = statistics.linear_regression([closed for closed, _ in late], [rss for _, rss in late])
            figures[f"MB per {PER} closed, {len(late)} samples"] = line.slope * PER
        return await judge(world, load.accepted.values(), figures)
    finally:
        await world.close()


def _steps(count: int, cycle: int) -> list[int]:
    return [*range(cycle, count, cycle), count]
