"""Why a command is where it is, and what happens next: one plain answer, for every surface.

Pure: everything it needs is given in `Situation`. It must never guess; what is not known is said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from broker.domain import lanes
from broker.domain.lanes import Lane, Member, Presence
from broker.domain.lifecycle import CommandState, State
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
    """Why a command is where it is, and what happens next."""

    command_id: str
    state: str
    summary: Annotated[str, Meta(description="A sentence or two, for people.")]
    reasons: Annotated[
        list[dict[str, Any]], Meta(description="For programs: each a `code` and what belongs to it.")
    ]
    next: Annotated[
        dict[str, Any] | None,
        Meta(
            description="What comes next by itself: `action` is `hand_over`, `back_off`, `hold`, `give_up` "
            "or `expire`, with `at` where only time stands in between. Null: nothing."
        ),
    ]


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of its device that named it and fitted nothing; `reason` as it was kept for the operator."""

    at: int
    reason: str


Facts = dict[str, Any]
Parts = tuple[str, list[Facts], Facts | None]

TIMED_OUT = {
    "no_answer": "no answer of the device",
    "no_result": "the device had it, and no result came in time",
    "ttl": "its time ran out after it was handed over",
    "unsendable": "its device type can no longer express it",
    "device_deleted": "its device was deleted",
    "operator": "an operator stopped waiting",
}
SAID = {
    "contradiction": "the device has also reported another end of it",
    "promise_broken": "the device has reported on it all the same, though it was never handed over",
    "never_handed_over": "an answer to it came before it was handed over",
}


def explain(situation: Situation) -> Explanation:
    """The answer for any command in any state."""
    state, member = situation.state, situation.member
    parts: Parts
    if state.closed:
        parts = _closed(state)
    elif member is None:
        # Open commands are always in memory, so this one was closed since its state was read.
        parts = "It has just been closed; ask again.", [{"code": "just_closed"}], None
    elif state.state is State.PENDING:
        parts = _pending(situation, member)
    else:
        published = state.state is State.PUBLISHED
        parts = _stopped(situation, _published(situation, member) if published else _acknowledged(member))
    summary, reasons, following = parts
    return Explanation(
        command_id=state.id, state=state.state.value, summary=summary, reasons=reasons, next=following
    )


def with_answers(explanation: Explanation, said: Sequence[Said]) -> Explanation:
    """Adds what the device said of the command against what is recorded."""
    summary, reasons = explanation.summary, list(explanation.reasons)
    for reason, words in SAID.items():
        times = [rfc3339(answer.at) for answer in said if answer.reason == reason]
        if times:
            summary = f"{summary} But {words} (last at {max(times)})."
            reasons.append({"code": reason, "count": len(times), "at": max(times)})
    return msgspec.structs.replace(explanation, summary=summary, reasons=reasons)


# --- closed ----------------------------------------------------------------------------------------


def _closed(state: CommandState) -> Parts:
    at = rfc3339(state.closed_at or state.updated_at)
    late = ", after it had been given up" if state.late else ""
    reason: Facts = {"code": state.state.value, "at": at} | ({"late": True} if state.late else {})
    match state.state:
        case State.EXECUTED:
            sentence = f"The device did it, and said so at {at}{late}."
            if state.delivered_at is None:
                reason["one_way"] = True
                sentence = f"The MQTT server took it at {at}; devices of this type say no more than that."
        case State.FAILED:
            error = state.error
            assert error is not None, "failed carries its error"
            who = {"device": "The device said so", "mqtt_server": "The MQTT server refused it"}
            reason |= {"by": state.by, "error": error.code}
            text = (error.message or error.code).rstrip(". ")
            sentence = f"It failed: {text}. {who.get(state.by or '', 'Ordain found it')} at {at}{late}."
            if state.published_at is None:
                sentence += " It was never handed over."
        case State.EXPIRED:
            sentence = f"Its time ran out at {at}; it was never handed over."
        case State.CANCELLED:
            reason |= {"by": state.by, "reason": state.reason}
            if state.superseded_by is not None:
                reason["superseded_by"] = state.superseded_by
            sentence = f"It was cancelled at {at} by {state.by}{_cause(state)}; it was never handed over."
        case _:
            reason |= {"reason": state.reason, "attempts": state.attempts, "by": state.by}
            cause = TIMED_OUT.get(state.reason or "", state.reason)
            correctable = state.reason != "device_deleted"
            sentence = (
                f"Given up at {at} ({cause}) after it was handed over {_times(state)}; whether the device "
                f"did it is not known{', and a late answer still corrects this' if correctable else ''}."
            )
    return sentence, [reason], None


