"""Explains why a command is closed: the part of an explanation that follows from its state alone. Pure."""

from __future__ import annotations

from typing import Any

from broker.domain.lifecycle import CommandState, State
from devices.clock import rfc3339

Facts = dict[str, Any]
Parts = tuple[str, list[Facts], Facts | None]

TIMED_OUT = {
    "no_answer": "no answer from the device",
    "no_result": "the device acknowledged it, but no result came in time",
    "ttl": "it expired after it was handed over",
    "unsendable": "its device type can no longer encode it",
    "device_deleted": "its device was deleted",
    "operator": "an operator stopped waiting",
}


def closed(state: CommandState) -> Parts:
    at = rfc3339(state.closed_at or state.updated_at)
    late = ", after it had timed out" if state.late else ""
    reason: Facts = {"code": state.state.value, "at": at} | ({"late": True} if state.late else {})
    match state.state:
        case State.EXECUTED:
            sentence = f"The device reported at {at} that it executed the command{late}."
            if state.delivered_at is None:
                reason["one_way"] = True
                sentence = f"The MQTT server accepted it at {at}; devices of this type send no answers."
        case State.FAILED:
            error = state.error
            assert error is not None, "failed carries its error"
            who = {"device": "The device reported this", "mqtt_server": "The MQTT server refused it"}
            reason |= {"by": state.by, "error": error.code}
            text = (error.message or error.code).rstrip(". ")
            sentence = f"It failed: {text}. {who.get(state.by or '', 'Ordain detected this')} at {at}{late}."
            if state.published_at is None:
                sentence += " It was never handed over."
        case State.EXPIRED:
            sentence = f"It expired at {at}; it was never handed over."
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
                f"It timed out at {at} ({cause}) after it was handed over {times(state)}. It is not known "
                f"whether the device executed it"
                f"{'; a late answer still corrects this' if correctable else ''}."
            )
    return sentence, [reason], None


SIGNED = "The device signed this answer."
UNSIGNED = "The answer was not signed, so whoever can write to the device's topic may have sent it."


def with_signature(state: CommandState, parts: Parts) -> Parts:
    """Adds whether the answer that led to this state was signed, where answers may be."""
    (sentence, reasons, following), signed = parts, state.signed
    if signed is None or state.state not in (State.ACKNOWLEDGED, State.EXECUTED, State.FAILED):
        return parts
    reasons = [reasons[0] | {"signed": signed}, *reasons[1:]]
    return f"{sentence} {SIGNED if signed else UNSIGNED}", reasons, following


def _cause(state: CommandState) -> str:
    if state.superseded_by is not None:
        return f" (replaced by {state.superseded_by})"
    if state.reason == "device_deleted":
        return " (its device was deleted)"
    return "" if state.reason is None else f" ({state.reason})"


def times(state: CommandState) -> str:
    return "once" if state.attempts == 1 else f"{state.attempts} times"
