"""Repeats the decisions in a log with the same functions, and with the recorded times as the clock.

Pure. For each recorded event of a command, this module rebuilds the request from the log, calls `decide` and
the lane again, and compares the result with the recorded event. Some inputs are not in the log, so they are
not checked: random draws, whether an attempt still counted, and when an attempt by MQTT ended (its timer, the
receipt of the MQTT server, or the device's going offline ends it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from broker.domain import lanes
from broker.domain.decisions import decide
from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Changed,
    CommandEvent,
    Created,
    Defined,
    Executed,
    Expired,
    Failed,
    Progressed,
    Published,
    Recorded,
    Started,
    TimedOut,
    subject_kind,
)
from broker.domain.fleet import DeviceState, evolve_device
from broker.domain.lanes import Flight, Lane, Member, Presence
from broker.domain.lifecycle import CommandState, Input, Request, evolve
from devices.types import Definition

SLOTS = 100
TIMERS = {
    "no_answer": Input.ATTEMPT_TIMER,
    "no_result": Input.RESULT_TIMER,
    "ttl": Input.EXPIRY,
    "operator": Input.ABANDON,
    "device_deleted": Input.DEVICE_DELETED,
    "unsendable": Input.UNSENDABLE,
}


class Step(NamedTuple):
    """One repeated decision. `fault`: a sentence that says how it differs; None if it is the same."""

    recorded: Recorded
    input: Input
    fault: str | None


def redecide(events: Iterable[Recorded], since: int) -> Iterator[Step]:
    """Repeats the decisions of all command events from position `since` on. Earlier events only build state.

    `events`, in order of position: those of the commands of one device's lane, those of the device, the
    definitions that these commands use, and the starts of the broker.
    """
    then = _Then()
    for recorded in events:
        if subject_kind(recorded.stream) == "command" and recorded.position >= since:
            yield then.decided(recorded)
        then.take(recorded)


class _Then:
    """The state that the broker had at one position, as far as the log contains it."""

    def __init__(self) -> None:
        self.lane = Lane("")
        self.known: dict[str, Member] = {}
        self.definitions: dict[str, Definition] = {}
        self.device: DeviceState | None = None
        self.embedded = False  # its MQTT server is ours
        self.void = False  # a restart made the device's presence unknown
        self.moved = False  # to another gateway or to none, and not heard since

    def take(self, recorded: Recorded) -> None:
        event = recorded.event
        if isinstance(event, Defined):
            definition = msgspec.convert(event.definition, Definition)
            self.definitions[recorded.stream.removeprefix("type/")] = definition
        elif isinstance(event, Started):
            self.void, self.embedded = True, event.mqtt == "embedded"
        elif subject_kind(recorded.stream) == "device":
            self.device = evolve_device(self.device, recorded)
            self.void = self.void and recorded.type != "online"
            left = isinstance(event, Changed) and event.gateway is not msgspec.UNSET
            self.moved = left or (self.moved and recorded.type != "online")
        elif subject_kind(recorded.stream) == "command":
            self._fold(recorded)

    def _fold(self, recorded: Recorded) -> None:
        member = self.known.get(recorded.stream)
        state = evolve(None if member is None else member.state, recorded)
        if member is None:
            member = self.known[state.id] = Member(state, self.definitions[state.definition])
            self.lane.members[state.id] = member
        before, member.state = member.state, state
        if state.closed:
            lanes.closed(self.lane, member, recorded.decided_at)
        elif before.closed:
            lanes.reopened(self.lane, member)

    def decided(self, recorded: Recorded) -> Step:
        member = self.known.get(recorded.stream)
        assert isinstance(recorded.event, CommandEvent)
        event = msgspec.structs.replace(recorded.event, via=None)  # the request is not part of a decision
        state = None if member is None else member.state
        definition = None if member is None else member.definition
        request = _request(event, state, definition, recorded.decided_at)
        decision = decide(state, request)
        fault = None
        if decision.event is None:
            fault = f"{request.input.value}: {decision.verdict.value} {decision.word}".rstrip()
        elif decision.event != event:
            fault = f"{request.input.value}: another event would be recorded: {decision.event}"
        elif member is not None:
            fault = self._untimely(member, event, request, recorded.decided_at)
        return Step(recorded, request.input, fault)

    def _untimely(self, member: Member, event: CommandEvent, request: Request, now: int) -> str | None:
        """Why a timer would not have been due, or the lane would not have sent the command; else None."""
        state = member.state
        timers, member.begun = [Input.EXPIRY, Input.RESULT_TIMER], None
        if state.handed_over_at is not None and state.transport in ("heartbeat", "relay"):
            timers.append(Input.ATTEMPT_TIMER)
            lease = lanes.lease_ms(member.definition, state.transport)
            member.begun = Flight(open=True, lease_until=state.handed_over_at + lease)
        if request.input in timers and lanes.overdue(member, now) is not request.input:
            return f"{request.input.value}: not at {now}"
        if isinstance(event, Published) and event.transport == "mqtt":
            for each in self.lane.members.values():
                each.begun = Flight(open=each is not member)
            presence = self._presence(sure=event.counts)
            if member not in lanes.due(self.lane, presence, now, SLOTS):
                return f"hand over by MQTT: not due at {now}, with the device {presence.value}"
        return None

    def _presence(self, *, sure: bool) -> Presence:
        """`sure`: the attempt counts. At an external MQTT server, a retained or old message makes the device
        unknown without an event; then attempts do not count."""
        sure = sure or self.embedded
        if self.device is None or not self.device.heard:
            return Presence.NEVER if sure else Presence.UNKNOWN
        if not self.device.online:
            # The return of a gateway makes its devices unknown. It is an event of the gateway only. A device
            # that leaves its gateway is unknown too.
            sure = sure and self.device.gateway is None and not self.moved
            return Presence.OFFLINE if sure else Presence.UNKNOWN
        return Presence.UNKNOWN if self.void else Presence.ONLINE


def _request(
    event: CommandEvent, state: CommandState | None, definition: Definition | None, now: int
) -> Request:
    """The request that leads to an event, rebuilt from the log."""
    repeatable = definition is None or definition.repeatable
    signed = _signed(event, definition)
    match event:
        case Created():
            return Request(input=Input.CREATE, now=now, created=event)
        case Published():
            asked = Input.HAND_OVER if event.transport == "mqtt" else Input.FETCH
            return Request(
                input=asked,
                now=now,
                transport=event.transport,
                counts=event.counts,
                repeatable=repeatable,
                number=event.number,
            )
        case Acknowledged():
            return Request(
                input=Input.ANSWER_ACKNOWLEDGED, now=now, at=event.at, evidence=event.evidence, **signed
            )
        case Progressed():
            return Request(
                input=Input.ANSWER_PROGRESS,
                now=now,
                percent=event.percent,
                note=event.note,
                at=event.at,
                evidence=event.evidence,
                seq=event.seq,
                **signed,
            )
        case Executed(evidence="mqtt_puback"):
            one_way = definition is not None and definition.completes_on == "published"
            return Request(input=Input.ACCEPTED, now=now, one_way=one_way, result=event.result)
        case Executed():
            return Request(
                input=Input.OBSERVED if event.evidence == "observed" else Input.ANSWER_EXECUTED,
                now=now,
                result=event.result,
                at=event.at,
                evidence=event.evidence,
                **signed,
            )
        case Failed():
            return _failed(event, now, signed)
        case TimedOut():
            counted = 0 if state is None else state.counted
            return Request(
                input=TIMERS[event.reason],
                now=now,
                by=event.by or "broker",
                reason=event.note,
                repeatable=repeatable,
                last_attempt=definition is not None and counted >= definition.max_attempts,
            )
        case Expired():
            return Request(input=Input.EXPIRY, now=now)
        case Cancelled():
            asked = Input.CANCEL if event.superseded_by is None else Input.SUPERSEDE
            return Request(
                input=asked, now=now, by=event.by, reason=event.reason, superseded_by=event.superseded_by
            )


def _signed(event: CommandEvent, definition: Definition | None) -> dict[str, Any]:
    """The verdict on the signature is part of the event: keys may have changed since."""
    if not isinstance(event, Acknowledged | Progressed | Executed | Failed) or definition is None:
        return {}
    signature = "valid" if event.signed else "unsigned"
    return {"signing": definition.answers_signed, "signature": signature}


def _failed(event: Failed, now: int, signed: dict[str, Any]) -> Request:
    if event.by == "broker":
        return Request(input=Input.UNSENDABLE, now=now, reason=event.error.message)
    if event.by == "mqtt_server":
        return Request(input=Input.REFUSED, now=now, reason=event.error.message, every_attempt_refused=True)
    return Request(
        input=Input.ANSWER_FAILED,
        now=now,
        error=event.error,
        at=event.at,
        evidence=event.evidence,
        **signed,
    )
