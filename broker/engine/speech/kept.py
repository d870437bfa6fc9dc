"""Messages of devices that could not be used: counted, and kept outside the log for the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.engine.commands import Commands
from broker.often import Often, shown
from broker.seams import Message, Unmatched
from devices.wire import Answer

logger = structlog.get_logger("broker.engine.intake")

KEPT_BYTES = 1_024


class Kept:
    """`on_unmatched(reason)` and `on_unfit(device type)` count. `of_no_use`: why the message that is taken
    now was kept; the intake clears it before each message."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.live = commands.live
        self.writer = commands.writer
        self.on_unmatched: Callable[[str], None] = lambda _: None
        self.on_unfit: Callable[[str], None] = lambda _: None
        self.of_no_use: str | None = None
        self.often = Often(lambda: self.writer.clock.monotonic_ms() / 1_000)

    def check_result(self, state: CommandState, answer: Answer) -> None:
        """Logs and counts a result that does not fit the type's result schema.

        The event is recorded all the same, because the device has executed the command.
        """
        definition = self.live.definitions[state.definition]
        fault = definition.result_fault(answer.result) if answer.status == "executed" else None
        if fault is not None:
            line = {"command_id": state.id, "type": definition.device_type, "fault": fault[:200]}
            self.often.warn("result.unfit", line)
            self.on_unfit(definition.device_type)

    def unmatched(
        self, message: Message, device: DeviceState | None, reason: str, command_id: str | None = None
    ) -> None:
        """Counts a message that matches no command, and keeps it outside the log for the operator."""
        self._keep(message, device, reason, command_id)
        self.of_no_use = reason
        if reason == "promise_broken":
            logger.error("delivery.promise_broken", command_id=command_id)
        line = {"reason": reason, "topic": shown(message.topic), "command_id": shown(command_id or "-")}
        self.often.info("answer.unmatched", line)

    def left_out(
        self, message: Message, device: DeviceState, parts: Sequence[str], command_id: str | None = None
    ) -> None:
        """Counts and keeps a message of which parts could not be used. It counts without them."""
        for part in parts:
            self._keep(message, device, f"unfit_{part}", command_id)
        self.often.warn("answer.part_left_out", {"parts": list(parts), "topic": shown(message.topic)})

    def _keep(
        self, message: Message, device: DeviceState | None, reason: str, command_id: str | None
    ) -> None:
        """Keeps the first `KEPT_BYTES` bytes of the payload."""
        limits = self.commands.limits
        entry = Unmatched(
            self.writer.now(),
            None if device is None else device.project,
            None if device is None else device.id,
            reason,
            message.topic[:256],
            command_id,
            message.payload[:KEPT_BYTES],
            limits.unmatched_per_device,
            limits.unmatched_in_all,
        )
        self.writer.note(entry)
        self.on_unmatched(reason)
