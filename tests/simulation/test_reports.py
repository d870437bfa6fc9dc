"""Reports over HTTP about commands that went by MQTT: only the device itself may make them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from tests.simulation.checkers.life import check
from tests.simulation.fleet import COMMANDS
from tests.simulation.loop import SimLoop, run
from tests.simulation.network import MOSQUITTO
from tests.simulation.planted import REPORT_BUG
from tests.simulation.world import World, quiet


def story() -> tuple[list[int | None], list[str]]:
    """A relay reports on commands that it never fetched, while the devices work on them. Returns the
    statuses of its reports, and what the checkers found."""
    told = list[int | None]()

    async def main(loop: SimLoop) -> World:
        world = World(loop, kind=MOSQUITTO)
        await world.furnish()
        assert world.core is not None
        for device in world.devices:
            device.whims = False
            if device.bare or "mqtt" not in device.transports:
                continue
            body: dict[str, Any] = {"type": next(iter(COMMANDS[device.kind])), "params": {}, "ttl_sec": None}
            commands = f"/v1/devices/{device.hardware_id}/commands"
            made = await world.door.call("create", "POST", commands, body)
            command = made.answer["id"]
            while world.core.live.members[command].state.acknowledged_at is None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            world.history.answered(device.hardware_id, command, "executed")
            path = f"{commands}/{command}/result"
            report = await world.door.call("report", "POST", path, {"status": "executed"})
            told.append(report.status)
        await world.end()
        return world

    with quiet([]):
        world = run(main, 1)
    return told, [*world.found, *check(world.history)]


def test_a_relay_cannot_report_on_a_command_that_went_by_mqtt() -> None:
    told, found = story()

    assert told
    assert set(told) == {409}
    assert found == []


def test_a_planted_bug_of_reports_is_found() -> None:
    with ExitStack() as stack:
        for owner, name, replacement in REPORT_BUG.patches:
            stack.enter_context(patch.object(owner, name, replacement))
        told, found = story()

    assert 200 in told
    assert any(sentence.startswith("A6:") for sentence in found)