def _cause(state: CommandState) -> str:
    if state.superseded_by is not None:
        return f" (replaced by {state.superseded_by})"
    if state.reason == "device_deleted":
        return " (its device was deleted)"
    return "" if state.reason is None else f" ({state.reason})"


# --- waiting to be handed over -----------------------------------------------------------------------


def _pending(situation: Situation, member: Member) -> Parts:
    state, lane, now = situation.state, situation.lane, situation.now
    why: list[tuple[str, Facts]] = []
    if situation.halted:
        why.append((f"nothing is handed over now ({situation.halted})", _halted(situation)))
    if lane is not None:
        why += _ahead(lane, member, now)
    if "mqtt" not in member.definition.transports:
        text = "it is not sent by MQTT but waits to be fetched, by its device or a relay"
        why.append((text, {"code": "pull_only"}))
    else:
        if not lanes.reachable(member.definition, situation.presence):
            why.append(_away(situation))
        if not situation.link_up:
            why.append(("the MQTT server cannot be reached", {"code": "link_down"}))
        elif not situation.slots_free:
            text = "as many messages as are allowed at once are on their way to the MQTT server"
            why.append((text, {"code": "no_slot"}))
        if why and len(member.definition.transports) > 1:
            why.append(("its device or a relay may fetch it meanwhile", {"code": "fetchable"}))
    if lane is not None and lane.shut_until > now:
        until = rfc3339(lane.shut_until)
        text = f"until {until} an answer without id could still mean the command before it"
        why.append((text, {"code": "lane_shut", "until": until}))
    if not lanes.has_time(state, now):
        why.append(("too little of its life is left to hand it over", {"code": "no_time"}))
    text = "; ".join(text for text, _ in why) or "it is being handed over now"
    until = "" if state.expires_at is None else f" It expires at {rfc3339(state.expires_at)}."
    reasons = [facts for _, facts in why]
    return f"Not handed over yet: {text}.{until}", reasons, _next_of_pending(situation, reasons)


def _ahead(lane: Lane, member: Member, now: int) -> list[tuple[str, Facts]]:
    """Which commands stand before it in the lane, and whether they fill the window."""
    flying: list[Member] = []
    found: list[tuple[str, Facts]] = []
    for place, other in enumerate(lane.members.values()):
        if other is member:
            break
        if other.holds_slot:
            flying.append(other)
        elif other.state.state is State.PENDING and lanes.has_time(other.state, now):
            # Not walked to the end: lanes are long, and a whole one may be asked for.
            count = list(lane.members).index(member.state.id) - place
            found.append(_behind(other.state, count))
            break
    window = member.definition.max_in_flight
    if len(flying) >= window:
        first = flying[0].state
        text = f"{first.id} ({first.type}) is with the device, which takes one command at a time"
        if window > 1:
            text = f"{len(flying)} commands are with the device, which takes {window} at a time"
        ids = [other.state.id for other in flying]
        found.insert(0, (text, {"code": "window_full", "command_ids": ids, "window": window}))
    return found


def _behind(first: CommandState, count: int) -> tuple[str, Facts]:
    text = f"{first.id} ({first.type}), which is older, goes first"
    if count > 1:
        text = f"{count} older commands stand before it, beginning with {first.id} ({first.type})"
    return text, {"code": "behind", "command_id": first.id, "count": count}


