"""Explains why a command is in its state and what happens next; every surface shows the same answer.

Pure: all facts are in `Situation`. It must never guess: if something is not known, the answer says so.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from broker.domain import attempts, lanes
from broker.domain.ended import Facts as Facts
from broker.domain.ended import Parts, closed, times, with_signature
from broker.domain.lanes import Lane, Member, Presence
from broker.domain.lifecycle import CommandState, State
from devices.clock import rfc3339
from devices.types import Definition


class Speaker(NamedTuple):
    """The gateway that speaks for a device: its hardware id, and what is known of its presence."""

    hardware_id: str
    presence: Presence


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a command at `now` (ms). `member` None: the command is not in the live state, because
    it was closed. `offline_since`: ms. `halted`: the reason why hand-over is stopped. `status_topic`: where
    the device says that it is online; None if its connection itself says so. `listens`: it is subscribed to
    the command's topic, as far as known. `definition`: the command's. `gateway`: None if the device has
    none."""

    state: CommandState
    now: int
    member: Member | None
    lane: Lane | None
    presence: Presence
    offline_since: int | None
    link_up: bool
    halted: str | None
    slots_free: bool
    status_topic: str | None = None
    listens: bool = True
    definition: Definition | None = None
    gateway: Speaker | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a command is in its state, and what happens next."""

    command_id: str
    state: str
    summary: Annotated[str, Meta(description="A sentence or two, for people.")]
    reasons: Annotated[
        list[dict[str, Any]], Meta(description="For programs: each has a `code` and the facts of that code.")
    ]
    next: Annotated[
        dict[str, Any] | None,
        Meta(
            description="What the broker does next: `action` is `hand_over`, `back_off`, `hold`, `give_up` "
            "or `expire`; `at` is its time, if only time must pass. Null: nothing."
        ),
    ]


def explain(situation: Situation) -> Explanation:
    """Explains any command in any state."""
    state, member = situation.state, situation.member
    parts: Parts
    if state.closed:
        parts = _unreached(situation, closed(state))
    elif member is None:
        # Open commands are always in memory, so this one was closed since its state was read.
        parts = "It has just been closed; repeat the request.", [{"code": "just_closed"}], None
    elif state.state is State.PENDING:
        parts = _pending(situation, member)
    else:
        published = state.state is State.PUBLISHED
        parts = _published(situation, member) if published else _acknowledged(member)
        parts = _stopped(situation, _unreached(situation, parts) if published else parts)
    summary, reasons, following = with_signature(state, parts)
    return Explanation(
        command_id=state.id, state=state.state.value, summary=summary, reasons=reasons, next=following
    )


# --- waiting to be handed over -----------------------------------------------------------------------


def _pending(situation: Situation, member: Member) -> Parts:
    state, lane, now = situation.state, situation.lane, situation.now
    why: list[tuple[str, Facts]] = []
    if situation.halted:
        why.append((f"nothing is handed over now ({situation.halted})", _halted(situation)))
    if lane is not None:
        why += _ahead(lane, member, now)
    if "mqtt" not in member.definition.transports:
        text = "its type does not use MQTT; its device or a relay must fetch it"
        why.append((text, {"code": "pull_only"}))
    else:
        if not lanes.reachable(member.definition, situation.presence):
            why.append(_away(situation))
        elif member.definition.presence != "none" and not situation.listens:
            text = f"the device is not subscribed to {state.topic}"
            why.append((text, {"code": "no_subscriber", "topic": state.topic}))
        if not situation.link_up:
            why.append(("the MQTT server cannot be reached", {"code": "link_down"}))
        elif not situation.slots_free:
            text = "all send slots are in use until the MQTT server confirms earlier messages"
            why.append((text, {"code": "no_slot"}))
        if why and len(member.definition.transports) > 1:
            why.append(("its device or a relay may fetch it meanwhile", {"code": "fetchable"}))
    if lane is not None and lane.shut_until > now:
        until = rfc3339(lane.shut_until)
        text = f"until {until} an answer without id could belong to the previous command"
        why.append((text, {"code": "lane_shut", "until": until}))
    if not lanes.has_time(state, now):
        why.append(("it expires too soon to be handed over", {"code": "no_time"}))
    text = "; ".join(text for text, _ in why) or "it is being handed over now"
    until = "" if state.expires_at is None else f" It expires at {rfc3339(state.expires_at)}."
    reasons = [facts for _, facts in why]
    return f"Not handed over yet: {text}.{until}", reasons, _next_of_pending(situation, reasons)


def _ahead(lane: Lane, member: Member, now: int) -> list[tuple[str, Facts]]:
    """The reasons from the commands before it in the lane: they fill the window, or are handed over first."""
    flying: list[Member] = []
    found: list[tuple[str, Facts]] = []
    for place, other in enumerate(lane.members.values()):
        if other is member:
            break
        if other.holds_slot:
            flying.append(other)
        elif other.state.state is State.PENDING and lanes.has_time(other.state, now):
            # Stop here: a lane may be long, and all its commands may be explained at once.
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
    text = f"the older command {first.id} ({first.type}) goes first"
    if count > 1:
        text = f"{count} older commands go first, beginning with {first.id} ({first.type})"
    return text, {"code": "behind", "command_id": first.id, "count": count}


def _away(situation: Situation) -> tuple[str, Facts]:
    """Why the device cannot be reached. A device that was heard before is offline, even if the live state
    says `never`."""
    if situation.presence is Presence.NEVER and situation.offline_since is None:
        text = "the device has not been heard since it was registered, or since the broker was started"
        facts: Facts = {"code": "never_heard"}
    else:
        since = None if situation.offline_since is None else rfc3339(situation.offline_since)
        text = "the device is offline" if since is None else f"the device has been offline since {since}"
        facts = {"code": "offline", "since": since}
    if situation.gateway is not None:
        return _behind_gateway(situation, situation.gateway, text, facts)
    if situation.status_topic is None:
        topic = situation.state.topic
        text = f"{text} (it is online while it is connected and subscribed to {topic})"
        return text, facts | {"online": "connection", "topic": topic}
    text = f"{text} (it must publish `online` on {situation.status_topic})"
    return text, facts | {"online": "status", "topic": situation.status_topic}


def _behind_gateway(situation: Situation, gateway: Speaker, text: str, facts: Facts) -> tuple[str, Facts]:
    name, topic = gateway.hardware_id, situation.state.topic
    facts = facts | {"gateway": name, "gateway_presence": gateway.presence.value}
    if gateway.presence is Presence.NEVER:
        return f"{text}; its gateway {name} has not been heard either", facts
    if gateway.presence is Presence.OFFLINE:
        return f"{text}; its gateway {name} is offline", facts
    if situation.status_topic is None:
        text = f"{text} (it is online while its gateway {name} is subscribed to {topic})"
        return text, facts | {"online": "connection", "topic": topic}
    return f"{text} (its gateway {name} must publish a message of it)", facts | {"online": "status"}


def _next_of_pending(situation: Situation, reasons: list[Facts]) -> Facts:
    """What happens next if only time passes, and no device, server or person does anything."""
    state, codes = situation.state, {facts["code"] for facts in reasons}
    if "halted" in codes:
        return {"action": "hand_over"}  # while hand-over is halted, commands do not expire either
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
        counting = f"{member.counted} of {most} counted attempts"
    reason: Facts = {"code": "no_answer", "attempts": state.attempts, "counted": member.counted}
    who = "device" if definition.completes_on == "executed" else "MQTT server"
    last = rfc3339(state.handed_over_at or state.updated_at)
    said = f"Handed over {times(state)} ({counting}), last at {last}; no answer from the {who} yet"
    text, reasons, following = (_in_the_air if flight.open else _between)(situation, member)
    return f"{said}; {text}.", [reason | {"max_attempts": most, "last_at": last}, *reasons], following


def _in_the_air(situation: Situation, member: Member) -> Parts:
    """An attempt is open: what happens at the end of its answer time."""
    state, definition = situation.state, member.definition
    ends, expires = lanes.attempt_ends_at(member), state.expires_at
    if member.flight.lease_until is not None:
        return _leased(situation, member, member.flight.lease_until)
    if ends is None:
        return "its bytes are being written", [], {"action": "hand_over", "at": rfc3339(situation.now)}
    if expires is not None and expires <= ends:
        at = rfc3339(expires)
        return f"it expires at {at} and is given up then", [], {"action": "give_up", "at": at}
    at = rfc3339(max(ends, situation.now))
    if not definition.repeatable:
        text = f"it may be sent only once, and is given up at {at}"
        return text, [{"code": "not_repeatable"}], {"action": "give_up", "at": at}
    if attempts.is_exhausted(member):
        text = f"no further attempt is allowed, and it is given up at {at}"
        return text, [{"code": "last_attempt"}], {"action": "give_up", "at": at}
    if not lanes.reachable(definition, situation.presence):
        away, facts = _away(situation)
        text = f"{away}, and from {at} on it is held until the device is back"
        return text, [facts], {"action": "hold", "at": at}
    if attempts.is_last(member):
        text = f"this is the last attempt, and it is given up at {at}"
        return text, [{"code": "last_attempt"}], {"action": "give_up", "at": at}
    text = f"if none comes by {at}, it is sent again after a pause"
    return text, [{"code": "attempt_open", "until": at}], {"action": "back_off", "at": at}


def _unreached(situation: Situation, parts: Parts) -> Parts:
    """Adds attempts that ended because nobody was subscribed, or because the device went offline."""
    (text, reasons, following), state, member = parts, situation.state, situation.member
    reasons = list(reasons)
    if member is not None and member.flight.unheard_at is not None:
        at = rfc3339(member.flight.unheard_at)
        text += f" At {at} the MQTT server had no subscriber for {state.topic}."
        reasons.append({"code": "no_subscriber", "at": at, "topic": state.topic})
    dropped = 0 if member is None else member.flight.dropped
    if state.reason == "no_answer" and (kind := situation.definition) is not None:
        used_up = state.counting and state.counted >= attempts.MOST_TIMES * kind.max_attempts
        dropped = max(dropped, state.counted - kind.max_attempts) if used_up else dropped
    if dropped:
        often = "once" if dropped == 1 else f"{dropped} times"
        text += f" The device went offline {often} after it was handed over, before it answered."
        reasons.append({"code": "drops_connection", "count": dropped})
    return text, reasons, following


def _leased(situation: Situation, member: Member, ends: int) -> Parts:
    """A heartbeat or relay holds the command: what happens at the end of the lease."""
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
        return f"{held}; it expires at {at} and is given up then", reasons, _at("give_up", at)
    if not definition.repeatable:
        reasons.append({"code": "not_repeatable"})
        return f"{held}; it may be sent only once, and is given up then", reasons, _at("give_up", at)
    text = f"{held}; if no answer comes by then, it is due again, by any transport of its type"
    by_mqtt = "mqtt" in definition.transports and lanes.reachable(definition, situation.presence)
    return text, reasons, _at("hand_over" if by_mqtt else "hold", at)


def _at(action: str, at: str) -> Facts:
    return {"action": action, "at": at}


def _between(situation: Situation, member: Member) -> Parts:
    """No attempt is open: when the next one follows, or what it waits for."""
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
        return f"it expires too soon for another attempt{end}", [{"code": "no_time"}], given_up
    if due > situation.now:
        at = rfc3339(due)
        reason = {"code": "backing_off", "until": at}
        return f"the next attempt follows at {at}", [reason], {"action": "hand_over", "at": at}
    if situation.link_up and not situation.slots_free:
        text = (
            "the next attempt follows when the MQTT server confirms earlier messages (all slots are in use)"
        )
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
        text = f"It had timed out; then the device reported at {since} that it has the command"
    if state.percent is not None:
        reason["percent"] = state.percent
        text += f"; {state.percent:g} percent is done"
    if state.note is not None:
        reason["note"] = state.note
        text += f" ({state.note})"
    sentence = f"{text}. Without another report it is given up at {at}."
    return sentence, [reason], {"action": "give_up", "at": at}


def _stopped(situation: Situation, parts: Parts) -> Parts:
    """Adds that timers wait: a handed-over command is not given up while answers cannot come in."""
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
