"""Why a command is where it is, and what happens next: one plain answer, for every surface.

Pure: everything it needs is given in `Situation`. It must never guess; what is not known is said so.
"""

from __future__ import annotations

from typing import Any

import msgspec

from broker import lanes
from broker.lanes import Lane, Member, Presence
from broker.lifecycle import CommandState, State
from devices.clock import rfc3339


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What is so around a command at `now` (ms). `member`: None for closed ones that memory has let go."""

    state: CommandState
    now: int
    member: Member | None
    lane: Lane | None
    presence: Presence
    offline_since: int | None
    link_up: bool
    halted: str | None
    slots_free: bool


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`summary` is a sentence, `reasons` are for programs, `next` is what will happen, and when if known."""

    command_id: str
    state: str
    summary: str
    reasons: list[dict[str, Any]]
    next: dict[str, Any] | None


def explain(situation: Situation) -> Explanation:
    """The answer for any command in any state."""
    state = situation.state
    if state.closed:
        sentence, reasons, following = _closed(state)
    elif state.state is State.PENDING:
        sentence, reasons, following = _pending(situation)
    elif state.state is State.PUBLISHED:
        sentence, reasons, following = _published(situation)
    else:
        sentence, reasons, following = _acknowledged(situation)
    return Explanation(
        command_id=state.id, state=state.state.value, summary=sentence, reasons=reasons, next=following
    )


Parts = tuple[str, list[dict[str, Any]], dict[str, Any] | None]


def _closed(state: CommandState) -> Parts:
    at = rfc3339(state.closed_at or state.updated_at)
    reason: dict[str, Any] = {"code": state.state.value, "at": at}
    match state.state:
        case State.EXECUTED:
            late = ", after it had been given up" if state.late else ""
            sentence = f"The device did it at {at}{late}."
        case State.FAILED:
            error = state.error
            assert error is not None, "failed carries its error"
            who = {"device": "The device", "mqtt_server": "The MQTT server"}.get(state.by or "", "Ordain")
            reason |= {"by": state.by, "error": error.code}
            sentence = f"{who} refused or failed at {at}: {error.message or error.code}."
        case State.EXPIRED:
            sentence = f"Its time ran out at {at}; it was never handed over."
        case State.CANCELLED:
            reason |= {"by": state.by, "reason": state.reason}
            why = f" ({state.reason})" if state.reason else ""
            sentence = f"It was cancelled at {at} by {state.by}{why}; it was never handed over."
        case _:
            reason |= {"reason": state.reason, "attempts": state.attempts}
            cause = TIMED_OUT.get(state.reason or "", state.reason)
            sentence = (
                f"Given up at {at} ({cause}) after it was handed over {_times(state)}; "
                "whether the device did it is not known, and a late answer still counts."
            )
            return sentence, [reason], {"action": "late_answer"}
    return sentence, [reason], None


TIMED_OUT = {
    "no_answer": "no answer of the device",
    "no_result": "acknowledged, but no result in time",
    "ttl": "its time ran out after it was handed over",
    "unsendable": "its device type can no longer express it",
    "device_deleted": "the device was deleted",
    "operator": "an operator gave up waiting",
}


def _pending(situation: Situation) -> Parts:
    state, now = situation.state, situation.now
    reasons: list[dict[str, Any]] = []
    sentences: list[str] = []

    def because(sentence: str, code: str, **facts: Any) -> None:
        sentences.append(sentence)
        reasons.append({"code": code} | facts)

    if situation.halted:
        because(f"nothing is handed over now: {situation.halted}", "halted", why=situation.halted)
    _ahead(situation, because)
    member, lane = situation.member, situation.lane
    if member is not None and not lanes.reachable(member.definition, situation.presence):
        if situation.presence is Presence.NEVER:
            because("the device was not heard since it was registered or since the start", "never_heard")
        else:
            since = situation.offline_since
            at = "" if since is None else f" since {rfc3339(since)}"
            because(f"the device is offline{at}", "offline", since=None if since is None else rfc3339(since))
    if member is not None and "mqtt" not in member.definition.transports:
        because("its type is fetched by the device or a relay", "pull_only")
    if lane is not None and lane.shut_until > now:
        because(
            "an answer without id may still belong to the command before it",
            "lane_shut",
            until=rfc3339(lane.shut_until),
        )
    if not situation.link_up:
        because("the MQTT server is not reachable", "link_down")
    elif not situation.slots_free:
        because("all send slots are taken", "no_slot")
    if not lanes.has_time(state, now):
        because("too little of its life is left for a hand-over", "no_time")
    text = "; ".join(sentences) or "it is being handed over now"
    until = "" if state.expires_at is None else f" It expires at {rfc3339(state.expires_at)}."
    following: dict[str, Any] = {"action": "hand_over"}
    if not lanes.has_time(state, now) and state.expires_at is not None:
        following = {"action": "expire", "at": rfc3339(state.expires_at)}
    elif lane is not None and lane.shut_until > now and len(reasons) == 1:
        following["at"] = rfc3339(lane.shut_until)
    return f"Not handed over yet: {text}.{until}", reasons, following


