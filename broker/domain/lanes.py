"""Lanes: for each device, which command is due now, and when the next thing has to happen.

Pure. A lane holds the commands of one device that are not closed, in order of creation. What is in
the log is in `CommandState`; what only this process knows about a hand-over is in `Flight` and may
be lost at any instant: after a restart it is made anew by `recovered`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from broker.domain.events import Transport
from broker.domain.lifecycle import CommandState, Input, State
from devices.types import Definition

IDLESS_PAUSE_MS = 1_000  # after any end, so that a doubled answer cannot complete the next command


class Presence(StrEnum):
    """What we know of a device being reachable. `unknown`: heard once, not yet in this MQTT session."""

    NEVER = "never"
    OFFLINE = "offline"
    UNKNOWN = "unknown"
    ONLINE = "online"


@dataclass(slots=True)
class Flight:
    """One command's hand-over as this process knows it. Times in ms of the broker's clock.

    `counts`: the open attempt was recorded as one that counts. `heard_at`: the last report that was not
    recorded, because there were enough. `voided`: attempts that turned out not to count. `refused`:
    attempts the MQTT server refused. `lease_until`: a pull transport's attempt, held by `holder` till then.
    `written_at`: when the bytes were given to the network, which is when the attempt timer starts.
    """

    open: bool = False
    written_at: int | None = None
    lease_until: int | None = None
    holder: str | None = None
    counts: bool = True
    due_at: int = 0
    heard_at: int = 0
    voided: int = 0
    refused: int = 0


@dataclass(slots=True)
class Member:
    """One command that is not closed, or was closed as `timed_out` so recently that it may be answered."""

    state: CommandState
    definition: Definition
    flight: Flight = field(default_factory=Flight)

    @property
    def holds_slot(self) -> bool:
        return self.state.state in (State.PUBLISHED, State.ACKNOWLEDGED) and not self.state.reopened

    @property
    def counted(self) -> int:
        return self.state.counted - self.flight.voided


@dataclass(slots=True)
class Lane:
    """The open commands of one device, in order of creation; `late` may still be answered without id."""

    device_id: str
    members: dict[str, Member] = field(default_factory=dict)
    late: dict[str, Member] = field(default_factory=dict)
    shut_until: int = 0


def reachable(definition: Definition, presence: Presence) -> bool:
    """May it be handed over by MQTT now? Types that cannot tell are always sent to."""
    return definition.presence == "none" or presence in (Presence.UNKNOWN, Presence.ONLINE)


def counts(definition: Definition, presence: Presence) -> bool:
    """Attempts at a device that may not be there do not use up its attempts."""
    return definition.presence == "none" or presence is Presence.ONLINE


def has_time(state: CommandState, now: int) -> bool:
    """Is enough of its life left for a hand-over? Its last second (or tenth) belongs to the timer."""
    if state.expires_at is None:
        return True
    margin = min(1_000, (state.ttl_ms or 10_000) // 10)
    return now < state.expires_at - margin


def collapsing(lane: Lane, key: str | None) -> list[Member]:
    """What a successor with this collapse key takes the place of: only what was never handed over.

    From the end of the lane, so that none of it moves up and is handed over while it is being cancelled.
    """
    if key is None:
        return []
    return [
        member
        for member in reversed(lane.members.values())
        if member.state.collapse_key == key and member.state.state is State.PENDING
    ]


def due(lane: Lane, presence: Presence, now: int, slots: int, drained: bool = True) -> list[Member]:
    """The commands to hand over by MQTT now, first things first; at most `slots` of them.

    `drained`: what the MQTT server kept for us has been taken in; before that an answer without id may
    be an old one, and no command that it could be taken for may start.

    The link being up is the caller's to check. A pending command that may not go holds back those
    behind it; one without time left does not, because it will never go.
    """
    found: list[Member] = []
    taken = 0
    for member in lane.members.values():
        state, definition = member.state, member.definition
        if len(found) >= slots:
            break
        if state.state is State.PENDING:
            if not has_time(state, now):
                continue
            if (
                taken >= definition.max_in_flight
                or now < lane.shut_until
                or not (drained or definition.carries_ids)
                or "mqtt" not in definition.transports
                or not reachable(definition, presence)
            ):
                break
            found.append(member)
            taken += 1
        elif member.holds_slot:
            taken += 1
            if resendable(member, presence, now):
                found.append(member)
    return found


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
    """The commands that a heartbeat or a relay gets now, first things first; no more than the window.

    Among them what the same transport has under a lease already. `drained`: as for `due`.
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
    """Does a pull transport get a published command: the same attempt, or the next one?"""
    state, definition = member.state, member.definition
    return (
        state.state is State.PUBLISHED
        and definition.repeatable
        and transport in definition.transports
        and has_time(state, now)
        and (state.transport == transport or not in_the_air(member, now))
    )


