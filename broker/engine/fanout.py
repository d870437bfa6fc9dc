"""One command to many devices: each device has its own outcome, and its own place under the idempotency key.

It stands on `commands.py` and follows its rules. A part at a time is looked up, staged in one go and made
durable, so that others get their turn in between and a crash leaves whole parts, which the repeated
request completes.
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

PART = 500

Outcome = str | Refusal  # the command's id, or why there is none
Checked = tuple[msgspec.Raw, Definition] | Refusal


class Fanout:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        # One part at a time is between looking and staging: together many would overfill a batch.
        self._turn = asyncio.Lock()

    async def send(
        self, caller: Caller, names: Sequence[str], order: Order, fingerprint: Callable[[str], bytes]
    ) -> dict[str, Outcome]:
        """Accepts the command for each of the devices, by the names they were asked for; each device once.

        `order` is for all of them, its `device` aside; `fingerprint(device_id)` is what makes a repeated
        request the same for that device. With the key of an earlier request it names what that one made.

        Raises:
            Unavailable: the log could not be written; some may have been accepted.
        """
        found: dict[str, Outcome] = {}
        made: dict[str, Outcome] = {}  # by device: it may have been named twice
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
        """Everything that the part is decided on is in memory from here until the next wait."""
        commands, live = self._commands, self._commands.live
        names = [name for name in part if is_name(name)]
        await commands.ready(names)
        if key is None:
            return
        devices = [device for name in names if (device := live.device(name)) is not None]
        keys = [(device.project, key, device.id) for device in devices if caller.sees(device.project)]
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
        """Synchronous, from looking to staging."""
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
