"""One simulated device: a real core, an MQTT connection while it is online, and its faults.

It must never replace the core's decisions about commands, answers and repeated commands.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable

from devices.core import Core, Effect, Run, Send
from devices.fleet.mqtt import Connection
from devices.fleet.summary import Ledger
from devices.memory import RamMemory
from devices.names import status_topic
from devices.types import shipped_types
from devices.wire import CommandMessage, Malformed, decode_answer, decode_command, encode_status

COMMAND = "simulate"
TYPE = "generic"
FAILURE = {"code": "simulated", "message": "the simulation drew a failure"}


class Device:
    """One device: a core, and a connection while it is online."""

    def __init__(
        self, name: str, token: str, *, run: str, prefix: str, ledger: Ledger, now_ms: Callable[[], int]
    ) -> None:
        """`run` is part of its session ids, so that they differ from those of another process."""
        self.name, self.token, self.token_is_new = name, token, False
        self.connection: Connection | None = None
        self.away_sec = 0.0
        self._status = status_topic(prefix, name)
        self._core = Core(name, shipped_types()[TYPE], RamMemory(), {COMMAND: False}, prefix=prefix)
        self._ledger, self._now_ms = ledger, now_ms
        self._run, self._connections = run, 0
        self._unsent: list[Send] = []
        self._unacknowledged: dict[int, Send] = {}

    def connect(self) -> Connection:
        """A new connection, which the caller opens."""
        self._connections += 1
        topics = self._core.command_topics
        return Connection(
            self,
            self.name,
            self.token,
            topics,
            self._status,
            self._says(online=False),
            # Every second device, and every second time: says `online` before it subscribes, as many do.
            subscribes_late=(zlib.crc32(self.name.encode()) + self._connections) % 2 == 0,
        )

    def leave(self) -> None:
        if self.connection is not None:
            # After a DISCONNECT the server does not send the last will, so the device sends `offline`.
            self.connection.publish(self._status, self._says(online=False), retain=True)
            self.connection.leave()

    def up(self, connection: Connection) -> None:
        self.connection, self.away_sec = connection, 0.0
        connection.publish(self._status, self._says(online=True), retain=True)
        again = [*self._unacknowledged.values(), *self._unsent]
        self._unacknowledged, self._unsent = {}, []
        for send in again:
            self._publish(send)

    def down(self, connection: Connection) -> None:
        if self.connection is connection:
            self.connection = None

    def pubacked(self, connection: Connection, number: int) -> None:
        self._unacknowledged.pop(number, None)

    def message(self, connection: Connection, topic: str, payload: bytes, number: int) -> None:
        try:
            command = decode_command(payload)
        except Malformed:
            connection.puback(number)
            return
        told = command.params.get("number") if isinstance(command.params, dict) else None
        deed = self._ledger.delivered(self.name, command.id, told)
        breaks = deed.fate.away_sec > 0 and deed.deliveries == 1
        if not (breaks and deed.fate.unread):
            self._apply(self._core.receive(self._now_ms(), topic, payload))
            connection.puback(number)
        if breaks:
            self.away_sec = deed.fate.away_sec
            self.connection = None
            connection.vanish()

    def _says(self, *, online: bool) -> bytes:
        return encode_status(online, f"{self._run}-{self._connections}")

    def _apply(self, effects: list[Effect]) -> None:
        due = deque(effects)
        while due:
            effect = due.popleft()
            if isinstance(effect, Send):
                self._answer(effect)
                continue
            slow_sec = self._ledger.ran(self.name, effect.command.id).fate.slow_sec
            if slow_sec:
                asyncio.get_running_loop().call_later(slow_sec, self._finish_later, effect)
            else:
                due.extendleft(reversed(self._finish(effect.command)))

    def _finish_later(self, run: Run) -> None:
        self._apply(self._finish(run.command))

    def _finish(self, command: CommandMessage) -> list[Effect]:
        if self._ledger.deed(self.name, command.id).fate.failed:
            return self._core.finish(self._now_ms(), command, error=FAILURE)
        return self._core.finish(self._now_ms(), command, {"done": True})

    def _answer(self, send: Send) -> None:
        command_id = decode_answer(send.payload, None, {}).id
        assert command_id is not None, "a device of this type puts the command id into its answers"
        deed = self._ledger.deed(self.name, command_id)
        if not deed.muted:
            for _ in range(1 + deed.fate.doubled):
                self._publish(send)

    def _publish(self, send: Send) -> None:
        if self.connection is None:
            self._unsent.append(send)
        else:
            self._unacknowledged[self.connection.publish(send.topic, send.payload)] = send
