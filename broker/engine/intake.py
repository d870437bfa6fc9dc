"""Takes in the MQTT messages of devices: answers and status messages, in order of arrival.

A message gets its PUBACK only when every event that it causes is durable. The topic names the device,
never the payload. A message that matches no command is counted and kept for the operator. No message
of a device may stop the intake.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from broker.domain.decisions import Verdict, decide
from broker.domain.errors import Unavailable
from broker.domain.events import Error, Evidence
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Member, Presence, candidates
from broker.domain.lifecycle import ANSWERS, CommandState, Request
from broker.domain.waiting import first
from broker.engine.commands import Commands
from broker.engine.dispatch import Dispatch
from broker.engine.quotas import waiting_room
from broker.engine.registry import Registry
from broker.often import Often, shown
from broker.seams import Link, Message, Unmatched
from devices.types import AnswerStatus
from devices.wire import (
    Answer,
    Malformed,
    bare_word,
    decode_answer,
    decode_status,
    parse_topic,
    status_topic,
)

logger = structlog.get_logger()

BATCH, BATCH_BYTES = 100, 65_536  # taken in without a pause: more would block the event loop too long
QOS0_AT_ONCE = 32  # QoS 0 messages of an external MQTT server in one batch
KEPT_BYTES = 1_024
OWN = object()  # `Message.token` of presence messages that come from our own MQTT server
# Reason code (MQTT 5) and reason string of the PUBACK for a message that could not be used.
SAYS = {
    "malformed": (0x99, "this cannot be read as an answer or a status of this device's type"),
    "wrong_device": (0x87, "this is not the device's own topic, or not its own command"),
    "unknown_device": (0x87, "this device is not known"),
}
TAKEN = (0, "")


class Intake:
    """`link` sends the PUBACKs. `embedded`: presence comes from the embedded MQTT server only."""

    def __init__(
        self, commands: Commands, registry: Registry, dispatch: Dispatch, link: Link, *, embedded: bool
    ) -> None:
        self.commands = commands
        self.live = commands.live
        self.writer = commands.writer
        self.registry = registry
        self.dispatch = dispatch
        self.link = link
        self.embedded = dispatch.embedded = embedded
        registry.presence = dispatch.presence
        self.on_unmatched: Callable[[str], None] = lambda _: None
        self.on_unfit: Callable[[str], None] = lambda _: None
        self._queue: deque[Message] = deque()
        self._waiting = waiting_room(commands.limits)
        self._wake = asyncio.Event()
        self._backlog_until = 0
        self._sessions = 0  # MQTT sessions of our link so far
        self._behind = 0  # messages to take before hand-over goes on after a failed commit
        self._often = Often(lambda: self.writer.clock.monotonic_ms() / 1_000)
        self._of_no_use: str | None = None  # why the current message was kept as unmatched

    # --- called by the link ---

    def link_up(self) -> None:
        self._backlog_until = self.writer.now() + 2_000
        self._sessions += 1
        if not self.embedded:
            self.registry.nobody_known_online()
        self.dispatch.link_up()

    def link_down(self, why: str) -> None:
        self.dispatch.link_down()

    def message(self, message: Message) -> None:
        arrived = msgspec.structs.replace(message, arrived_at=self.writer.now())
        # Our own server bounds the rate of each client, and there QoS 0 keeps its order with presence.
        if not message.qos and not self.embedded:
            name, _ = parse_topic(self.commands.prefix, message.topic) or ("", "")
            device = self.live.device(name)
            project = "" if device is None else device.project
            room = self._waiting.put(project, name, arrived, len(message.payload))
        elif room := bool(message.qos) or len(self._queue) < self.commands.limits.qos0_in_all:
            self._queue.append(arrived)
        if not room:
            self.on_unmatched("overrun")
            self.link.puback(message)
        self._wake.set()

    # Presence from the embedded server goes through the same queue, so that it stays in order with answers.

    def device_online(self, hardware_id: str) -> None:
        self._own(hardware_id, b"online")

    def device_offline(self, hardware_id: str) -> None:
        self._own(hardware_id, b"offline")

    def _own(self, hardware_id: str, word: bytes) -> None:
        self.message(Message(topic=status_topic(self.commands.prefix, hardware_id), payload=word, token=OWN))

    # --- handling messages ---

    async def run(self) -> None:
        """Takes in messages for ever, batch by batch."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue or self._waiting:
                await self._take_batch()
                await asyncio.sleep(0)  # lets other tasks run: a batch may contain no other wait

    async def _take_batch(self) -> None:
        self._queue.extend(self._waiting.take(QOS0_AT_ONCE - len(self._queue)))
        batch = first(self._queue, BATCH, BATCH_BYTES, lambda message: len(message.payload))
        places = [
            parse_topic(self.commands.prefix, message.topic) if message.foreign is None else None
            for message in batch
        ]
        names = {place[0] for place in places if place is not None}
        names |= {message.foreign for message in batch if message.foreign is not None}
        await self._ready(names)
        answers = [self._read(message, place) for message, place in zip(batch, places, strict=True)]
        named = {answer.id for answer in answers if isinstance(answer, Answer) and answer.id is not None}
        await self._ready(names, named)
        # From here on: no await. A failed commit may have put older messages in front; then start again.
        if self._queue[0] is not batch[0]:
            return
        for _ in batch:
            self._queue.popleft()
        session, presence = self._sessions, self._known(names)
        taken: list[tuple[Message, tuple[int, str]]] = []
        for message, place, answer in zip(batch, places, answers, strict=True):
            self._of_no_use = None
            try:
                self._take(message, place, answer)
            except Exception:
                # One bad message must not stop the others. Without a PUBACK it would come again for ever.
                logger.exception("intake.failed", topic=shown(message.topic))
            taken.append((message, SAYS.get(self._of_no_use or "", TAKEN)))
        self.writer.then(lambda: self._puback(taken), lambda: self._again(batch, presence, session))
        if self._behind:
            self._behind = max(0, self._behind - len(batch))
            if not self._behind:
                self.dispatch.go_on()

    async def _ready(self, names: Iterable[str], command_ids: Iterable[str] = ()) -> None:
        """Like `Commands.ready`, but waits while the log cannot be written: answers are never refused."""
        while True:
            await self.writer.opened()
            try:
                await self.commands.ready(names, command_ids)
                return
            except Unavailable:
                continue

    def _puback(self, taken: list[tuple[Message, tuple[int, str]]]) -> None:
        for message, (reason, text) in taken:
            if message.token is not OWN:
                self.link.puback(message, reason, text)

    def _known(self, names: Iterable[str]) -> dict[str, Presence | None]:
        devices = (self.live.device(name) for name in names)
        return {device.id: self.live.presence.get(device.id) for device in devices if device is not None}

    def _again(self, batch: list[Message], presence: dict[str, Presence | None], session: int) -> None:
        """The commit failed and its decisions are void: queues the messages again, in order.

        `presence`: what was known of their devices before them, which is put back. It is learnt again from
        the messages. `session`: our MQTT session then. If another one began since, an online device may
        have left unnoticed.
        """
        self._queue.extendleft(reversed(batch))
        for device_id, before in presence.items():
            if before is None:
                self.live.presence.pop(device_id, None)
            elif before is Presence.ONLINE and session != self._sessions and not self.embedded:
                self.live.presence[device_id] = Presence.UNKNOWN
            else:
                self.live.presence[device_id] = before
        self._wake.set()

    def resumed(self) -> None:
        """The log can be written again. Hand-over goes on when the messages that waited meanwhile are taken:
        one of them may be an answer, or say that a device has left."""
        self._behind = len(self._queue)
        self.dispatch.waits = self._behind > 0
        if not self._behind:
            self.dispatch.go_on()

    def _read(self, message: Message, place: tuple[str, str] | None) -> Answer | Malformed | None:
        """The decoded answer, or why it cannot be decoded; None for status messages and unknown topics."""
        device = self.live.device(place[0]) if place is not None else None
        if place is None or device is None or place[1] == "status":
            return None
        try:
            return decode_answer(message.payload, message.correlation, self._words(device, message.payload))
        except Malformed as error:
            return error

    def _words(self, device: DeviceState, payload: bytes) -> dict[str, AnswerStatus]:
        """The bare answer texts of a device: those of its type, or those of its open commands' definitions.

        The definitions matter if the type has changed since the command was created.
        """
        kind = self.commands.types.get(device.device_type)
        words, word = kind.words if kind else {}, bare_word(payload)
        lane = self.live.lanes.get(device.id)
        if word is None or word in words or lane is None:
            return words
        for member in (*lane.members.values(), *lane.late.values()):
            if word in member.definition.answers:
                return member.definition.answers
        return words

    def _take(
        self, message: Message, place: tuple[str, str] | None, answer: Answer | Malformed | None
    ) -> None:
        if message.foreign is not None:
            self.unmatched(message, self.live.device(message.foreign), "wrong_device")
            return
        device = self.registry.told.newest(place[0]) if place is not None else None
        if device is None or place is None or device.hardware_id != place[0] or device.deleted_at is not None:
            if message.token is OWN:
                return  # the device was deleted since the embedded server queued this
            self.unmatched(message, None, "unknown_device")
        elif place[1] == "status":
            self._take_status(message, device)
        elif answer is None or isinstance(answer, Malformed):
            self.unmatched(message, device, "malformed")
            self._heard(device, message)  # the device is there, even if its answer cannot be read
        else:
            self._take_answer(message, device, answer)
            # After the answer: it may close the command, which coming online would otherwise send again.
            self._heard(self.registry.told.newest(place[0]) or device, message)

    def _take_status(self, message: Message, device: DeviceState) -> None:
        if self.embedded and message.token is not OWN:
            return  # with the embedded server, presence is the connection, not a message
        try:
            online, session, unfit = decode_status(message.payload)
        except Malformed:
            self.unmatched(message, device, "malformed")
            return
        if unfit:
            self._left_out(message, device, unfit)
            if not online and device.session is not None:
                return  # it may be the late last will of an older session
        if message.retain:
            # A retained `online` may be years old, a retained `offline` the late will of another session.
            unsure = online or (None not in (session, device.session) and session != device.session)
            self.registry.heard(device, Presence.UNKNOWN if unsure else Presence.OFFLINE, session)
        elif online:
            self.registry.heard(device, Presence.ONLINE, session)
            if self.embedded:
                self.dispatch.pump(device.id)  # it may have subscribed to one more of its topics
        elif device.session is None or session is None or session == device.session:
            self.registry.heard(device, Presence.OFFLINE, session)

    def _heard(self, device: DeviceState, message: Message) -> None:
        """A live message shows that the device is online. A retained one, or one in the first 2 s of a
        session (backlog), shows only that it once was."""
        known = self.live.presence.get(device.id, Presence.NEVER)
        if message.retain or self.writer.now() < self._backlog_until:
            if known is Presence.NEVER and not self.embedded:
                self.registry.heard(device, Presence.UNKNOWN, device.session)
            return
        if known is not Presence.ONLINE and not self.embedded:
            self.registry.heard(device, Presence.ONLINE, device.session)
        self.dispatch.alive(device.id)

    # --- answers ---

    def _take_answer(self, message: Message, device: DeviceState, answer: Answer) -> None:
        evidence: Evidence = (
            "device_ack" if answer.status in ("acknowledged", "progress") else "device_result"
        )
        if answer.id is None:
            found = self._candidate(message, device)
            if isinstance(found, str):
                self.unmatched(message, device, found)
                return
            state, evidence = found.state, "inferred"
        else:
            known = self.live.command(answer.id)
            if known is None or known.device_id != device.id:
                ours = known is not None and known.project == device.project
                self.unmatched(message, device, "wrong_device" if ours else "unknown", answer.id)
                return
            state = known
        if (word := bare_word(message.payload)) is not None:
            # The command's own definition says what a text means: "ON" is no answer to an `off` command.
            own = self.live.definitions[state.definition].answers
            if own.get(word) != answer.status:
                self.unmatched(message, device, "nothing_in_flight", state.id)
                return
        self.answered(state, answer, evidence, message, device)

    def _candidate(self, message: Message, device: DeviceState) -> Member | str:
        """The one command that an answer without id can belong to, or the `unmatched` reason."""
        lane = self.live.lanes.get(device.id)
        found = candidates(lane, message.arrived_at) if lane is not None else []
        # A retained text is an old message of the device, so it is no answer to this command.
        if not found or message.dup or (message.retain and not self.embedded):
            return "nothing_in_flight"
        return found[0] if len(found) == 1 else "ambiguous"

    def answered(
        self, state: CommandState, answer: Answer, evidence: Evidence, message: Message, device: DeviceState
    ) -> None:
        """Decides one answer to one command and carries the decision out."""
        error = answer.error
        request = Request(
            input=ANSWERS[answer.status],
            now=self.writer.now(),
            evidence=evidence,
            at=answer.at,
            result=msgspec.Raw(msgspec.json.encode(answer.result)),
            error=msgspec.convert(error, Error) if error is not None else None,
            percent=answer.progress.percent if answer.progress else None,
            note=answer.progress.note if answer.progress else None,
        )
        decision = decide(state, request)
        if answer.unfit:
            self._left_out(message, device, answer.unfit, state.id)
        if decision.verdict is Verdict.RECORD:
            self.commands.apply(state, decision, f"device:{device.id}")
            self.check_result(state, answer)
        elif decision.verdict is Verdict.UNMATCHED:
            self.unmatched(message, device, decision.word, state.id)
        elif answer.status == "progress" and (member := self.live.members.get(state.id)) is not None:
            self.dispatch.reported(member)

    def check_result(self, state: CommandState, answer: Answer) -> None:
        """Logs and counts a result that does not fit the type's result schema.

        The event is recorded all the same, because the device has executed the command.
        """
        definition = self.live.definitions[state.definition]
        fault = definition.result_fault(answer.result) if answer.status == "executed" else None
        if fault is not None:
            line = {"command_id": state.id, "type": definition.device_type, "fault": fault[:200]}
            self._often.warn("result.unfit", line)
            self.on_unfit(definition.device_type)

    def unmatched(
        self, message: Message, device: DeviceState | None, reason: str, command_id: str | None = None
    ) -> None:
        """Counts a message that matches no command, and keeps it outside the log for the operator."""
        self._keep(message, device, reason, command_id)
        self._of_no_use = reason
        if reason == "promise_broken":
            logger.error("delivery.promise_broken", command_id=command_id)
        line = {"reason": reason, "topic": shown(message.topic), "command_id": shown(command_id or "-")}
        self._often.info("answer.unmatched", line)

    def _left_out(
        self, message: Message, device: DeviceState, parts: Sequence[str], command_id: str | None = None
    ) -> None:
        """Counts and keeps a message of which parts could not be used. It counts without them."""
        for part in parts:
            self._keep(message, device, f"unfit_{part}", command_id)
        self._often.warn("answer.part_left_out", {"parts": list(parts), "topic": shown(message.topic)})

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
