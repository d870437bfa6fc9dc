"""A simulated BLE device: the real device core with an in-process connection.

Use it to try a relay without hardware. `devices.core` makes its decisions. It keeps each answer until the
relay confirms it, because a phone may disappear before it reports the answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from devices.core import Core, Effect, Send
from devices.grant import GrantVerifier
from devices.memory import Memory
from devices.speech.signing import SigningKey
from devices.types import DeviceType
from devices.wire import CommandMessage

# Older unconfirmed answers are dropped; the device's memory still has the last answer to each command.
MAX_UNCONFIRMED = 1_000

Handler = Callable[[CommandMessage], Awaitable[Any]]


class BleDevice:
    """`handlers`: by command name; an exception in a handler becomes an error answer. `now_ms`: the device's
    clock."""

    def __init__(
        self,
        hardware_id: str,
        device_type: DeviceType,
        memory: Memory,
        handlers: Mapping[str, Handler],
        now_ms: Callable[[], int],
        verifier: GrantVerifier | None = None,
        signs_with: SigningKey | None = None,
    ) -> None:
        self._handlers, self._now_ms = handlers, now_ms
        names = dict.fromkeys(handlers, False)
        self._core = Core(hardware_id, device_type, memory, names, verifier=verifier, signs_with=signs_with)
        self._connection: BleConnection | None = None
        self._unconfirmed: deque[bytes] = deque(maxlen=MAX_UNCONFIRMED)
        self._runs: asyncio.Queue[CommandMessage] = asyncio.Queue()

    def connect(self) -> BleConnection:
        """Opens a new connection and closes the previous one."""
        self.disconnect()
        self._connection = BleConnection(self._received, self._confirmed)
        for answer in self._unconfirmed:
            self._connection.answers.put_nowait(answer)
        return self._connection

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def run(self) -> None:
        """Executes commands, one after the other, until cancelled."""
        self._apply(self._core.recover(self._now_ms()))
        while True:
            command = await self._runs.get()
            result, error = None, None
            try:
                result = await self._handlers[command.type](command)
            except Exception as fault:
                error = {"code": "device_error", "message": str(fault) or type(fault).__name__}
            self._apply(self._core.finish(self._now_ms(), command, result, error))

    def _received(self, message: bytes) -> None:
        self._apply(self._core.receive(self._now_ms(), self._core.command_topics[0], message))

    def _confirmed(self, answer: bytes) -> None:
        with suppress(ValueError):
            self._unconfirmed.remove(answer)

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if not isinstance(effect, Send):
                self._runs.put_nowait(effect.command)
                continue
            self._unconfirmed.append(effect.payload)
            if self._connection is not None:
                self._connection.answers.put_nowait(effect.payload)


class BleConnection:
    """A `devices.relay.Peer`."""

    def __init__(self, received: Callable[[bytes], None], confirmed: Callable[[bytes], None]) -> None:
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._received, self._confirmed = received, confirmed
        self._open = True

    async def send(self, message: bytes) -> None:
        if not self._open:
            raise ConnectionError("the device is out of reach")
        self._received(message)

    async def receive(self) -> bytes:
        answer = await self.answers.get() if self._open or not self.answers.empty() else None
        if answer is None:
            raise ConnectionError("the device is out of reach")
        return answer

    async def confirm(self, answer: bytes) -> None:
        self._confirmed(answer)

    def close(self) -> None:
        self._open = False
        self.answers.put_nowait(None)
