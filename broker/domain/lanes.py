"""Lanes: for each device, which commands are due now, and when the next timer fires.

Pure. A lane holds the open commands of one device, in order of creation. `CommandState` has the facts of the
log. `Flight` has what only this process knows; `attempts.recovered` makes it again after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from broker.domain.events import Transport
from broker.domain.lifecycle import CommandState, Input, State
from devices.types import Definition

# Pause after a command closes, for types without ids: a repeated answer must not close the next command.
IDLESS_PAUSE_MS = 1_000
TRIPS = 2  # a doubled message is answered twice: there and back again


class Presence(StrEnum):
    """What is known about a device's connection.

    `never`: never heard. `unknown`: heard once, but not yet in this MQTT session.
    """

    NEVER = "never"
    OFFLINE = "offline"
    UNKNOWN = "unknown"
    ONLINE = "online"


# `gc=False` here and in `CommandState`: they refer to nothing that refers to them, and with 100,000 open
# commands the garbage collector would look at 300,000 objects in vain.
class Flight(msgspec.Struct, gc=False):
    """What this process knows about the hand-over of one command. Times in ms of broker time.

    `open`: an attempt is open. `written_at`: when its bytes were given to the network; the attempt timer
    starts then. `lease_until`: end of the lease of a pull transport; `holder` is the actor that has it.
    `sent_at`: when the link took the bytes of the last attempt; None if it did not, or nobody was subscribed.
    `counts`: the last attempt was recorded as counting towards max_attempts. `due_at`: when the next
    attempt is due. `not_before`: a device that comes online does not make it due earlier than this.
    `heard_at`: time of the last progress report that was not recorded; `seq`: of the last signed one.
    `voided`: number of attempts recorded as counting that do not count after all. `refused`: number that the
    MQTT server refused. `dropped`: number of attempts that ended because the device went offline.

    For attempts that met no subscriber: `missed` is their number, `unheard` their number in a row,
    `unheard_at` the time of the last one. `hastened`: a live message has ended a pause between them.
    `unsent`: number of attempts whose bytes never left. `unconfirmed`: the MQTT server has not yet said that
    it has the bytes. `confirmed_at`: when it did. `trip_ms`: the longest time until that, or until an ack.
    """

    open: bool = False
    written_at: int | None = None
    sent_at: int | None = None
    lease_until: int | None = None
    holder: str | None = None
    counts: bool = True
    due_at: int = 0
    not_before: int = 0
    heard_at: int = 0
    voided: int = 0
    refused: int = 0
    dropped: int = 0
    missed: int = 0
    unheard: int = 0
    unheard_at: int | None = None
    hastened: bool = False
    unsent: int = 0
    unconfirmed: bool = False
    confirmed_at: int = 0
    trip_ms: int = 0
    seq: int = -1

    def keep(self, old: Flight, *, more: int) -> None:
        """Takes over what no event holds, when the log is read again: the last report that was not recorded,
        and what became of the bytes. `more`: how many attempts the log has that `old` does not know."""
        self.heard_at = old.heard_at
        if more > 0:
            return
        waited = more == 0 and old.open and old.written_at is None  # until its event was durable
        self.missed, self.refused, self.unsent = old.missed, old.refused, old.unsent + waited
        self.unconfirmed, self.confirmed_at = old.unconfirmed or waited, old.confirmed_at
        self.trip_ms = old.trip_ms

    def confirm(self, now: int, *, known: bool) -> None:
        """The receipt for the open attempt came. Not `known`: the link died, and none will come."""
        self.unconfirmed, self.confirmed_at = False, now
        if known and self.written_at is not None:
            self.trip_ms = max(self.trip_ms, now - self.written_at)


class Member(msgspec.Struct, gc=False):
    """A command that is open, or that timed out so recently that a late answer may still come.

    `begun`: its flight, once something has asked for it. A command that only waits has none, which saves a
    fifth of its memory.
    """

    state: CommandState
    definition: Definition
    begun: Flight | None = None

    @property
    def flight(self) -> Flight:
        if self.begun is None:
            self.begun = Flight()
        return self.begun

    @property
    def holds_slot(self) -> bool:
        return self.state.state in (State.PUBLISHED, State.ACKNOWLEDGED) and not self.state.reopened

    @property
    def counted(self) -> int:
        return self.state.counted - self.flight.voided


class Lane(msgspec.Struct):
    """The open commands of one device (`members`), in order of creation.

    `late`: timed-out commands that an answer without id may still mean. `shut_until`: no new command
    starts before this time (broker ms), because an answer without id could belong to an earlier one.
    """

    device_id: str
    members: dict[str, Member] = {}
    late: dict[str, Member] = {}
    shut_until: int = 0


def reachable(definition: Definition, presence: Presence) -> bool:
    """May a command be handed over by MQTT now? Always true for types without presence."""
    if definition.presence == "optional":
        return presence is not Presence.OFFLINE
    return definition.presence == "none" or presence in (Presence.UNKNOWN, Presence.ONLINE)


def counts(member: Member, presence: Presence) -> bool:
    """Does the next attempt count towards max_attempts? Not if the device may be offline, and not after an
    attempt that met no subscriber."""
    if member.definition.presence == "none":
        return True
    there = presence is Presence.ONLINE or (
        member.definition.presence == "optional" and presence is Presence.NEVER
    )
    return there and not (member.flight.unheard or member.flight.hastened)


def has_time(state: CommandState, now: int) -> bool:
    """Is there enough time before `expires_at` for a hand-over?

    None in the last second (or the last tenth of the TTL, if that is shorter): the expiry timer acts then.
    """
    if state.expires_at is None:
        return True
    margin = min(1_000, (state.ttl_ms or 10_000) // 10)
    return now < state.expires_at - margin


def collapsing(lane: Lane, key: str | None) -> list[Member]:
    """The pending commands that a new command with this collapse key replaces, newest first.

    Cancelled in this order, none of them moves to the front of the lane and is handed over meanwhile.
    """
    if key is None:
        return []
    return [
        member
        for member in reversed(lane.members.values())
        if member.state.collapse_key == key and member.state.state is State.PENDING
    ]


def due(
    lane: Lane,
    presence: Presence,
    now: int,
    slots: int,
    drained: bool = True,
    listens: Callable[[str], bool] = lambda topic: True,
) -> list[Member]:
    """The commands to hand over by MQTT now, in lane order; at most `slots`.

    `drained`: the answers queued at the MQTT server have been read. Before that, an answer without id may
    belong to an earlier command, so no command of a type without ids is sent. `listens(topic)`: does the
    device subscribe to this topic? It may subscribe to only some of its topics.

    The caller checks that the link is up. A pending command that may not be handed over blocks the
    commands behind it. One without time left does not block, because it will never be handed over.
    """
    found: list[Member] = []
    taken = 0
    for member in lane.members.values():
        state, definition = member.state, member.definition
        unsure = not (drained or definition.carries_ids)
        if len(found) >= slots:
            break
        if state.state is State.PENDING:
            if not has_time(state, now):
                continue
            if (
                taken >= definition.max_in_flight
                or now < lane.shut_until
                or unsure
                or "mqtt" not in definition.transports
                or not reachable(definition, presence)
                or not _hears(member, listens)
            ):
                break
            found.append(member)
            taken += 1
        elif member.holds_slot:
            taken += 1
            if not unsure and resendable(member, presence, now) and _hears(member, listens):
                found.append(member)
    return found


def _hears(member: Member, listens: Callable[[str], bool]) -> bool:
    return member.definition.presence == "none" or listens(member.state.topic)


def resendable(member: Member, presence: Presence, now: int) -> bool:
    """Is the next attempt of a published command due?"""
    state, definition, flight = member.state, member.definition, member.flight
    return (
        state.state is State.PUBLISHED
        and not flight.open
        and definition.repeatable
        and flight.due_at <= now
        and "mqtt" in definition.transports
        and reachable(definition, presence)
        and has_time(state, now)
    )


def fetched(lane: Lane, transport: Transport, now: int, drained: bool = True) -> list[Member]:
    """The commands that a heartbeat or relay fetches now, in lane order; at most `max_in_flight`.

    Includes the commands that the same transport holds under a running lease. `drained`: as in `due`.
    """
    found: list[Member] = []
    taken = 0
    for member in lane.members.values():
        definition = member.definition
        if member.state.state is State.PENDING:
            if not has_time(member.state, now):
                continue
            if (
                taken >= definition.max_in_flight
                or now < lane.shut_until
                or not (drained or definition.carries_ids or "mqtt" not in definition.transports)
                or transport not in definition.transports
            ):
                break
            found.append(member)
            taken += 1
        elif member.holds_slot:
            taken += 1
            if fetched_again(member, transport, now):
                found.append(member)
    return found


def fetched_again(member: Member, transport: Transport, now: int) -> bool:
    """Does this pull transport get a published command, as the same attempt or as the next one?"""
    state, definition = member.state, member.definition
    return (
        state.state is State.PUBLISHED
        and definition.repeatable
        and transport in definition.transports
        and has_time(state, now)
        and (state.transport == transport or not in_the_air(member, now))
    )


def in_the_air(member: Member, now: int) -> bool:
    """Is an attempt open at time `now`? False once its time is over, even if its timer has not fired yet."""
    ends = attempt_ends_at(member)
    return member.flight.open and (ends is None or now < ends)


def lease_ms(definition: Definition, transport: Transport) -> int:
    return ms(definition.relay_lease_sec if transport == "relay" else definition.heartbeat_lease_sec)


def wake_at(member: Member, now: int) -> int | None:
    """When the next timer of this command fires, in ms; None if it has no timer.

    A next attempt that is already due has no timer: it waits for the link, a slot or the device.
    """
    state = member.state
    match state.state:
        case State.PENDING:
            return state.expires_at
        case State.PUBLISHED:
            flight = member.flight
            due_at = flight.due_at if flight.due_at > now else None
            times = (state.expires_at, attempt_ends_at(member) if flight.open else due_at)
            return min((at for at in times if at is not None), default=None)
        case State.ACKNOWLEDGED:
            return result_due_at(member)
        case _:
            return None


def attempt_ends_at(member: Member) -> int | None:
    """When the open attempt ends (its lease or its answer time), in ms. None before its bytes are written."""
    if member.flight.lease_until is not None:
        return member.flight.lease_until
    if member.flight.written_at is None:
        return None
    return member.flight.written_at + ms(member.definition.ack_timeout_sec)


def result_due_at(member: Member) -> int:
    """When the result is due, ms. Each report restarts `result_timeout_sec`, up to `max_run_sec` in all."""
    state, definition = member.state, member.definition
    last = max(state.reported_at or state.updated_at, member.flight.heard_at)
    first = state.acknowledged_at or state.updated_at
    return min(last + ms(definition.result_timeout_sec), max(last, first + ms(definition.max_run_sec)))


def overdue(member: Member, now: int) -> Input | None:
    """The timer of this command that is over; None if none is."""
    state = member.state
    unanswered = state.state in (State.PENDING, State.PUBLISHED)
    if unanswered and state.expires_at is not None and now >= state.expires_at:
        return Input.EXPIRY
    if state.state is State.PUBLISHED and member.flight.open:
        timer = attempt_ends_at(member)
        if timer is not None and now >= timer:
            return Input.ATTEMPT_TIMER
    if state.state is State.ACKNOWLEDGED and now >= result_due_at(member):
        return Input.RESULT_TIMER
    return None


def closed(lane: Lane, member: Member, now: int) -> None:
    """Takes a closed command out of its lane. Shuts the lane for a time if answers carry no id."""
    lane.members.pop(member.state.id, None)
    if member.state.state is State.TIMED_OUT:
        lane.late[member.state.id] = member
    else:
        lane.late.pop(member.state.id, None)
    if not member.definition.carries_ids and member.state.published_at is not None:
        # After more than one attempt the device may answer twice, the second time within `late_answer_sec`.
        late = member.state.state is State.TIMED_OUT or member.state.attempts > 1
        pause = ms(member.definition.late_answer_sec)
        if not late:
            pause = min(pause, max(IDLESS_PAUSE_MS, TRIPS * _trip_ms(member)))
        lane.shut_until = max(lane.shut_until, now + pause)


def _trip_ms(member: Member) -> int:
    """What the way to the device is known to take: a copy of the answer may be as long under way."""
    written_at = member.flight.written_at or 0
    return max(member.flight.trip_ms, (member.state.acknowledged_at or 0) - written_at if written_at else 0)


def reopened(lane: Lane, member: Member) -> None:
    """Puts a command that a late answer reopened back into its lane. It takes no window slot."""
    lane.late.pop(member.state.id, None)
    lane.members[member.state.id] = member


def late_until(member: Member) -> int:
    """Until when (ms) an answer without id can belong to this timed-out command."""
    return (member.state.closed_at or member.state.updated_at) + ms(member.definition.late_answer_sec)


def ms(seconds: float) -> int:
    return round(seconds * 1_000)
