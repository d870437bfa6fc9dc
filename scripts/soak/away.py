"""The MQTT server or the broker goes down for a while, with commands in every state, and comes back.

Time-outs are short, so that all of them end during the outage. A command may time out only if the MQTT server
had not yet acknowledged the device's answer; the late answer must then correct it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from scripts.soak.judge import STATES, Figures, judge
from scripts.soak.load import Load
from scripts.soak.world import World, until

DEVICE_TYPE = 'name = "soak"\nopen = true\nack_timeout_sec = {ack}\nresult_timeout_sec = {result}\n'
# Half of the commands take up to `ack_timeout_sec`, so some are always acknowledged but not executed.
SLOW = 0.5
RESULT = 3
CLOSED_WITHIN_SEC = 600
LATE_WITHIN_SEC = 30


async def _server_frozen(world: World, seconds: float) -> None:
    assert world.mosquitto is not None
    world.mosquitto.running.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    world.mosquitto.running.send_signal(signal.SIGCONT)


async def _server_ended(world: World, seconds: float, how: signal.Signals = signal.SIGTERM) -> None:
    assert world.mosquitto is not None
    await world.mosquitto.end(how)
    await asyncio.sleep(seconds)
    await world.start_mosquitto()


async def _server_killed(world: World, seconds: float) -> None:
    await _server_ended(world, seconds, signal.SIGKILL)


async def _broker_killed(world: World, seconds: float) -> None:
    await world.broker.end()
    await asyncio.sleep(seconds)
    await world.start_broker()


Way = Callable[[World, float], Awaitable[None]]
WAYS: dict[str, Way] = {
    "server-frozen": _server_frozen,
    "server-ended": _server_ended,
    "server-killed": _server_killed,
    "broker-killed": _broker_killed,
}
# `server-killed` is not run by default: a killed Mosquitto loses the messages since its last save.
USUAL = ("server-frozen", "server-ended", "broker-killed")


async def run(home: Path, given: argparse.Namespace, figures: Figures) -> list[str]:
    """Runs it and fills in the figures. Returns the faults as sentences."""
    ack = given.time_out
    world = World(home, DEVICE_TYPE.format(ack=ack, result=RESULT * ack))
    try:
        await world.open(given.devices, slow=SLOW, slow_sec=(ack / 5, ack))
        await world.tell_fleet("online")
        load = Load(world.port, world.key, world.names)
        for way in given.how:
            await _absence(world, load, given, way, figures)
        return await judge(world, load.accepted.values(), figures)
    finally:
        await world.close()


async def _absence(world: World, load: Load, given: argparse.Namespace, way: str, figures: Figures) -> None:
    """One outage. Commands are created before, during and after it; at the end all must be closed."""
    before = len(load.accepted)
    usual = round(given.rate * min(10.0, given.seconds))
    creating = asyncio.create_task(load.run(usual + round(given.rate * given.seconds), given.rate))
    await until(lambda: len(load.accepted) >= before + usual, "commands in every state")
    figures[f"{way}: states before"] = _states(world)
    await WAYS[way](world, given.seconds)
    figures[f"{way}: states after"] = _states(world)
    since = time.monotonic()
    await creating
    await until(lambda: not world.open_commands(), f"all is closed after {way}", CLOSED_WITHIN_SEC)
    # Late answers to timed-out commands can still arrive. If one never does, `judge` reports it.
    with suppress(TimeoutError):
        await until(lambda: "timed_out" not in _states(world), "late answers", LATE_WITHIN_SEC)
    figures[f"{way}: all settled after, s"] = time.monotonic() - since


def _states(world: World) -> str:
    return " ".join(f"{state} {count}" for state, count in world.ask(STATES))
