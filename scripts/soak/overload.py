"""Twice the load that the broker can hold, with devices that answer many commands twice.

The broker may refuse requests: with 429 or 503, and a `Retry-After`. What it accepted must be executed, once
and in order, and its memory must stay within a bound.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from scripts.soak.judge import Figures, judge
from scripts.soak.load import CONNECTIONS, Load
from scripts.soak.world import World, until

DEVICE_TYPE = 'name = "soak"\nopen = true\n'
DOUBLED = 0.3  # the share of the commands that are answered twice
MORE_MB = 150  # full queues and connections need less
CLOSED_WITHIN_SEC = 1_800


async def run(home: Path, given: argparse.Namespace, figures: Figures) -> list[str]:
    """Runs it and fills in the figures. Returns the faults as sentences."""
    world = World(home, DEVICE_TYPE, config=f"[limits]\nqueue_per_name = {given.queue}\n")
    try:
        await world.open(given.devices, doubled=DOUBLED)
        await world.tell_fleet("online")
        load = Load(world.port, world.key, world.names)
        held = await _held(world, load, given.warm_up)
        figures["commands/s that it holds"] = held
        before = figures["broker RSS before, MB"] = world.broker.rss_mb()
        load.refused = 0
        since, rate = time.monotonic(), given.times * held
        count = max(
            round(rate * given.seconds), 4 * CONNECTIONS
        )  # more than wait at once, however slow it is
        await load.run(count, rate)
        figures["commands/s accepted under more than that"] = count / (time.monotonic() - since)
        figures["requests refused: 429 or 503"] = load.refused
        peak = figures["broker RSS peak, MB"] = world.broker.peak_mb()
        await until(lambda: not world.open_commands(), "all is closed", CLOSED_WITHIN_SEC)
        found = await judge(world, load.accepted.values(), figures)
        if not load.refused:
            found.append("nothing was refused: the load was too small")
        if load.no_time:
            found.append(f"{load.no_time} refusals had no Retry-After")
        if peak > before + MORE_MB:
            found.append(
                f"memory grew from {before:.0f} to {peak:.0f} MB; at most {MORE_MB} MB more are right"
            )
        return found
    finally:
        await world.close()


async def _held(world: World, load: Load, count: int) -> float:
    """Commands per second from the order to the last `executed`, as fast as clients and devices can."""
    since = time.monotonic()
    await load.run(count)
    await until(lambda: not world.open_commands(), "the first commands are closed", CLOSED_WITHIN_SEC)
    return count / (time.monotonic() - since)
