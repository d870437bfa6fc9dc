"""Ends attempts: decides what a receipt, a timer or the device's presence means, and carries that out.

Synchronous: it stages events and changes `Flight`; it sends nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from broker.domain import attempts, lanes
from broker.domain.decisions import Decision, Verdict, decide
from broker.domain.lanes import Flight, Member, Presence
from broker.domain.lifecycle import Input, Request
from broker.engine.commands import Commands
from broker.engine.deadlines import Deadlines

logger = structlog.get_logger()

NO_SUBSCRIBER = 0x10
REFUSED = frozenset({0x87, 0x90, 0x95, 0x99})


class Attempts:
    """`pump(device_id)` is called when the next attempt of a command may be due at once."""

    def __init__(self, commands: Commands, deadlines: Deadlines, pump: Callable[[str], None]) -> None:
        self._commands = commands
        self._live = commands.live
        self._writer = commands.writer
        self._deadlines = deadlines
        self._pump = pump

    def set_timer(self, member: Member) -> None:
        self._deadlines.set(member.state.id, lanes.wake_at(member, self._writer.now()))

    def receipt(self, member: Member, reason: int) -> None:
        """The reason code of the PUBACK for the open attempt. It is never evidence about the device."""
        flight = member.flight
        if reason == NO_SUBSCRIBER:
            flight.unheard_at, flight.sent_at = self._writer.now(), None
            flight.missed += 1
            self.end(member, Input.NO_SUBSCRIBER)
            return
        flight.unheard, flight.hastened = 0, False
        if reason in REFUSED:
            flight.refused += 1
            logger.warning("mqtt.publish_refused", command_id=member.state.id, reason=reason)
            self.end(member, Input.REFUSED, reason=f"the MQTT server refused the publish (0x{reason:02x})")
        elif reason >= 0x80:
            self.end(member, Input.ATTEMPT_TIMER)
        else:
            self.end(member, Input.ACCEPTED)

    def end(self, member: Member, what: Input, reason: str | None = None) -> None:
        """Decides one input for a handed-over command and carries the decision out."""
        state, definition, flight = member.state, member.definition, member.flight
        presence = self._presence(member)
        request = Request(
            input=what,
            now=self._writer.now(),
            reason=reason,
            last_attempt=flight.lease_until is None and attempts.is_last(member),
            exhausted=attempts.is_exhausted(member),
            every_attempt_refused=flight.refused == state.attempts,
            repeatable=definition.repeatable,
            always_sent=definition.presence == "none",
            held=not lanes.reachable(definition, presence),
            one_way=definition.completes_on == "published",
        )
        decision = decide(state, request)
        if decision.verdict is Verdict.RECORD:
            self._commands.apply(state, decision, "broker")
        elif decision.verdict is Verdict.ATTEMPT:
            self._change(member, decision, presence)

    def _presence(self, member: Member) -> Presence:
        return self._live.presence.get(member.state.device_id, Presence.NEVER)

    def _change(self, member: Member, decision: Decision, presence: Presence) -> None:
        """Carries out a decision that records no event and changes only the attempt (`Flight`)."""
        definition, flight, now = member.definition, member.flight, self._writer.now()
        match decision.word:
            case "close":
                # An attempt that the MQTT server refused counts like an attempt without an answer.
                self.end(member, Input.ATTEMPT_TIMER)
                return
            case "due":
                _hasten(flight, now)
            case "unheard":
                _void(flight)
                flight.unheard += 1
                flight.due_at = now + attempts.unheard_pause_ms(definition, flight.unheard)
            case "dropped":
                if flight.open:
                    _void(flight)
                    flight.dropped += 1
                    tried = max(flight.dropped, member.state.counted)
                    flight.not_before = flight.due_at = now + attempts.drop_pause_ms(definition, tried)
                flight.unheard, flight.hastened = 0, False
            case word:
                leased = flight.lease_until is not None
                flight.open, flight.lease_until = False, None
                if leased:
                    flight.due_at = now
                    self._pump(member.state.device_id)
                elif word == "back_off":
                    counting = lanes.counts(member, presence)
                    uniform = self._writer.entropy.uniform
                    flight.due_at = now + attempts.backoff_ms(definition, member.counted, counting, uniform)
        self.set_timer(member)


def _void(flight: Flight) -> None:
    """Closes the open attempt; it does not count towards max_attempts."""
    flight.voided += flight.open and flight.counts
    flight.open = False


def _hasten(flight: Flight, now: int) -> None:
    """The device is there: the next attempt is due, if no pause forbids it.

    A device that sends messages and does not subscribe must not get an attempt for each of them. So only the
    first message ends a pause after an attempt that met no subscriber.
    """
    if flight.open or (flight.unheard and flight.hastened):
        return
    if flight.unheard:
        flight.unheard, flight.hastened = 0, True
    flight.due_at = max(now, flight.not_before)
