"""Takes in the MQTT messages of devices: answers and status messages, in order of arrival.

A message gets its PUBACK only when every event that it causes is durable. The topic names the device,
never the payload. A message that matches no command is counted and kept for the operator. No message
of a device may stop the intake.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

import msgspec
import structlog

from broker.domain.answerable import candidates, is_answerable
from broker.domain.decisions import Verdict, decide
from broker.domain.errors import Unavailable
from broker.domain.events import Evidence
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Member, Presence, ms
from broker.domain.lifecycle import CommandState, Input, Request
from broker.domain.waiting import first
from broker.engine.commands import Commands
from broker.engine.dispatch import SILENCE, Dispatch
from broker.engine.quotas import waiting_room
from broker.engine.registry import Registry
from broker.engine.speech.addresses import ANSWER, PRESENCE, STATE, Place
from broker.engine.speech.answers import request_of, weight
from broker.engine.speech.kept import Kept
from broker.engine.speech.reading import Found, Reader
from broker.often import shown
from broker.seams import Link, Message
from devices.names import status_topic
from devices.speech.rules import Decoded
from devices.types import AnswerStatus
from devices.wire import Answer, Malformed, as_result, bare_word, decode_answer

logger = structlog.get_logger()

BATCH, BATCH_BYTES = 100, 65_536  # taken in without a pause: more would block the event loop too long
CHILD_BYTES = 200  # one device of a gateway takes as long as this many bytes of a message
QOS0_AT_ONCE = 32  # QoS 0 messages of an external MQTT server in one batch
OWN = object()  # `Message.token` of presence messages that come from our own MQTT server
# Reason code (MQTT 5) and reason string of the PUBACK for a message that could not be used.
SAYS = {
    "malformed": (0x99, "this cannot be read as an answer or a status of this device's type"),
    "wrong_device": (0x87, "this is not the device's own topic, or not its own command"),
    "unknown_device": (0x87, "this device is not known"),
    "unsigned": (0x87, "answers to this command must be signed"),
    "bad_signature": (0x87, "the signature is not this device's"),
    "no_key": (0x87, "no key is known that could verify the signature"),
}
TAKEN = (0, "")


class Intake(Kept):
    """`link` sends the PUBACKs. `embedded`: presence comes from the embedded MQTT server only."""

    def __init__(
        self, commands: Commands, registry: Registry, dispatch: Dispatch, link: Link, *, embedded: bool
    ) -> None:
        super().__init__(commands)
        self.registry = registry
        self.addresses = commands.addresses
        self.reader = Reader(commands.live, commands.addresses)
        self.dispatch = dispatch
        self.link = link
        self.embedded = dispatch.embedded = embedded
        self.gateways = registry.gateways
        self.gateways.direct = embedded
        dispatch.others = self.gateways.others
        registry.presence = self.gateways.presence = dispatch.presence
        self._queue: deque[Message] = deque()
        self._waiting = waiting_room(commands.limits)
        self._wake = asyncio.Event()
        self._backlog_until = 0
        self._sessions = 0  # MQTT sessions of our link so far
        self._behind = 0  # messages to take before hand-over goes on after a failed commit

    # --- called by the link ---

    def link_up(self) -> None:
        self.backlog_begins()
        self._sessions += 1
        if not self.embedded:
            self.registry.nobody_known_online()
        self.dispatch.link_up()

    def link_down(self, why: str) -> None:
        self.dispatch.link_down()

    def backlog_begins(self) -> None:
        """For 2 s from now, a message may be from before: it does not show that its device is online."""
        self._backlog_until = self.writer.now() + 2_000

    def message(self, message: Message) -> None:
        arrived = msgspec.structs.replace(message, arrived_at=self.writer.now())
        # Our own server bounds the rate of each client, and there QoS 0 keeps its order with presence.
        if not message.qos and not self.embedded:
            name = next(iter(self.addresses.owners(message.topic)), "")
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
        batch = first(self._queue, BATCH, BATCH_BYTES, self._cost)
        names = {name for each in batch if each.foreign is None for name in self.addresses.owners(each.topic)}
        names |= {message.foreign for message in batch if message.foreign is not None}
        await self._ready(names)
        known = [device for device in map(self.live.device, names) if device is not None]
        names |= {child for device in known for child in self.gateways.children(device.hardware_id)}
        places = [self.addresses.place(each.topic) if each.foreign is None else None for each in batch]
        answers = [self._read(message, place) for message, place in zip(batch, places, strict=True)]
        named = {answer.id for answer in answers if isinstance(answer, Answer) and answer.id is not None}
        for place, answer in zip(places, answers, strict=True):
            if isinstance(answer, Decoded) and place is not None:
                named.update(self.reader.ids(place.hardware_id, answer))
        await self._ready(names, named)
        # From here on: no await. A failed commit may have put older messages in front; then start again.
        if self._queue[0] is not batch[0]:
            return
        for _ in batch:
            self._queue.popleft()
        session, presence = self._sessions, self._known(names)
        taken: list[tuple[Message, tuple[int, str]]] = []
        for message, place, answer in zip(batch, places, answers, strict=True):
            self.of_no_use = None
            try:
                self._take(message, place, answer)
            except Exception:
                # One bad message must not stop the others. Without a PUBACK it would come again for ever.
                logger.exception("intake.failed", topic=shown(message.topic))
            taken.append((message, SAYS.get(self.of_no_use or "", TAKEN)))
        self.writer.then(lambda: self._puback(taken), lambda: self._again(batch, presence, session))
        if self._behind:
            self._behind = max(0, self._behind - len(batch))
            if not self._behind:
                self.dispatch.go_on()

    def _cost(self, message: Message) -> int:
        """How much of `BATCH_BYTES` a message takes, with the devices that a gateway's message may change."""
        children = (len(self.gateways.children(name)) for name in self.addresses.owners(message.topic))
        return weight(message.payload) + CHILD_BYTES * sum(children)

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

    def _read(self, message: Message, place: Place | None) -> Answer | Decoded | Malformed | None:
        """The decoded answer, or why it cannot be decoded; None for status messages and unknown topics."""
        device = self.live.device(place.hardware_id) if place is not None else None
        if place is None or device is None or (PRESENCE in place.roles and not place.pattern):
            return None
        if (found := self.reader.decode(device, place, message.payload)) is not None:
            return found
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
        self, message: Message, place: Place | None, answer: Answer | Decoded | Malformed | None
    ) -> None:
        if message.foreign is not None:
            self.unmatched(message, self.live.device(message.foreign), "wrong_device")
            return
        if place is None and self.addresses.shared(message.topic):
            self.on_unmatched("unknown_device")  # not kept: others than our devices may use these topics
            return
        name = "" if place is None else place.hardware_id
        device = self.registry.told.newest(name)
        if place is None or device is None or device.hardware_id != name or device.deleted_at is not None:
            if message.token is OWN:
                return  # the device was deleted since the embedded server queued this
            self.unmatched(message, None, "unknown_device")
        elif PRESENCE in place.roles:
            self._take_status(message, device, place, answer)
        elif answer is None or isinstance(answer, Malformed):
            self.unmatched(message, device, "malformed")
            self._heard(device, message)  # the device is there, even if its answer cannot be read
        else:
            if isinstance(answer, Decoded):
                self._take_foreign(message, device, place, answer)
            else:
                self._take_answer(message, device, answer)
            # After the answer: it may close the command, which coming online would otherwise send again.
            self._heard(self.registry.told.newest(name) or device, message)

    def _take_foreign(self, message: Message, device: DeviceState, place: Place, said: Decoded) -> None:
        """A message of a device whose type has rules or states."""
        live = not message.dup and (self.embedded or not message.retain)
        found: Found | str = ""
        if ANSWER in place.roles:
            found = self.reader.answer(device, place, said, message.arrived_at, live=live)
        if isinstance(found, Found):
            self.answered(found.state, found.answer, found.evidence, message, device)
        elif found and STATE not in place.roles:
            self.unmatched(message, device, found)
        if STATE in place.roles:
            if live and (self.embedded or message.arrived_at >= self._backlog_until):
                for member in self.reader.done(device, place, said, message.arrived_at):
                    self._observed(member, said, device)
            self.reader.remember(device, place, message.topic, said, self.registry.told)

    def _observed(self, member: Member, said: Decoded, device: DeviceState) -> None:
        """A live state shows that a command is done."""
        result = msgspec.Raw(msgspec.json.encode(as_result(said.value)))
        now = self.writer.now()
        signing = member.definition.answers_signed
        request = Request(input=Input.OBSERVED, now=now, evidence="observed", result=result, signing=signing)
        self.commands.apply(member.state, decide(member.state, request), f"device:{device.id}")

    def _take_status(
        self, message: Message, device: DeviceState, place: Place, said: Answer | Decoded | Malformed | None
    ) -> None:
        if self.embedded and message.token is not OWN and device.gateway is None:
            return  # with the embedded server, presence is the connection, not a message
        try:
            online, session, unfit = self.reader.status(device, place, message.payload, said)
        except Malformed:
            self.unmatched(message, device, "malformed")
            return
        if unfit:
            self.left_out(message, device, unfit)
            if not online and device.session is not None:
                return  # it may be the late last will of an older session
        if message.retain:
            # A retained `online` may be years old, a retained `offline` the late will of another session.
            unsure = online or (None not in (session, device.session) and session != device.session)
            unsure = unsure and not self.gateways.away(device)
            self.registry.heard(device, Presence.UNKNOWN if unsure else Presence.OFFLINE, session)
        elif online:
            self.registry.heard(device, Presence.ONLINE, session)
            self._not_silent(device)
            if self.embedded:
                self.dispatch.pump(device.id)  # it may have subscribed to one more of its topics
        elif device.session is None or session is None or session == device.session:
            self.registry.heard(device, Presence.OFFLINE, session)

    def _heard(self, device: DeviceState, message: Message) -> None:
        """A live message shows that the device is online. A retained one, or one that came before the first
        2 s of this session were over (backlog), shows only that it once was."""
        known = self.live.presence.get(device.id, Presence.NEVER)
        if message.retain or message.arrived_at < self._backlog_until:
            if known is Presence.NEVER and not self.embedded:
                self.registry.heard(device, Presence.UNKNOWN, device.session)
            return
        if known is not Presence.ONLINE and not self.embedded:
            self.registry.heard(device, Presence.ONLINE, device.session)
        self._not_silent(device)
        self.dispatch.alive(device.id)

    def _not_silent(self, device: DeviceState) -> None:
        speech = self.reader.speech(device)
        if speech is not None and speech.silence_sec is not None and not self.embedded:
            until = self.writer.now() + ms(speech.silence_sec)
            self.dispatch.deadlines.set(SILENCE + device.id, until)

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
        if answer.token is not None and self.live.definitions[state.definition].answers_signed == "none":
            self.unmatched(message, device, "malformed", state.id)
            return
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
        sure = len(found) == 1 and is_answerable(found[0], message.arrived_at)
        return found[0] if sure else "ambiguous"

    def answered(
        self, state: CommandState, answer: Answer, evidence: Evidence, message: Message, device: DeviceState
    ) -> None:
        """Decides one answer to one command and carries the decision out."""
        definition, secrets = self.live.definitions[state.definition], self.registry.secrets
        request = request_of(answer, definition, device, secrets, now=self.writer.now(), evidence=evidence)
        decision = decide(state, request)
        if answer.unfit:
            self.left_out(message, device, answer.unfit, state.id)
        if decision.verdict is Verdict.RECORD:
            self.commands.apply(state, decision, f"device:{device.id}")
            self.check_result(state, answer)
        elif decision.verdict is Verdict.UNMATCHED:
            self.unmatched(message, device, decision.word, state.id)
        elif answer.status == "progress" and (member := self.live.members.get(state.id)) is not None:
            self.dispatch.reported(member, answer.seq)
