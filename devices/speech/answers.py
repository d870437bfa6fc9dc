"""Answers in Ordain's own form from what rules read, and a trial: what one message would lead to.

Pure. `trial` is what `ordain types test` shows. It uses the same rules in the same order as the broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from devices.speech.messages import Unreadable, decoded
from devices.speech.rules import Decoded, Reading, holds, read
from devices.speech.speech import Speech
from devices.speech.topics import Owner, owner_of, with_prefix
from devices.types import Definition, DeviceType
from devices.wire import Answer, Malformed, Progress, as_error, as_result, decode_answer, decode_status


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What would be recorded if this command were with the device. `event` None: nothing, and `why` says
    so."""

    command: str
    event: str | None
    why: str
    evidence: str | None = None
    id: str | None = None
    number: int | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    progress: Progress | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`roles`: what a message on this topic may be: answer, state, presence. `device`: the name in the
    topic."""

    topic: str
    roles: tuple[str, ...]
    device: str | None = None
    pattern: str | None = None
    malformed: str | None = None
    presence: str | None = None
    state: Any = msgspec.UNSET
    commands: tuple[Outcome, ...] = ()


def answer_of(reading: Reading) -> Answer:
    """The answer in Ordain's own form."""
    error = reading.error
    if isinstance(error, dict) and isinstance(error.get("code"), int | float):
        error = error | {"code": str(error["code"])}
    progress = None
    if reading.percent is not None:
        progress = Progress(percent=reading.percent, note=reading.note)
    return Answer(
        status=reading.status,
        result=as_result(reading.result) if reading.status == "executed" else None,
        error=as_error(error) if reading.status == "failed" else None,
        progress=progress,
    )


def trial(
    kind: DeviceType, prefix: str, topic: str, payload: bytes, params: Any, commands: Sequence[str] = ()
) -> Trial:
    """What a live message would lead to, for each command that may be with the device at that time."""
    patterns = [each for each in kind.says if owner_of(with_prefix(each, prefix), topic) is not None]
    if not patterns:
        return Trial(topic=topic, roles=())
    pattern = patterns[0]
    owner = owner_of(with_prefix(pattern, prefix), topic)
    found = Trial(topic=topic, roles=_roles(kind, pattern), pattern=pattern, device=owner and _shown(owner))
    if "presence" in found.roles:
        return _presence(kind, payload, found)
    try:
        message = decoded(payload)
    except Unreadable as error:
        return msgspec.structs.replace(found, malformed=str(error))
    if "state" in found.roles:
        found = msgspec.structs.replace(found, state=message.value)
    definitions = [each for each in kind.definitions if not commands or each.command in commands]
    given = params if isinstance(params, dict) else {}
    known = {name: command.defaults | given for name, command in kind.commands.items()}
    outcomes = (
        _outcome(each, pattern, message, payload, known.get(each.command, params)) for each in definitions
    )
    return msgspec.structs.replace(found, commands=tuple(outcomes))


def _shown(owner: Owner) -> str:
    return owner.value if owner.gateway is None else f"{owner.value} of {owner.gateway}"


def _roles(kind: DeviceType, pattern: str) -> tuple[str, ...]:
    if pattern == kind.presence_pattern:
        return ("presence",)
    speeches = kind.speeches
    answers = not speeches or any(pattern in speech.answer_topics for speech in speeches)
    states = any(pattern in speech.state_topics for speech in speeches)
    return (*(["answer"] if answers else []), *(["state"] if states else []))


def _presence(kind: DeviceType, payload: bytes, found: Trial) -> Trial:
    try:
        if kind.online is None or kind.offline is None:
            online = decode_status(payload).online
        elif holds(kind.online, message := decoded(payload)):
            online = True
        elif holds(kind.offline, message):
            online = False
        else:
            why = "neither what the type has for online nor for offline"
            return msgspec.structs.replace(found, malformed=why)
    except (Malformed, Unreadable) as error:
        return msgspec.structs.replace(found, malformed=str(error))
    return msgspec.structs.replace(found, presence="online" if online else "offline")


def _outcome(definition: Definition, pattern: str, message: Decoded, payload: bytes, params: Any) -> Outcome:
    speech, name = definition.speech, definition.command
    if speech is None or (pattern in speech.answer_topics and not speech.rules):
        return _own_form(definition, payload)
    why = "this is no answer topic of the command"
    if pattern in speech.answer_topics:
        reading = read(speech.rules, pattern, message, params)
        if isinstance(reading, Reading):
            return _read(name, speech, reading)
        why = reading
    if pattern in speech.state_topics and speech.done_when is not None:
        if holds(speech.done_when, message, params):
            done = as_result(message.value)
            because = f"done_when is true: {speech.done_when}"
            return Outcome(command=name, event="executed", evidence="observed", why=because, result=done)
        why = f"done_when is not true: {speech.done_when}" + ("" if not speech.rules else f"; {why}")
    return Outcome(command=name, event=None, why=why)


def _read(name: str, speech: Speech, reading: Reading) -> Outcome:
    answer, rule = answer_of(reading), speech.rules[reading.rule]
    named = reading.id is not None or reading.number is not None
    told = "device_ack" if answer.status in ("acknowledged", "progress") else "device_result"
    because = f"rule {reading.rule + 1} fits" + ("" if rule.when is None else f": {rule.when}")
    if reading.number is not None:
        because += f"; it belongs to the attempt with number {reading.number}"
    elif reading.id is not None:
        because += f"; it belongs to {reading.id}"
    else:
        because += "; it names no command, so it belongs to the one that is with the device"
    return Outcome(
        command=name,
        event="progressed" if answer.status == "progress" else answer.status,
        evidence=told if named else "inferred",
        why=because,
        id=reading.id,
        number=reading.number,
        result=answer.result,
        error=answer.error,
        progress=answer.progress,
    )


def _own_form(definition: Definition, payload: bytes) -> Outcome:
    name = definition.command
    try:
        answer = decode_answer(payload, None, definition.answers)
    except Malformed as error:
        return Outcome(command=name, event=None, why=f"it cannot be read: {error}")
    told = "device_ack" if answer.status in ("acknowledged", "progress") else "device_result"
    return Outcome(
        command=name,
        event="progressed" if answer.status == "progress" else answer.status,
        evidence="inferred" if answer.id is None else told,
        why="it is an answer in Ordain's own form",
        id=answer.id,
        result=answer.result,
        error=answer.error,
        progress=answer.progress,
    )
