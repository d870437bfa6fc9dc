"""The soak's devices: the simulator's light devices with real cores, in a separate process.

It reads orders from standard input, one a line: `online`, `offline`, `books PATH`. It prints the same word
when the order is done. It records every execution; the broker is judged by these records ("books").
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

import msgspec
import uvloop

from devices.core import Core, Send
from devices.fleet import device as fleet_device
from devices.fleet.faults import Faults
from devices.fleet.mqtt import Connection
from devices.fleet.simulator import Door, Fleet, Server
from devices.fleet.summary import Deed, Ledger
from devices.memory import RamMemory
from devices.types import shipped_types
from devices.wire import decode_answer
from scripts.soak.load import NAMES

PREFIX = "iotee"


class Books(msgspec.Struct, kw_only=True):
    """`runs`: for each device, the ids of the commands it executed, in order. `taken_ms`: for each command,
    when the MQTT server acknowledged its `executed` answer, ms since 1970."""

    deliveries: int = 0
    runs: dict[str, list[str]] = {}
    taken_ms: dict[str, int] = {}


class _Ledger(Ledger):
    """The simulator's ledger; it also records the order of executions."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.order: dict[str, list[str]] = defaultdict(list)
        self.taken_ms: dict[str, int] = {}
        self.deliveries = 0

    def delivered(self, hardware_id: str, command_id: str, number: object) -> Deed:
        self.deliveries += 1
        return super().delivered(hardware_id, command_id, number)

    def ran(self, hardware_id: str, command_id: str) -> Deed:
        self.order[hardware_id].append(command_id)
        return super().ran(hardware_id, command_id)


class _Device(fleet_device.Device):
    """A device that handles all commands of the soak, and records when the MQTT server acknowledged its
    `executed` answers."""

    def __init__(self, name: str, token: str, run: str, ledger: _Ledger) -> None:
        super().__init__(name, token, run=run, prefix=PREFIX, ledger=ledger, now_ms=_now_ms)
        kind = shipped_types()[fleet_device.TYPE]
        self._core = Core(name, kind, RamMemory(), dict.fromkeys(NAMES, False), prefix=PREFIX)
        self._taken_ms = ledger.taken_ms

    def pubacked(self, connection: Connection, number: int) -> None:
        send: Send | None = self._unacknowledged.get(number)
        super().pubacked(connection, number)
        if send is not None and connection is self.connection:
            answer = decode_answer(send.payload, None, {})
            if answer.id and answer.status == "executed":
                self._taken_ms.setdefault(answer.id, _now_ms())


async def _serve(port: int, tokens: dict[str, str], faults: Faults) -> None:
    ledger = _Ledger(faults)
    # The MQTT server accepts every token, so the fleet never asks the broker for a new one.
    no_door = cast(Door, None)
    devices = [_Device(name, token, str(os.getpid()), ledger) for name, token in tokens.items()]
    async with AsyncExitStack() as up:
        async for order in _lines():
            word, _, rest = order.partition(" ")
            if word == "online":
                fleet = Fleet(devices, Server("127.0.0.1", port), no_door)
                await up.enter_async_context(fleet.running())
                await fleet.all_online()
            elif word == "offline":
                await up.aclose()
            elif word == "books":
                books = Books(deliveries=ledger.deliveries, runs=ledger.order, taken_ms=ledger.taken_ms)
                await asyncio.to_thread(Path(rest).write_bytes, msgspec.json.encode(books))
            print(word, flush=True)


async def _lines() -> AsyncIterator[str]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    async for line in reader:
        yield line.decode().strip()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--slow", type=float, required=True)
    parser.add_argument("--doubled", type=float, required=True)
    parser.add_argument("--slow-sec", type=float, nargs=2, required=True)
    given = parser.parse_args()
    tokens = msgspec.json.decode(given.tokens.read_bytes(), type=dict[str, str])
    shortest, longest = given.slow_sec
    faults = Faults(slow=given.slow, slow_sec=(shortest, longest), duplicate=given.doubled)
    uvloop.run(_serve(given.port, tokens, faults))


if __name__ == "__main__":
    main()
