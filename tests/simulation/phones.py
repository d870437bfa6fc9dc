"""Phones that relay to the simulated devices: the reference relay, over the simulated HTTP and radio.

A phone can die at any moment and keeps nothing. A device is connected to at most one phone at a time.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, cast

import httpx2
import msgspec

from devices.relay import Relay
from tests.simulation.clients import Door
from tests.simulation.fleet import Device
from tests.simulation.loop import Node, SimLoop
from tests.simulation.tide import Tide

VISIT_SEC, QUIET_VISIT_SEC = 20, 900
LISTENS_SEC = 5
logging.getLogger("ordain.relay").disabled = True  # it logs much, and the history has the same facts


class Phone:
    """A phone. With `whims` it may walk away during a transfer, or claim commands with no device near."""

    def __init__(self, loop: SimLoop, door: Door, tide: Tide, devices: list[Device], number: int) -> None:
        self.whims = True
        self._loop, self._tide, self._number = loop, tide, number
        self._devices = [device for device in devices if "relay" in device.transports]
        self._random = loop.rng(f"phone/{number}")
        self._http = _Http(door)
        self._node: Node | None = None
        self._air: _Air | None = None

    def start(self) -> None:
        if self._node is None and self._devices:
            self._node = Node(f"phone{self._number}")
            self._loop.spawn(self._node, self._work())

    def die(self) -> None:
        if self._node is not None:
            node, self._node = self._node, None
            self._loop.kill(node)
            self._leave()

    def _leave(self) -> None:
        if self._air is not None:
            self._air.close()
            self._air = None

    async def _work(self) -> None:
        while True:
            await self._tide.sleep(self._random.expovariate(1), VISIT_SEC, QUIET_VISIT_SEC)
            device = self._random.choice(self._devices)
            if self.whims and self._random.random() < 0.3:
                await self._ask(device)
            elif device.node is not None and device.ble is None:
                await self._visit(device)

    async def _ask(self, device: Device) -> None:
        """Claims commands without being near the device."""
        try:
            await self._http.post(f"/v1/devices/{device.hardware_id}/commands/claim")
        except httpx2.TransportError:
            return

    async def _visit(self, device: Device) -> None:
        patience = self._random.uniform(1, 20) if self.whims else 120
        relay = Relay(cast(httpx2.AsyncClient, self._http), poll_sec=2, patience_sec=patience)
        self._air = air = _Air(self._random, device)
        try:
            await relay.serve(device.hardware_id, air)
        except (ConnectionError, httpx2.TransportError):
            return
        finally:
            self._leave()


class _Air:
    """A `Peer`: the radio connection to a device; it ends when the device restarts."""

    def __init__(self, random: Any, device: Device) -> None:
        self._random, self._device, self._life = random, device, device.node
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._heard = asyncio.Event()
        device.ble = self._hear

    def _hear(self, answer: bytes) -> None:
        self._answers.put_nowait(answer)
        self._heard.set()

    async def send(self, message: bytes) -> None:
        await asyncio.sleep(self._random.uniform(0.01, 0.5))
        self._check()
        self._device.nearby(message)

    async def receive(self) -> bytes:
        while self._answers.empty():
            self._check()
            self._heard.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(LISTENS_SEC):  # then it looks whether the device is still there
                    await self._heard.wait()
        await asyncio.sleep(self._random.uniform(0.01, 0.5))
        return self._answers.get_nowait()

    def _check(self) -> None:
        if self._device.node is not self._life:
            raise ConnectionError("the device is gone")

    async def confirm(self, answer: bytes) -> None:
        await asyncio.sleep(self._random.uniform(0.01, 0.1))
        self._check()
        self._device.confirmed(answer)

    def close(self) -> None:
        if self._device.node is self._life:
            self._device.alone()


class _Answer(msgspec.Struct, frozen=True):
    status_code: int
    content: Any

    def json(self) -> Any:
        return self.content


class _Http:
    """What a relay uses of `httpx2.AsyncClient`, which would take as long as the broker does."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def post(self, path: str, json: Any = None) -> _Answer:
        call = await self._door.call("relay" if path.endswith("claim") else "report", "POST", path, json)
        if call.status is None:
            raise httpx2.ReadTimeout("no answer")
        return _Answer(call.status, call.answer)
