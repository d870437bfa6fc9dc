"""The decisions of a device: which command to run, what to answer, which commands it has already executed.

Pure except for its memory: messages and the time go in, effects come out in the order in which they must
happen. No clock, no randomness, no asyncio, no MQTT, so that the agent and the simulation use the same
object. It must never run a command's handler twice. It must never start a handler before the memory records
that the handler may have run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from devices.clock import parse_rfc3339, rfc3339
from devices.grant import GrantRefused, GrantVerifier
from devices.memory import Memory, Remembered
from devices.names import device_topic, parse_topic
from devices.speech.signing import SigningKey, sign
from devices.types import DeviceType
from devices.wire import (
    Answer,
    CommandMessage,
    Malformed,
    Progress,
    as_error,
    as_result,
    decode_answer,
    decode_command,
    encode_answer,
)

# The broker sends at most 100 commands at a time (`max_in_flight`). Any beyond that are dropped unrecorded.
MAX_WAITING = 100


class Send(msgspec.Struct, frozen=True, kw_only=True):
    """Publish with QoS 1, not retained. Publish again after a reconnect if the PUBACK did not arrive."""

    topic: str
    payload: bytes


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Run the handler of this command, then call `Core.finish`. The id is "" for bare devices."""

    command: CommandMessage


Effect = Send | Run