def _away(situation: Situation) -> tuple[str, Facts]:
    """Why the device cannot be reached. One that was heard of before is offline, whatever memory knows."""
    if situation.presence is Presence.NEVER and situation.offline_since is None:
        text = "the device has not been heard since it was registered, or since the broker was started"
        return text, {"code": "never_heard"}
    since = None if situation.offline_since is None else rfc3339(situation.offline_since)
    text = "the device is offline" if since is None else f"the device has been offline since {since}"
    return text, {"code": "offline", "since": since}


def _next_of_pending(situation: Situation, reasons: list[Facts]) -> Facts:
    """What time alone will do: nothing here counts on a device, a server or a person to do their part."""
    state, codes = situation.state, {facts["code"] for facts in reasons}
    if "halted" in codes:
        return {"action": "hand_over"}  # nor does anything expire meanwhile
    opens = situation.now
    if "lane_shut" in codes and situation.lane is not None:
        opens = situation.lane.shut_until
    others = codes & {"never_heard", "offline", "pull_only", "link_down"}
    if state.expires_at is not None and (others or not lanes.has_time(state, opens)):
        return {"action": "expire", "at": rfc3339(state.expires_at)}
    return {"action": "hand_over"} | ({"at": rfc3339(opens)} if codes <= {"lane_shut"} else {})


# --- with the device ---------------------------------------------------------------------------------


def _published(situation: Situation, member: Member) -> Parts:
    state, definition, flight = situation.state, member.definition, member.flight
    most = definition.max_attempts if definition.repeatable else 1
    counting = f"attempt {member.counted} of {most}"
    if member.counted != state.attempts:
        counting = f"{member.counted} of these count, of at most {most}"
    reason: Facts = {"code": "no_answer", "attempts": state.attempts, "counted": member.counted}
    who = "device" if definition.completes_on == "executed" else "MQTT server"
    last = rfc3339(state.handed_over_at or state.updated_at)
    said = f"Handed over {_times(state)} ({counting}), last at {last}; no answer of the {who} yet"
    text, reasons, following = (_in_the_air if flight.open else _between)(situation, member)
    return f"{said}; {text}.", [reason | {"max_attempts": most, "last_at": last}, *reasons], following


def _in_the_air(situation: Situation, member: Member) -> Parts:
    """An attempt is open: what the end of its answer time will bring."""
    state, definition = situation.state, member.definition
    ends, expires = lanes.attempt_ends_at(member), state.expires_at
    if member.flight.lease_until is not None:
        return _leased(situation, member, member.flight.lease_until)
    if ends is None:
        return "its bytes are being written", [], {"action": "hand_over", "at": rfc3339(situation.now)}
    if expires is not None and expires <= ends:
        at = rfc3339(expires)
        return f"its time is up at {at}, and it is given up then", [], {"action": "give_up", "at": at}
    at = rfc3339(max(ends, situation.now))
    if not definition.repeatable:
        text = f"it may be sent only once, and is given up at {at}"
        return text, [{"code": "not_repeatable"}], {"action": "give_up", "at": at}
    if not lanes.reachable(definition, situation.presence):
        away, facts = _away(situation)
        text = f"{away}, and from {at} on it is held until the device is back"
        return text, [facts], {"action": "hold", "at": at}
    if lanes.is_last_attempt(member):
        text = f"this is the last attempt, and it is given up at {at}"
        return text, [{"code": "last_attempt"}], {"action": "give_up", "at": at}
    text = f"without one by {at} it is sent again after a pause"
    return text, [{"code": "attempt_open", "until": at}], {"action": "back_off", "at": at}


