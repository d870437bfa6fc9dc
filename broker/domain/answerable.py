"""Which commands of a lane an answer without id may belong to, and which ones a state may show to be done.

Pure. Both must be sure: a wrong guess would record what did not happen.
"""

from __future__ import annotations

from broker.domain.lanes import Lane, Member, late_until
from broker.domain.lifecycle import State


def candidates(lane: Lane, arrived_at: int) -> list[Member]:
    """The commands that an answer without id can belong to: handed over, and not final.

    A timed-out command is a candidate for `late_answer_sec`. `arrived_at`: when the answer reached the
    intake, ms; it may have waited there. A command handed over after that is no candidate. Nor is one
    of which the device has nothing yet, although the log already has its `published`.
    """
    found = [
        member
        for member in lane.members.values()
        if member.state.state in (State.PUBLISHED, State.ACKNOWLEDGED) and not _unwritten(member, arrived_at)
    ]
    return found + [
        member
        for member in lane.late.values()
        if arrived_at < late_until(member) and not _unwritten(member, arrived_at)
    ]


def observable(lane: Lane, arrived_at: int) -> list[Member]:
    """The commands that a state which arrived at this time (ms) may show to be done.

    Only a state after the bytes of the last attempt counts: an older one says nothing about the command.
    """
    return [
        member
        for member in (*lane.members.values(), *lane.late.values())
        if member.begun is not None
        and member.begun.sent_at is not None
        and arrived_at >= member.begun.sent_at
        and (not member.state.closed or arrived_at < late_until(member))
    ]


def is_answerable(member: Member, at: int) -> bool:
    """Not before the MQTT server has confirmed it, unless an earlier attempt may have reached the device."""
    flight = member.flight
    left = member.state.attempts - flight.refused - flight.missed - flight.unsent
    return left > 1 or not (flight.unconfirmed or at < flight.confirmed_at)


def _unwritten(member: Member, at: int) -> bool:
    state, flight = member.state, member.flight
    unwritten = flight.open and flight.written_at is None
    return at < (state.published_at or at) or state.attempts <= flight.refused + flight.missed + unwritten