def in_the_air(member: Member, now: int) -> bool:
    """Is an attempt open whose time is not over, whether or not its timer has fired?"""
    ends = attempt_ends_at(member)
    return member.flight.open and (ends is None or now < ends)


def lease_ms(definition: Definition, transport: Transport) -> int:
    return ms(definition.relay_lease_sec if transport == "relay" else definition.heartbeat_lease_sec)


def wake_at(member: Member, now: int) -> int | None:
    """When time alone will next do something to this command. None: no time does.

    A next attempt that is due already waits for something else (the link, a slot, the device).
    """
    state, flight = member.state, member.flight
    times: list[int] = []
    if state.state in (State.PENDING, State.PUBLISHED) and state.expires_at is not None:
        times.append(state.expires_at)
    if state.state is State.PUBLISHED:
        if flight.open and (timer := attempt_ends_at(member)) is not None:
            times.append(timer)
        elif not flight.open and flight.due_at > now:
            times.append(flight.due_at)
    if state.state is State.ACKNOWLEDGED:
        times.append(result_due_at(member))
    return min(times, default=None)


def attempt_ends_at(member: Member) -> int | None:
    """End of the answer time of the open attempt; None while its bytes are not written."""
    if member.flight.lease_until is not None:
        return member.flight.lease_until
    if member.flight.written_at is None:
        return None
    return member.flight.written_at + ms(member.definition.ack_timeout_sec)


def result_due_at(member: Member) -> int:
    """Each report grants a new result time, up to the longest run the type allows."""
    state, definition = member.state, member.definition
    last = max(state.reported_at or state.updated_at, member.flight.heard_at)
    first = state.acknowledged_at or state.updated_at
    return min(last + ms(definition.result_timeout_sec), max(last, first + ms(definition.max_run_sec)))


def overdue(member: Member, now: int) -> Input | None:
    """The timer that has run out for this command, if one has."""
    state, flight = member.state, member.flight
    unanswered = state.state in (State.PENDING, State.PUBLISHED)
    if unanswered and state.expires_at is not None and now >= state.expires_at:
        return Input.EXPIRY
    if state.state is State.PUBLISHED and flight.open:
        timer = attempt_ends_at(member)
        if timer is not None and now >= timer:
            return Input.ATTEMPT_TIMER
    if state.state is State.ACKNOWLEDGED and now >= result_due_at(member):
        return Input.RESULT_TIMER
    return None


def is_last_attempt(member: Member) -> bool:
    return member.counted >= member.definition.max_attempts


def backoff_ms(
    definition: Definition, counted: int, counting: bool, uniform: Callable[[float, float], float]
) -> int:
    """Pause before the next attempt: exponential with full jitter, at least a second.

    After `counted` attempts the ceiling is base x factor^(counted-1), at most the cap; while attempts
    do not count it stays at the cap. Source: "Exponential Backoff And Jitter", M. Brooker, 2015.
    """
    ceiling = definition.backoff_cap_sec
    if counting:
        # The exponent is bounded so that no number of attempts overflows a float.
        grown = definition.backoff_base_sec * definition.backoff_factor ** min(max(counted - 1, 0), 64)
        ceiling = min(ceiling, grown)
    return max(1_000, round(uniform(0, ceiling) * 1_000))