def _leased(situation: Situation, member: Member, ends: int) -> Parts:
    """A pull transport has it: what the end of the lease will bring."""
    state, definition = situation.state, member.definition
    at = rfc3339(max(ends, situation.now))
    who = "a relay" if state.transport == "relay" else "the device, by its heartbeat,"
    by = "" if member.flight.holder is None else f" ({member.flight.holder})"
    held = f"{who}{by} has it under a lease until {at}"
    reasons: list[Facts] = [
        {"code": "leased", "transport": state.transport, "by": member.flight.holder, "until": at}
    ]
    if state.expires_at is not None and state.expires_at <= ends:
        at = rfc3339(state.expires_at)
        return f"{held}; its time is up at {at}, and it is given up then", reasons, _at("give_up", at)
    if not definition.repeatable:
        reasons.append({"code": "not_repeatable"})
        return f"{held}; it may be sent only once, and is given up then", reasons, _at("give_up", at)
    text = f"{held}, and without an answer by then it is due again, by any way its type allows"
    by_mqtt = "mqtt" in definition.transports and lanes.reachable(definition, situation.presence)
    return text, reasons, _at("hand_over" if by_mqtt else "hold", at)


def _at(action: str, at: str) -> Facts:
    return {"action": action, "at": at}


def _between(situation: Situation, member: Member) -> Parts:
    """No attempt is open: when the next one comes, or what it waits for."""
    state, definition = situation.state, member.definition
    due = max(member.flight.due_at, situation.now)
    given_up: Facts = {"action": "hand_over"}
    end = ""
    if state.expires_at is not None:
        given_up = {"action": "give_up", "at": rfc3339(state.expires_at)}
        end = f", and at {given_up['at']} it is given up"
    if "mqtt" not in definition.transports:
        return f"it waits to be fetched again{end}", [{"code": "pull_only"}], given_up
    if not lanes.reachable(definition, situation.presence):
        away, facts = _away(situation)
        fetched = " or fetches it" if len(definition.transports) > 1 else ""
        return f"{away}, and the next attempt follows when it is back{fetched}{end}", [facts], given_up
    if not lanes.has_time(state, due):
        return f"no time is left for another attempt{end}", [{"code": "no_time"}], given_up
    if due > situation.now:
        at = rfc3339(due)
        reason = {"code": "backing_off", "until": at}
        return f"the next attempt follows at {at}", [reason], {"action": "hand_over", "at": at}
    if situation.link_up and not situation.slots_free:
        text = "the next attempt follows as soon as the MQTT server has taken what is on its way to it"
        return text, [{"code": "no_slot"}], {"action": "hand_over"}
    now = rfc3339(situation.now)
    return "the next attempt is due now", [], {"action": "hand_over", "at": now}


def _acknowledged(member: Member) -> Parts:
    state = member.state
    at, since = rfc3339(lanes.result_due_at(member)), rfc3339(state.acknowledged_at or state.updated_at)
    reason: Facts = {"code": "running", "since": since}
    text = f"The device has had it since {since}"
    if state.reopened:
        reason["late"] = True
        text = f"It had been given up; then the device reported at {since} that it has it"
    if state.percent is not None:
        reason["percent"] = state.percent
        text += f"; {state.percent:g} percent are done"
    if state.note is not None:
        reason["note"] = state.note
        text += f" ({state.note})"
    sentence = f"{text}. Without another report it is given up at {at}."
    return sentence, [reason], {"action": "give_up", "at": at}


def _stopped(situation: Situation, parts: Parts) -> Parts:
    """What was handed over is not judged by time while answers to it cannot come in."""
    (text, reasons, following), member = parts, situation.member
    if situation.halted:
        why, facts = f"Nothing is sent or given up now ({situation.halted}).", _halted(situation)
    elif not situation.link_up and member is not None and "mqtt" in member.definition.transports:
        why = "The MQTT server cannot be reached; until it can, nothing is sent or given up."
        facts = {"code": "link_down"}
    else:
        return parts
    return f"{text} {why}", [*reasons, facts], {"action": following["action"]} if following else None


def _halted(situation: Situation) -> Facts:
    return {"code": "halted", "why": situation.halted}


def _times(state: CommandState) -> str:
    return "once" if state.attempts == 1 else f"{state.attempts} times"
