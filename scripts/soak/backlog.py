"""The long queue: commands for many devices that are offline; then all devices come online at once.

The broker is killed halfway through creating and halfway through delivering. No command may be lost, executed
twice or out of order, and none may be sent while its device is offline.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from scripts.soak.judge import STATES, Figures, judge
from scripts.soak.load import Load
from scripts.soak.world import World, until

DEVICE_TYPE = 'name = "soak"\nopen = true\n'
# Time limit for creating all commands, and for executing all of them.
DONE_WITHIN_SEC = 1_800
LAST_END = "SELECT max(recorded_at) FROM events WHERE type = 'executed'"


async def run(home: Path, given: argparse.Namespace, figures: Figures) -> list[str]:
    """Runs it and fills in the figures. Returns the faults as sentences."""
    world = World(home, f"{DEVICE_TYPE}ack_timeout_sec = {given.ack_timeout}\n", child=given.child)
    try:
        await world.open(given.devices)
        await world.tell_fleet("online")
        await world.tell_fleet("offline")
        await until(lambda: world.recorded("offline") >= given.devices, "all devices are known to be offline")
        figures["broker RSS before, MB"] = world.broker.rss_mb()
        load = Load(world.port, world.key, world.names)
        await _create(world, load, given.count, figures)
        states = world.ask(STATES)
        faults = [] if states == [("pending", given.count)] else [f"all are offline, but states are {states}"]
        await _deliver(world, given.count, figures)
        return faults + await judge(world, load.accepted.values(), figures)
    finally:
        await world.close()


async def _create(world: World, load: Load, count: int, figures: Figures) -> None:
    since, cpu = time.monotonic(), world.broker.cpu_sec()
    creating = asyncio.create_task(load.run(count))
    await until(lambda: creating.done() or len(load.accepted) >= count / 2, "half created", DONE_WITHIN_SEC)
    down = await _kill(world)
    figures["restart while creating, s"] = down
    async with asyncio.timeout(DONE_WITHIN_SEC):
        await creating
    took = time.monotonic() - since
    figures["creating, s"] = took
    figures["creates/s, without the restart"] = count / (took - down)
    figures["creating, broker CPU µs each"] = (world.broker.cpu_sec() - cpu) / count * 1e6
    figures["requests retried: no answer"] = load.broken
    figures["requests retried: 429 or 503"] = load.refused
    figures["broker RSS with the queue, MB"] = world.broker.rss_mb()


async def _deliver(world: World, count: int, figures: Figures) -> None:
    began_ms, cpu = time.time() * 1_000, world.broker.cpu_sec()
    await world.tell_fleet("online")
    figures["all online after, s"] = time.time() - began_ms / 1_000
    await until(lambda: world.open_commands() <= count / 2, "half of it is executed", DONE_WITHIN_SEC)
    figures["half executed after, s"] = time.time() - began_ms / 1_000
    figures["restart while delivering, s"] = await _kill(world)
    await until(lambda: not world.open_commands(), "all of it is executed", DONE_WITHIN_SEC)
    took = (float(world.ask(LAST_END)[0][0] or 0) - began_ms) / 1_000
    figures["online to the last executed, s"] = took
    figures["lives/s, with the restart"] = count / took
    figures["delivering, broker CPU µs each"] = (world.broker.cpu_sec() - cpu) / count * 1e6
    figures["broker RSS peak, MB"] = world.broker.peak_mb()
    figures["broker RSS after, MB"] = world.broker.rss_mb()


async def _kill(world: World) -> float:
    """Kills the broker with SIGKILL and starts it again. Returns the seconds until it is ready."""
    since = time.monotonic()
    await world.broker.end()
    await world.start_broker()
    return time.monotonic() - since
