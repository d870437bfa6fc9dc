"""Faults that show a bug only together, a few seconds apart: an order, and what meets it on its way.

One run in four has them. They have random numbers of their own, so that the other runs stay as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.fleet import COMMANDS, Device
from tests.simulation.network import Connection

if TYPE_CHECKING:
    from tests.simulation.world import World

PAUSE_SEC = 40.0
SETTLED_SEC = 0.3  # an order is on the wire by then, if no write is slow


class Pairs:
    def __init__(self, world: World) -> None:
        self._stopped = False
        self._deaf: list[Connection] = []
        self._world, self._loop = world, world.loop
        self._random = world.loop.rng("pairs")

    async def run(self) -> None:
        faults = [self._slow_hand_over, self._unheard_while_stopped, self._orders_as_the_disk_fills]
        if not self._world.embedded:
            faults.append(self._orders_around_a_cut)
        while True:
            await self._world.tide.busy.wait()
            await asyncio.sleep(self._random.expovariate(1 / PAUSE_SEC))
            if self._stopped:
                return
            fault = self._random.choice(faults)
            if self._world.tide.allows(fault.__name__):
                self._world.history.said(fault.__name__)
                fault()

    def heal(self) -> None:
        """Stops new faults, and ends the connections that are half-open."""
        self._stopped = True
        for connection in self._deaf:
            connection.close("cut")

    def _slow_hand_over(self) -> None:
        """A hand-over is written slowly: its command ends meanwhile, or its device answers nothing."""
        device, disk = self._device(), self._world.disk
        disk.slow_sec = self._random.choice((3.0, 8.0))
        if self._random.random() < 0.5:
            self._deafen(device)
            self._order(device, 300)
        else:
            self._order(device, 5)
        self._later(disk.slow_sec * 1.2, lambda: setattr(disk, "slow_sec", 0.0))

    def _unheard_while_stopped(self) -> None:
        """The time for an answer ends while the process does not run."""
        device = self._device()
        self._deafen(device)
        self._order(device, 300)
        self._later(SETTLED_SEC, lambda: self._world.hold(15.0))

    def _orders_as_the_disk_fills(self) -> None:
        """The first write that fails hands over more than one command."""
        self._world.fill()
        for device in self._world.devices[:3]:
            self._order(device, 300)

        def make_room() -> None:
            self._world.disk.slow_sec = 0.0
            self._world.make_room()

        self._later(self._random.uniform(1, 10), make_room)

    def _orders_around_a_cut(self) -> None:
        """A device answers while the link is down, and its next command waits for that answer."""
        device = self._device()
        self._order(device, 300)

        def cut() -> None:
            link = self._world.server.connection("ordain")
            if link is not None:
                link.close("cut")
            self._order(device, 300)

        self._later(self._random.uniform(0.05, SETTLED_SEC), cut)

    def _device(self) -> Device:
        return self._random.choice([each for each in self._world.devices if "mqtt" in each.transports])

    def _deafen(self, device: Device) -> None:
        connection = self._world.server.connection(device.hardware_id)
        if connection is not None:
            connection.go_half_open(self._random.uniform(20, 40))
            self._deaf.append(connection)

    def _order(self, device: Device, ttl_sec: int) -> None:
        name, params = self._random.choice(list(COMMANDS[device.kind].items()))
        body = {"type": name, "params": params, "ttl_sec": ttl_sec}
        path = f"/v1/devices/{device.hardware_id}/commands"
        self._loop.create_task(self._world.door.call("create", "POST", path, body))

    def _later(self, delay: float, act: Callable[[], object]) -> None:
        self._loop.call_later(delay, lambda: None if self._stopped else act())
