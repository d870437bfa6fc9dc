"""Reads the messages of devices whose types have rules: which command does a message answer, and what it
says.

It decides nothing: `Intake` passes what is read here to `decide`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import structlog

from broker.domain import answerable
from broker.domain.events import Evidence
from broker.domain.fleet import DeviceState, News, same_attributes
from broker.domain.lanes import Member
from broker.domain.lifecycle import CommandState
from broker.engine.live import Live
from broker.engine.quotas import Told
from broker.engine.speech.addresses import Addresses, Place
from devices.speech.answers import answer_of
from devices.speech.expressions import BadExpression, Unanswerable, compiled, evaluate
from devices.speech.messages import Unreadable, decoded
from devices.speech.rules import Decoded, Reading, Rule, holds, read
from devices.speech.speech import Speech
from devices.types import Definition
from devices.wire import Answer, Malformed, Status, decode_status

logger = structlog.get_logger()

MAX_STATE_BYTES = 16_384


class Found(NamedTuple):
    """The command that a message answers, and the answer."""

    state: CommandState
    answer: Answer
    evidence: Evidence


class Reader:
    """Reads with the rules of each command's own definition, so a changed type does not change open
    commands."""

    def __init__(self, live: Live, addresses: Addresses) -> None:
        self._live = live
        self._addresses = addresses

    def decode(self, device: DeviceState, place: Place, payload: bytes) -> Decoded | Malformed | None:
        """The message as a value; None if its type has Ordain's own form, without rules and states."""
        if not place.pattern or not any(self._foreign(device, place)):
            return None
        try:
            return decoded(payload)
        except Unreadable as error:
            return Malformed(str(error))

    def _foreign(self, device: DeviceState, place: Place) -> Iterator[bool]:
        for definition in self._definitions(device):
            speech = definition.speech
            if speech is not None and place.pattern in speech.says:
                yield bool(speech.rules) or place.pattern not in speech.answer_topics

    def ids(self, hardware_id: str, message: Decoded) -> list[str]:
        """The command ids that a message may name."""
        found: list[str] = []
        device = self._live.device(hardware_id)
        for rule in self._rules(device) if device is not None else ():
            if rule.id is not None and isinstance(named := _value(rule.id, message), str):
                found.append(named)
        return found

    def _rules(self, device: DeviceState) -> list[Rule]:
        speeches = (definition.speech for definition in self._definitions(device))
        return list(dict.fromkeys(rule for speech in speeches if speech is not None for rule in speech.rules))

    def _definitions(self, device: DeviceState) -> list[Definition]:
        """Those of the device's open commands, then those of its type."""
        lane = self._live.lanes.get(device.id)
        members = [] if lane is None else [*lane.members.values(), *lane.late.values()]
        found = {id(member.definition): member.definition for member in members}
        kind = self._addresses.types.get(device.device_type)
        return [*found.values(), *(kind.definitions if kind is not None else ())]

    # --- answers ---

    def answer(
        self, device: DeviceState, place: Place, message: Decoded, arrived_at: int, *, live: bool
    ) -> Found | str:
        """The command that a message answers; else the reason why there is none.

        `live`: it is neither retained nor sent a second time; only then it may belong to a command that it
        does not name.
        """
        fits = False
        for definition in self._definitions(device):
            if definition.speech is None:
                continue
            reading = read(definition.speech.rules, place.pattern, message)
            if isinstance(reading, Reading) and (reading.id is not None or reading.number is not None):
                return self._named(device, place, message, reading)
            fits = fits or isinstance(reading, Reading)
        lane = self._live.lanes.get(device.id)
        candidates = answerable.candidates(lane, arrived_at) if lane is not None and live else []
        read_by = [(each, self._read(each, place, message)) for each in candidates]
        found = [(each, reading) for each, reading in read_by if isinstance(reading, Reading)]
        if len(found) > 1:
            return "ambiguous"
        if not found:
            return "no_rule" if candidates or not fits else "nothing_in_flight"
        member, reading = found[0]
        return Found(member.state, answer_of(reading), "inferred")

    def _read(self, member: Member, place: Place, message: Decoded) -> Reading | str:
        speech = member.definition.speech
        if speech is None:
            return "its type has no rules"
        return read(speech.rules, place.pattern, message, params_of(member.state))

    def _named(self, device: DeviceState, place: Place, message: Decoded, reading: Reading) -> Found | str:
        command_id = reading.id
        if reading.number is not None:
            command_id = self._live.numbered(device.id, reading.number)
        state = None if command_id is None else self._live.command(command_id)
        if state is None:
            return "unknown"
        if state.device_id != device.id:
            return "wrong_device" if state.project == device.project else "unknown"
        speech = self._live.definitions[state.definition].speech
        if speech is None:
            return "no_rule"
        own = read(speech.rules, place.pattern, message, params_of(state))
        if not isinstance(own, Reading):
            return "no_rule"
        acknowledged = own.status in ("acknowledged", "progress")
        return Found(state, answer_of(own), "device_ack" if acknowledged else "device_result")

    # --- states ---

    def done(self, device: DeviceState, place: Place, message: Decoded, arrived_at: int) -> list[Member]:
        """The commands that a live state shows to be done."""
        lane = self._live.lanes.get(device.id)
        if lane is None:
            return []
        return [
            member
            for member in answerable.observable(lane, arrived_at)
            if (speech := member.definition.speech) is not None
            and speech.done_when is not None
            and place.pattern in speech.state_topics
            and holds(speech.done_when, message, params_of(member.state))
        ]

    def remember(self, device: DeviceState, place: Place, topic: str, message: Decoded, told: Told) -> None:
        """Takes in the last known state of the device. What changes it is an event, within the device's
        rate."""
        speech = self.speech(device)
        if speech is None or speech.record_state == "none" or place.pattern not in speech.state_topics:
            return
        newest = told.newest(device.id)
        if newest is None:
            return
        state = merged(newest.reported, speech, topic, message.value)
        if len(msgspec.json.encode(state)) > MAX_STATE_BYTES:
            logger.warning("state.too_large", device_id=device.id, most=MAX_STATE_BYTES)
        elif not same_attributes(state, newest.reported or {}):
            told.tell(device.id, News(state=state))

    def status(
        self, device: DeviceState, place: Place, payload: bytes, said: Answer | Decoded | Malformed | None
    ) -> Status:
        """Whether the device says that it is online.

        Raises:
            Malformed: it says neither.
        """
        speech = self.speech(device)
        if not place.pattern or speech is None or speech.online is None or speech.offline is None:
            return decode_status(payload)
        if isinstance(said, Decoded):
            if holds(speech.online, said):
                return Status(True)
            if holds(speech.offline, said):
                return Status(False)
        raise Malformed("neither what the type has for online nor for offline")

    def speech(self, device: DeviceState) -> Speech | None:
        """What all commands of the device's type have in common: topics, presence, states."""
        kind = self._addresses.types.get(device.device_type)
        return None if kind is None else next(iter(kind.speeches), None)


def merged(known: dict[str, Any] | None, speech: Speech, topic: str, value: Any) -> dict[str, Any]:
    """The last known state with one more report.

    With one state topic, the members of its object. With several, the value of each, under the last level of
    its topic. A value that is no object is always kept so.
    """
    state = dict(known or {})
    if isinstance(value, dict) and len(speech.state_topics) == 1:
        return state | value
    state[topic.rpartition("/")[2]] = value
    return state


def params_of(state: CommandState) -> Any:
    return msgspec.json.decode(state.params)


def _value(expression: str, message: Decoded) -> Any:
    try:
        return evaluate(compiled(expression), message.value)
    except (BadExpression, Unanswerable):
        return None
