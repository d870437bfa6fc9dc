"""Dead connections on the real listener: either side may notice first, and commands still arrive."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from tests.simulation.checkers.life import check
from tests.simulation.fleet import COMMANDS
from tests.simulation.loop import SimLoop, run
from tests.simulation.pipes import LISTENER, PipeNet, PipePort
from tests.simulation.planted import KEEPALIVE_BUG, TAKEOVER_BUG, Bug
from tests.simulation.world import World, quiet


def story(noticed_after_sec: float, keepalive: int) -> list[str]:
    """Every device's connection dies silently; the device notices after a while; a command follows."""

    async def main(loop: SimLoop) -> World:
        world = World(loop, kind=LISTENER)
        named = [device for device in world.devices if not device.bare and "mqtt" in device.transports]
        await world.furnish()
        for device in named:
            device.whims = False
            port = device.port
            assert isinstance(port, PipePort)
            port.keepalive = keepalive
            port.disconnect()
        await asyncio.sleep(10)
        for device in named:
            device.connect()
        await asyncio.sleep(10)
        for device in named:
            connection = world.server.connection(device.hardware_id)
            assert connection is not None
            connection.go_half_open(noticed_after_sec / 3)
        await asyncio.sleep(noticed_after_sec + 10)
        for device in named:
            body: dict[str, Any] = {"type": next(iter(COMMANDS[device.kind])), "params": {}, "ttl_sec": None}
            path = f"/v1/devices/{device.hardware_id}/commands"
            assert (await world.door.call("create", "POST", path, body)).status == 201
        await world.end()
        return world

    with quiet([]):
        world = run(main, 1)
    assert isinstance(world.server, PipeNet)
    return [*world.found, *check(world.history), *world.server.still_half_open()]


@pytest.mark.parametrize(
    ("noticed_after_sec", "keepalive"), [(15, 120), (300, 20)], ids=["device", "listener"]
)
def test_commands_reach_the_device_whichever_side_notices_the_dead_connection_first(
    noticed_after_sec: float, keepalive: int
) -> None:
    assert story(noticed_after_sec, keepalive) == []


@pytest.mark.parametrize(
    ("bug", "noticed_after_sec", "keepalive"),
    [(TAKEOVER_BUG, 15, 120), (KEEPALIVE_BUG, 300, 20)],
    ids=lambda value: value.name if isinstance(value, Bug) else "",
)
def test_a_planted_bug_of_dead_connections_is_found(
    bug: Bug, noticed_after_sec: float, keepalive: int
) -> None:
    with ExitStack() as stack:
        for owner, name, replacement in bug.patches:
            stack.enter_context(patch.object(owner, name, replacement))
        assert bug.names(story(noticed_after_sec, keepalive))
