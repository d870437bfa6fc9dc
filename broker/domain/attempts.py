"""When the next attempt of a handed-over command may follow, and which attempt is the last one.

Pure. The bound on attempts that do not count comes from the log, so that a restart does not lift it.
"""

from __future__ import annotations

from collections.abc import Callable

from broker.domain import lanes
from broker.domain.lanes import Flight, Member
from broker.domain.lifecycle import CommandState, State
from devices.types import Definition

# Attempts end uncounted if the device goes offline or the broker restarts. A device that crashes on the
# command does that for ever, so at most this many times `max_attempts` are recorded as counting.
MOST_TIMES = 2
FIRST_PAUSE_SEC = 1.0


def is_last(member: Member) -> bool:
    """Has the command used up `max_attempts`?"""
    return member.counted >= member.definition.max_attempts


def is_exhausted(member: Member) -> bool:
    """Is the open attempt the last one that the log allows, whether or not all attempts counted?"""
    return member.flight.open and member.flight.counts and _is_used_up(member.state, member.definition)


def _is_used_up(state: CommandState, definition: Definition) -> bool:
    return state.counted >= MOST_TIMES * definition.max_attempts


def drop_pause_ms(definition: Definition, tried: int) -> int:
    """Pause after an attempt that ended because the device went offline, ms: 1 s, doubled per attempt."""
    return _doubled_ms(definition, tried - 1)


def unheard_pause_ms(definition: Definition, unheard: int) -> int:
    """Pause after an attempt that met no subscriber, ms: 1 s, doubled per such attempt in a row."""
    return _doubled_ms(definition, unheard - 1)


def _doubled_ms(definition: Definition, times: int) -> int:
    return lanes.ms(min(definition.backoff_cap_sec, FIRST_PAUSE_SEC * 2 ** min(max(times, 0), 64)))


def backoff_ms(
    definition: Definition, counted: int, counting: bool, uniform: Callable[[float, float], float]
) -> int:
    """Pause before the next attempt, ms: exponential back-off with full jitter, at least 1 s.

    After `counted` attempts the upper limit is base x factor^(counted-1), at most the cap. Attempts that do
    not count (`counting` False) use the cap. Source: "Exponential Backoff And Jitter", M. Brooker, 2015.
    """
    ceiling = definition.backoff_cap_sec
    if counting:
        # The exponent is limited, so that many attempts cannot overflow a float.
        grown = definition.backoff_base_sec * definition.backoff_factor ** min(max(counted - 1, 0), 64)
        ceiling = min(ceiling, grown)
    return max(1_000, round(uniform(0, ceiling) * 1_000))


def recovered(
    state: CommandState, definition: Definition, now: int, uniform: Callable[[float, float], float]
) -> Flight:
    """The flight of a command that is read from the log at a start.

    It is unknown whether the bytes of the interrupted attempt were sent. Repeatable: due again at a random
    time within `ack_timeout_sec`; if that attempt was the last, one more is allowed. Not repeatable, or
    exhausted, or held under a lease: the attempt counts as open, and its time starts now.
    """
    if state.state is not State.PUBLISHED:
        return Flight()
    if state.transport is not None and state.transport != "mqtt":
        lease_until = (state.handed_over_at or now) + lanes.lease_ms(definition, state.transport)
        return Flight(open=True, written_at=now, lease_until=lease_until, counts=False)
    if not definition.repeatable or (state.counting and _is_used_up(state, definition)):
        return Flight(open=True, written_at=now, counts=state.counting)
    not_before = (state.handed_over_at or now) + drop_pause_ms(definition, state.counted)
    return Flight(
        counts=state.counting,
        due_at=max(now + round(uniform(0, lanes.ms(definition.ack_timeout_sec))), not_before),
        not_before=not_before,
        voided=max(0, state.counted - (definition.max_attempts - 1)),
    )


def interrupted(member: Member, since: int, uniform: Callable[[float, float], float]) -> bool:
    """A new MQTT session: makes an open attempt due again, at a random time within `ack_timeout_sec`.

    `since`: time (ms) at which the answers of the old session have been read. Returns False if nothing
    changed.
    """
    definition = member.definition
    if member.state.state is not State.PUBLISHED or not definition.repeatable:
        return False
    flight = member.flight
    if flight.lease_until is not None:
        return False
    if flight.open and (is_last(member) or is_exhausted(member)):
        return False  # the last attempt is not repeated: its timer ends it
    soon = since + round(uniform(0, lanes.ms(definition.ack_timeout_sec)))
    flight.due_at = soon if flight.open else min(flight.due_at, soon)
    flight.open = False
    return True
