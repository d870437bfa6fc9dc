"""Writes batches as the broker's writer does, for tests of the log itself."""

from __future__ import annotations

import random

from broker.domain.events import (
    Changed,
    Event,
    Offline,
    Online,
    Operated,
    Pending,
    Registered,
    device_stream,
)
from broker.domain.fleet import DeviceState, evolve_device
from broker.domain.lifecycle import CommandState, evolve
from broker.seams import At, Batch, Newest, SideRow
from tests.integration.core_support import DEVICE, PROJECT, T, created


class Author:
    """Stages events and rows; `batch` takes what was staged. Its clock stands until a test moves it."""

    def __init__(self, term: int, seed: int = 1, now: int = T) -> None:
        self.term, self.now = term, now
        self._random = random.Random(seed)
        self._number = 0
        self._states: dict[str, CommandState | DeviceState] = {}
        self._versions: dict[str, int] = {}
        self._events: list[Pending] = []
        self._newest: dict[str, Newest] = {}
        self._rows: list[SideRow] = []

    def register(self, device_id: str = DEVICE) -> None:
        event = Registered(hardware_id=f"hw-{device_id}", device_type="generic", token_digest="d" * 64)
        self._device(device_id, event)

    def rename(self, name: str, device_id: str = DEVICE) -> None:
        self._device(device_id, Changed(name=name))

    def move(self, gateway: str | None, device_id: str = DEVICE) -> None:
        self._device(device_id, Changed(gateway=gateway))

    def presence(self, event: Online | Offline, device_id: str = DEVICE) -> None:
        self._device(device_id, event)

    def _device(self, device_id: str, event: Event) -> None:
        pending = self._stage(device_stream(device_id), event, device_id)
        known = self._states.get(device_id)
        assert known is None or isinstance(known, DeviceState)
        self._touch(device_id, evolve_device(known, pending))

    def command(self, command_id: str, *events: Event, device_id: str = DEVICE) -> CommandState:
        """Creates a command, unless it is there, and gives it further events."""
        first = [] if command_id in self._states else [created()]
        for event in [*first, *events]:
            pending = self._stage(command_id, event, device_id)
            known = self._states.get(command_id)
            assert known is None or isinstance(known, CommandState)
            now = evolve(known, pending)
            self._touch(command_id, now)
        state = self._states[command_id]
        assert isinstance(state, CommandState)
        return state

    def note(self, action: str = "key.created") -> None:
        """An event that changes no state."""
        self._stage("audit", Operated(action=action, subject="key_1"), None)

    def row(self, *rows: SideRow) -> None:
        self._rows += rows

    @property
    def staged(self) -> bool:
        return bool(self._events)

    @property
    def at(self) -> At:
        return At(len(self._events) - 1)

    def batch(self, term: int | None = None) -> Batch:
        self._number += 1
        batch = Batch(
            self._number,
            self.term if term is None else term,
            self._events,
            self._random.randbytes(16 * len(self._events)),
            list(self._newest.values()),
            self._rows,
        )
        self._events, self._newest, self._rows = [], {}, []
        return batch

    def _stage(self, stream: str, event: Event, device_id: str | None) -> Pending:
        version = self._versions[stream] = self._versions.get(stream, 0) + 1
        pending = Pending(
            stream=stream,
            version=version,
            decided_at=self.now,
            project=PROJECT,
            device_id=device_id,
            actor="key:key_1",
            event=event,
        )
        self._events.append(pending)
        return pending

    def _touch(self, name: str, state: CommandState | DeviceState) -> None:
        self._states[name] = state
        index = len(self._events) - 1
        newest = self._newest.get(name)
        if newest is None:
            self._newest[name] = Newest(state, index, index, state.version - 1)
        else:
            newest.state, newest.last = state, index
