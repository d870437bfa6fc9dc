"""The checks of a device type that involve more than one field. They run when its file is loaded. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from devices.names import is_name
from devices.schema import no_schema
from devices.speech.speech import Fault, faults
from devices.speech.templates import text_places
from devices.speech.topics import COMMAND, level_fault, pattern_fault

if TYPE_CHECKING:
    from devices.definition import AnswerStatus, CompletesOn
    from devices.types import CommandType, DeviceType

MAX_SUFFIX_LEVELS = 4
_SUFFIX_RULE = f"one to {MAX_SUFFIX_LEVELS} topic levels, each an identifier, and not `status`"
_NAME_RULE = "must match [A-Za-z0-9][A-Za-z0-9_-]{0,63} and not be `me` or `pending`"


def contradictions(device_type: DeviceType) -> Iterator[Fault]:
    """Broken rules that involve more than one field: (key, value, what would be right)."""
    t, bare = device_type, device_type.payload == "bare"
    if not is_name(t.name):
        yield "name", t.name, _NAME_RULE
    yield from _wrong_suffixes("", t.command_suffix, t)
    if not _is_suffix(t.answer_suffix):
        yield "answer_suffix", t.answer_suffix, f"must be {_SUFFIX_RULE}"
    if not t.commands and not t.open:
        yield "commands", {}, "needs at least one [commands.<name>], or `open = true`"
    if bare and t.open:
        yield "open", True, "a bare type needs a `text` for each command, so it cannot be open"
    if bare and t.any_params:
        yield "any_params", True, "a bare payload has no place for parameters"
    if bare and t.carries_ids:
        yield "carries_ids", True, "a bare payload has no place for an id"
    if bare and t.grants not in (None, "none"):
        yield "grants", t.grants, 'a bare payload has no place for a grant: "none", or leave it out'
    if t.max_in_flight > 1 and not all(t.definition(name).carries_ids for name in _names(t)):
        yield "max_in_flight", t.max_in_flight, "must be 1 without ids: the answers name no command"
    if not t.transports or len(set(t.transports)) < len(t.transports):
        yield "transports", t.transports, "must have at least one transport, each only once"
    if t.backoff_cap_sec < t.backoff_base_sec:
        yield "backoff_cap_sec", t.backoff_cap_sec, f"at least backoff_base_sec ({t.backoff_base_sec})"
    yield from _wrong_answers("", t.answers)
    yield from _wrong_signing(t)
    yield from _wrong_topics(t)
    if t.open:
        yield from _wrong_end("", t.completes_on, t)
    said: dict[tuple[str, str], str] = {}
    for name, command in t.commands.items():
        yield from _wrong_command(name, command, t)
        speech = t.definition(name).speech
        topic = speech.command_topic if speech is not None else command.command_suffix or t.command_suffix
        words = topic, command.text or ""
        if bare and words in said:
            where = "suffix" if speech is None else "topic"
            yield f"commands.{name}.text", command.text, f"on this {where} it already means {said[words]}"
        said[words] = name


def _wrong_command(name: str, command: CommandType, t: DeviceType) -> Iterator[Fault]:
    where = f"commands.{name}."
    if not is_name(name):
        yield f"commands.{name}", command.title, _NAME_RULE
    if t.payload == "bare" and not command.text:
        yield where + "text", command.text, "a bare command needs the text that is sent for it"
    if t.payload != "bare" and command.text is not None:
        yield where + "text", command.text, "only commands of bare types have a text"
    if len((command.text or "").encode()) > t.max_payload_bytes:
        yield where + "text", command.text, f"must not exceed max_payload_bytes ({t.max_payload_bytes})"
    if t.payload == "bare" and command.params is not None and not text_places(command.text or ""):
        right = "a bare payload has no place for parameters, unless its text has {params.<path>}"
        yield where + "params", command.params, right
    yield from _wrong_speech(where, name, command, t)
    yield from _wrong_suffixes(where, command.command_suffix or t.command_suffix, t)
    yield from _wrong_end(where, command.completes_on or t.completes_on, t)
    yield from _wrong_answers(where, command.answers or {})
    if command.params is not None:
        yield from _wrong_schema(where + "params", command, command.params)
    if command.result is not None:
        yield from no_schema(where + "result", command.result)


def _wrong_end(where: str, completes_on: CompletesOn, t: DeviceType) -> Iterator[Fault]:
    if completes_on == "published" and t.presence != "required":
        right = 'needs presence = "required": else a device that never connected silently loses it'
        yield where + "completes_on", completes_on, right
    if completes_on == "published" and t.transports != ("mqtt",):
        yield where + "completes_on", completes_on, 'needs transports = ["mqtt"]: only MQTT has a PUBACK'


def _wrong_signing(t: DeviceType) -> Iterator[Fault]:
    """Where answers are signed, nothing else may say that a device has executed a command."""
    if t.answers_signed == "none":
        return
    definitions = [t.definition(name) for name in _names(t)]
    if t.payload == "bare" or not all(each.carries_ids for each in definitions):
        right = "needs commands with an id, which the signature covers: no bare payload, carries_ids = true"
        yield "answers_signed", t.answers_signed, right
    if any(speech.rules or speech.state_topics for speech in t.speeches):
        right = "needs answers in Ordain's own form: no rules and no state_topics"
        yield "answers_signed", t.answers_signed, right
    if any(each.completes_on == "published" for each in definitions):
        right = 'needs completes_on = "executed": a PUBACK of the MQTT server is not signed'
        yield "answers_signed", t.answers_signed, right


def _wrong_answers(where: str, answers: dict[str, AnswerStatus]) -> Iterator[Fault]:
    for text, status in answers.items():
        if not text or text != text.strip() or text[0] == "{" or text.encode()[0] in (0xDE, 0xDF):
            right = "must not be empty, have spaces around it, or begin as JSON or msgpack do"
            yield f"{where}answers.{text}", status, right
        if status == "progress":
            yield f"{where}answers.{text}", status, "a bare text has no place for a percentage"


def _wrong_schema(where: str, command: CommandType, schema: dict[str, Any]) -> Iterator[Fault]:
    wrong_schema = list(no_schema(where, schema))
    yield from wrong_schema
    if wrong_schema or command.validator is None:
        return
    for key, value in command.defaults.items():
        for wrong in command.validator.iter_errors({key: value}):
            if wrong.instance_path[:1] == [key]:
                right = f"the default does not match its own schema: {wrong.message}"
                yield f"{where}.properties.{key}.default", value, right


def _wrong_suffixes(where: str, suffix: str, t: DeviceType) -> Iterator[Fault]:
    if not _is_suffix(suffix) or suffix == t.answer_suffix:
        yield where + "command_suffix", suffix, f"must be {_SUFFIX_RULE} or the answer suffix"


def _is_suffix(text: str) -> bool:
    levels = text.split("/")
    return text != "status" and len(levels) <= MAX_SUFFIX_LEVELS and all(map(is_name, levels))


def _wrong_topics(t: DeviceType) -> Iterator[Fault]:
    """Patterns as the file has them; those of a command are checked with the command filled in."""
    lists = {"answer_topics": t.answer_topics, "state_topics": t.state_topics, "other_topics": t.other_topics}
    given = [(key, each) for key, topics in lists.items() for each in topics]
    single = {"command_topic": t.command_topic, "presence_topic": t.presence_topic}
    given += [(key, each) for key, each in single.items() if each is not None]
    for key, pattern in given:
        of_command = key in ("command_topic", "answer_topics")
        if fault := pattern_fault(pattern, rest=key == "other_topics", command=of_command):
            yield key, pattern, fault
        elif t.open and COMMAND in pattern:
            yield key, pattern, "an open type has commands of any name: {command} could be any topic"
    if t.silence_sec is not None and t.presence == "none":
        yield "silence_sec", t.silence_sec, 'needs presence = "required" or "optional"'
    if (t.template is not None or any(each.template is not None for each in t.commands.values())) and (
        t.payload == "bare"
    ):
        yield "template", t.template, "a bare payload is a text: write it as `text`"
    if (t.rules or t.command_topic or t.answer_topics) and t.transports != ("mqtt",):
        yield "transports", t.transports, 'topics and rules of its own need transports = ["mqtt"]'
    if t.open and (speech := t.definition("any").speech) is not None:
        yield from faults("", speech, None, None)


def _wrong_speech(where: str, name: str, command: CommandType, t: DeviceType) -> Iterator[Fault]:
    if command.wire_name is not None and (fault := level_fault(command.wire_name)):
        yield where + "wire_name", command.wire_name, fault
    speech = t.definition(name).speech
    if speech is not None:
        yield from faults(where, speech, command.text, command.params)
    required = (command.params or {}).get("required", [])
    for path in text_places(command.text or ""):
        first = path.partition(".")[0]
        if first not in required and first not in command.defaults:
            right = f"{{params.{path}}} needs a value: make {first} required, or give it a default"
            yield where + "text", command.text, right


def _names(t: DeviceType) -> list[str]:
    return [*t.commands, *(["any"] if t.open else [])]