def closed(lane: Lane, member: Member, now: int) -> None:
    """Takes a closed command out of its lane, and shuts the lane where answers carry no id."""
    lane.members.pop(member.state.id, None)
    if member.state.state is State.TIMED_OUT:
        lane.late[member.state.id] = member
    else:
        lane.late.pop(member.state.id, None)
    if not member.definition.carries_ids and member.state.published_at is not None:
        # A device that got it twice answers twice, the second time as late as that may come.
        late = member.state.state is State.TIMED_OUT or member.state.attempts > 1
        pause = ms(member.definition.late_answer_sec) if late else IDLESS_PAUSE_MS
        lane.shut_until = max(lane.shut_until, now + pause)


def reopened(lane: Lane, member: Member) -> None:
    """A late answer brought it back: it is open again and takes no slot."""
    lane.late.pop(member.state.id, None)
    lane.members[member.state.id] = member


def candidates(lane: Lane, arrived_at: int) -> list[Member]:
    """The commands an answer without id could mean: handed over, not final, not timed out for long.

    `arrived_at`: when it came, ms; it may have waited since. One that was handed over later cannot be
    meant, nor one whose first bytes are not written yet, whatever the log says already.
    """
    found = [
        member
        for member in lane.members.values()
        if member.state.state in (State.PUBLISHED, State.ACKNOWLEDGED) and not _unwritten(member, arrived_at)
    ]
    return found + [member for member in lane.late.values() if arrived_at < late_until(member)]


def _unwritten(member: Member, at: int) -> bool:
    state, flight = member.state, member.flight
    return at < (state.published_at or at) or (
        state.attempts == 1 and flight.open and flight.written_at is None
    )


def late_until(member: Member) -> int:
    """Until when an answer without id may still mean this timed out command."""
    closed_at = member.state.closed_at or member.state.updated_at
    return closed_at + ms(member.definition.late_answer_sec)


def recovered(
    state: CommandState, definition: Definition, now: int, uniform: Callable[[float, float], float]
) -> Flight:
    """The flight of a command found in the log at start: the interrupted attempt may or may not have left.

    Repeatable: due again, spread over the answer time; if that attempt was the last, one more.
    Not repeatable, or held by a pull transport's lease: the attempt counts as open from now.
    """
    if state.state is not State.PUBLISHED:
        return Flight()
    if state.transport is not None and state.transport != "mqtt":
        lease_until = (state.handed_over_at or now) + lease_ms(definition, state.transport)
        return Flight(open=True, written_at=now, lease_until=lease_until, counts=False)
    if not definition.repeatable:
        return Flight(open=True, written_at=now)
    voided = max(0, state.counted - (definition.max_attempts - 1))
    return Flight(due_at=now + round(uniform(0, ms(definition.ack_timeout_sec))), voided=voided)


def interrupted(member: Member, since: int, uniform: Callable[[float, float], float]) -> bool:
    """A new MQTT session: what was in the air is due again as after a restart, spread over the answer time.

    `since`: from when (ms) the old session's answers have come in. False if nothing changed.
    """
    definition, flight = member.definition, member.flight
    if (
        member.state.state is not State.PUBLISHED
        or not definition.repeatable
        or flight.lease_until is not None
    ):
        return False
    if flight.open and is_last_attempt(member):
        return False  # it counts, and its timer ends it
    soon = since + round(uniform(0, ms(definition.ack_timeout_sec)))
    flight.due_at = soon if flight.open else min(flight.due_at, soon)
    flight.open = False
    return True


def ms(seconds: float) -> int:
    return round(seconds * 1_000)