class Core:
    """One device. `handlers` maps its command names to whether the command is idempotent. `signs_with`: its
    own key; then every answer is signed."""

    def __init__(
        self,
        hardware_id: str,
        device_type: DeviceType,
        memory: Memory,
        handlers: Mapping[str, bool],
        *,
        prefix: str = "iotee",
        verifier: GrantVerifier | None = None,
        signs_with: SigningKey | None = None,
    ) -> None:
        self._hardware_id, self._type, self._prefix = hardware_id, device_type, prefix
        self._memory, self._handlers, self._verifier = memory, handlers, verifier
        self._signs_with, self._seq = signs_with, 0
        self._bare = device_type.payload == "bare"
        if signs_with is not None and device_type.answers_signed == "none":
            raise ValueError(f"answers of the type {device_type.name} are not signed")
        self._words = {
            (command.command_suffix or device_type.command_suffix, command.text): name
            for name, command in device_type.commands.items()
        }
        self._suffixes = {device_type.command_suffix, *(suffix for suffix, _ in self._words)}
        self._waiting: deque[CommandMessage] = deque()
        self._running: CommandMessage | None = None

    @property
    def command_topics(self) -> list[str]:
        """The topics that the device subscribes to."""
        return [device_topic(self._prefix, self._hardware_id, suffix) for suffix in sorted(self._suffixes)]

    def recover(self, now_ms: int) -> list[Effect]:
        """Recovers the commands that were open when the device stopped. Call it once, before any message.

        A command that had not begun is run now. A command that had begun may or may not have been executed:
        it is run again only if it is idempotent, else it fails with the code `interrupted`.
        """
        effects: list[Effect] = []
        for entry in self._memory.unfinished():
            command = entry.command
            assert command is not None, "the memory holds the whole command until it is finished"
            if not entry.begun or self._handlers.get(command.type):
                self._waiting.append(command)
            else:
                message = "the device stopped while the command was running: it may or may not have been done"
                effects += self._end(now_ms, command, error={"code": "interrupted", "message": message})
        return effects + self._start_next(now_ms)

    def receive(self, now_ms: int, topic: str, payload: bytes) -> list[Effect]:
        """Handles a message. When this returns, its effects are durable, so the PUBACK may be sent."""
        place = parse_topic(self._prefix, topic)
        if place is None or place[0] != self._hardware_id or place[1] not in self._suffixes:
            return []
        command = self._understand(place[1], payload)
        if command is None:
            return []
        seen = self._memory.get(command.id) if command.id else None
        if seen is not None:
            return self._send(seen.answer, command)
        refusal = self._refusal(now_ms, command)
        if refusal is not None:
            return self._end(now_ms, command, error=refusal)
        if len(self._waiting) >= MAX_WAITING:
            return []
        answer = Answer(id=command.id or None, status="acknowledged", at=rfc3339(now_ms))
        idle = self._running is None
        self._remember(command, Remembered(answer=answer, begun=idle, command=command))
        if idle:
            self._running = command
            return [*self._send(answer, command), Run(command=command)]
        self._waiting.append(command)
        return self._send(answer, command)

    def needs_keys(self, topic: str, payload: bytes) -> bool:
        """Whether a message is a new command whose grant names a key that the verifier does not know."""
        place = parse_topic(self._prefix, topic)
        command = None if place is None else self._understand(place[1], payload)
        if self._verifier is None or command is None or not command.grant:
            return False
        if self._memory.get(command.id) is not None:
            return False  # it only gets its last answer again
        try:
            return not self._verifier.knows(command.grant)
        except GrantRefused:
            return False

    def progress(
        self, now_ms: int, command: CommandMessage, percent: float, note: str | None
    ) -> list[Effect]:
        """Reports the progress of the running handler. It is not stored in the memory.

        Raises:
            ValueError: `percent` is not 0 to 100, or the report cannot be encoded.
        """
        if command is not self._running:
            return []
        report = Progress(percent=percent, note=note)
        # The clock, because a restarted device has forgotten what it counted.
        self._seq = max(self._seq + 1, now_ms)
        answer = Answer(
            id=command.id or None,
            status="progress",
            progress=report,
            at=rfc3339(now_ms),
            seq=None if self._signs_with is None else self._seq,
        )
        sendable = self._sendable(answer)
        if sendable is None:
            raise ValueError(f"not a progress: {percent!r:.40} %, note {note!r:.40}")
        return self._send(sendable, command)

    def finish(
        self, now_ms: int, command: CommandMessage, result: Any = None, error: dict[str, Any] | None = None
    ) -> list[Effect]:
        """Records the result or the error of the handler that ended, and starts the next command."""
        assert command is self._running, "only the running command can end"
        self._running = None
        return self._end(now_ms, command, result=result, error=error) + self._start_next(now_ms)

    def _understand(self, suffix: str, payload: bytes) -> CommandMessage | None:
        if self._bare:
            name = self._words.get((suffix, payload.decode("utf-8", "replace").strip()))
            return None if name is None else CommandMessage(id="", type=name)
        try:
            return decode_command(payload)
        except Malformed:
            return None

    def _refusal(self, now_ms: int, command: CommandMessage) -> dict[str, Any] | None:
        if command.expires_at is not None and parse_rfc3339(command.expires_at) <= now_ms:
            return {"code": "expired", "message": f"expired at {command.expires_at}"}
        if self._verifier is not None and not self._bare:
            try:
                self._verifier.verify(
                    command.grant, command_id=command.id, command=command.type, params=command.params
                )
            except GrantRefused as refused:
                details = {"reason": refused.code}
                return {"code": "grant_refused", "message": refused.sentence, "details": details}
        if command.type not in self._handlers:
            return {"code": "unknown_command", "message": f"this device has no command {command.type}"}
        return None

    def _start_next(self, now_ms: int) -> list[Effect]:
        effects: list[Effect] = []
        while self._waiting and self._running is None:
            command = self._waiting.popleft()
            # Checked again, because the command or its grant may have expired while it waited.
            refusal = self._refusal(now_ms, command)
            if refusal is not None:
                effects += self._end(now_ms, command, error=refusal)
                continue
            acknowledged = Answer(id=command.id or None, status="acknowledged", at=rfc3339(now_ms))
            self._remember(command, Remembered(answer=acknowledged, begun=True, command=command))
            self._running = command
            effects.append(Run(command=command))
        return effects

    def _end(
        self, now_ms: int, command: CommandMessage, result: Any = None, error: dict[str, Any] | None = None
    ) -> list[Effect]:
        named, at = command.id or None, rfc3339(now_ms)
        if error is None:
            answer = Answer(id=named, status="executed", result=as_result(result), at=at)
            plain = msgspec.structs.replace(answer, result={"omitted": "too large, or not JSON"})
        else:
            answer = Answer(id=named, status="failed", error=error, at=at)
            plain = msgspec.structs.replace(answer, error=as_error("the error is too large, or not JSON"))
        answer = self._sendable(answer) or plain
        self._remember(command, Remembered(answer=answer, begun=True))
        return self._send(answer, command)

    def _remember(self, command: CommandMessage, remembered: Remembered) -> None:
        if command.id:
            self._memory.put(command.id, remembered)

    def _send(self, answer: Answer, command: CommandMessage) -> list[Effect]:
        if self._bare:
            answers = self._type.definition(command.type).answers.items()
            text = next((text for text, status in answers if status == answer.status), None)
            if text is None:
                return []
            payload = text.encode()
        else:
            payload = self._encoded(answer)
        topic = device_topic(self._prefix, self._hardware_id, self._type.answer_suffix)
        return [Send(topic=topic, payload=payload)]

    def _encoded(self, answer: Answer) -> bytes:
        if self._signs_with is None:
            return encode_answer(answer, self._type.payload)
        return sign(encode_answer(answer), self._hardware_id, self._signs_with)

    def _sendable(self, answer: Answer) -> Answer | None:
        """The answer as the broker will decode it, or None if the broker could not decode it."""
        try:
            return msgspec.structs.replace(decode_answer(self._encoded(answer), None, {}), token=None)
        except (Malformed, TypeError, ValueError, RecursionError, OverflowError):
            return None