def _ahead(situation: Situation, because: Any) -> None:
    """Which commands stand before it in the lane, and whether they fill the window."""
    if situation.lane is None or situation.member is None:
        return
    before: list[Member] = []
    for member in situation.lane.members.values():
        if member.state.id == situation.state.id:
            break
        before.append(member)
    flying = [member for member in situation.lane.members.values() if member.holds_slot]
    if len(flying) >= situation.member.definition.max_in_flight:
        first = flying[0].state
        because(
            f"{first.id} ({first.type}, {first.state.value}) is with the device, {len(flying)} at a time",
            "window_full",
            command_ids=[member.state.id for member in flying],
        )
    waiting = [member for member in before if not member.holds_slot and not member.state.reopened]
    if waiting:
        because(
            f"{len(waiting)} older commands wait before it, first {waiting[0].state.id}",
            "behind",
            command_id=waiting[0].state.id,
            count=len(waiting),
        )


def _published(situation: Situation) -> Parts:
    state, member = situation.state, situation.member
    assert member is not None, "a published command is in memory"
    most = member.definition.max_attempts if member.definition.repeatable else 1
    reasons: list[dict[str, Any]] = [
        {"code": "no_answer", "attempt": state.attempts, "counted": member.counted, "max_attempts": most}
    ]
    said = f"Handed over ({_times(state)}, attempt {member.counted} of {most} that count), no answer yet"
    expires = None if state.expires_at is None else rfc3339(state.expires_at)
    if member.flight.open:
        at = lanes.attempt_ends_at(member)
        last = not member.definition.repeatable or lanes.is_last_attempt(member)
        following: dict[str, Any] = {"action": "give_up" if last else "back_off"}
        if at is not None:
            following["at"] = rfc3339(at if state.expires_at is None else min(at, state.expires_at))
        text = f"{said}; {'the last attempt ends' if last else 'the answer time of this attempt ends'}"
        return f"{text} {following.get('at', 'when its bytes are written')}.", reasons, following
    if not lanes.reachable(member.definition, situation.presence):
        since = situation.offline_since
        reasons.append({"code": "offline", "since": None if since is None else rfc3339(since)})
        following = {"action": "hand_over"} if expires is None else {"action": "give_up", "at": expires}
        return f"{said}; the device is offline, the next attempt follows when it is back.", reasons, following
    if not situation.link_up:
        reasons.append({"code": "link_down"})
    at_text = rfc3339(max(member.flight.due_at, situation.now))
    return f"{said}; the next attempt is due at {at_text}.", reasons, {"action": "hand_over", "at": at_text}


def _acknowledged(situation: Situation) -> Parts:
    state, member = situation.state, situation.member
    assert member is not None, "an acknowledged command is in memory"
    at = rfc3339(lanes.result_due_at(member))
    reason: dict[str, Any] = {"code": "running", "since": rfc3339(state.acknowledged_at or state.updated_at)}
    progress = "" if state.percent is None else f", {state.percent:g} percent done"
    reason |= {} if state.percent is None else {"percent": state.percent, "note": state.note}
    sentence = (
        f"The device has it since {reason['since']}{progress}; it is given up without a report by {at}."
    )
    return sentence, [reason], {"action": "give_up", "at": at}


def _times(state: CommandState) -> str:
    return "once" if state.attempts == 1 else f"{state.attempts} times"
