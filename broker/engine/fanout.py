"""Sends one command to many devices. Each device has its own outcome and its own idempotency entry.

Works in parts of `PART` devices: look the part up, stage it without an `await`, wait until it is durable.
Other requests run between two parts. After a crash whole parts are recorded; repeating the request with
the same idempotency key completes the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceState
from broker.engine.commands import Caller, Commands, Order
from devices.names import is_name
from devices.types import Definition

PART = 25  # deciding, committing and handing over so many takes about 10 ms of the loop

Outcome = str | Refusal  # the command's id, or why the device got no command
Checked = tuple[msgspec.Raw, Definition] | Refusal


class Fanout:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        # Only one part may be in work: many parts at once would stage more than the writer's bound.
        self._turn = asyncio.Lock()

    async def send(
        self, caller: Caller, names: Sequence[str], order: Order, fingerprint: Callable[[str], bytes]
    ) -> dict[str, Outcome]:
        """Accepts the command for each device. Returns the outcomes by the names of the request.

        A device that is named twice gets one command. `order.device` is ignored. `fingerprint(device_id)`
        identifies a repeated request for that device. With the idempotency key of an earlier request, the
        outcome is the command of that request.

        Raises:
            Unavailable: the log could not be written; some commands may have been accepted.
        """
        found: dict[str, Outcome] = {}
        made: dict[str, Outcome] = {}  # by device id: one device may be named twice
        checked: dict[tuple[str, str], Checked] = {}
        wanted = list(dict.fromkeys(names))
        for start in range(0, len(wanted), PART):
            part = wanted[start : start + PART]
            async with self._turn:
                await self._bring(caller, part, order.idempotency_key, fingerprint)
                for name in part:
                    found[name] = self._one(caller, name, order, fingerprint, made, checked)
            await self._commands.writer.barrier()
        return found

    async def _bring(
        self, caller: Caller, part: list[str], key: str | None, fingerprint: Callable[[str], bytes]
    ) -> None:
        """Reads everything that the part's decisions need into memory; valid until the next `await`."""
        commands, live = self._commands, self._commands.live
        names = [name for name in part if is_name(name)]
        await commands.ready(names, project=caller.project)
        if key is None:
            return
        devices = [device for name in names if (device := live.device(name)) is not None]
        keys = [(device.project, key, device.id) for device in devices if caller.sees(device)]
        await commands.ready(names, keys=keys)
        if ids := [first[1] for each in keys if (first := live.keys.get(each)) is not None]:
            await commands.ready(names, ids, keys)

    def _one(
        self,
        caller: Caller,
        name: str,
        order: Order,
        fingerprint: Callable[[str], bytes],
        made: dict[str, Outcome],
        checked: dict[tuple[str, str], Checked],
    ) -> Outcome:
        """Decides and stages for one device. Never awaits."""
        try:
            device = self._commands.device(caller, name)
        except Refusal as refusal:
            return refusal
        if device.id not in made:
            try:
                made[device.id] = self._accept(caller, device, order, fingerprint, checked)
            except Refusal as refusal:
                made[device.id] = refusal
        return made[device.id]

    def _accept(
        self,
        caller: Caller,
        device: DeviceState,
        order: Order,
        fingerprint: Callable[[str], bytes],
        checked: dict[tuple[str, str], Checked],
    ) -> Outcome:
        commands, key = self._commands, (device.project, order.idempotency_key or "", device.id)
        digest = b"" if order.idempotency_key is None else fingerprint(device.id)
        if order.idempotency_key is not None and (first := commands.live.keys.get(key)) is not None:
            return commands.replayed(first, digest).id
        # Devices of one type and project take the same parameters.
        kind = (device.project, device.device_type)
        if kind not in checked:
            try:
                checked[kind] = commands.check(device, order)
            except Refusal as refusal:
                checked[kind] = refusal
        fits = checked[kind]
        if isinstance(fits, Refusal):
            return fits
        state = commands.place(caller, device, order, *fits)
        if order.idempotency_key is not None:
            commands.keep_key(key, digest, state)
        return state.id
