"""Device types: how to talk to one kind of device, and when a command to it is finished.

A `DeviceType` is read from TOML (one file per type) and checked completely at start. A `Definition` has all
that is needed to deliver one command and to understand its answers. It is a plain value in the log, so a
later change of the type does not affect commands that were already accepted.
"""

from __future__ import annotations

import copy
import math
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jsonschema_rs
import msgspec
from msgspec import UNSET, Meta

from devices import toml
from devices.allowed import reason
from devices.definition import AnswerStatus as AnswerStatus
from devices.definition import CompletesOn, GrantAlgorithm, PresenceRule
from devices.definition import Definition as Definition
from devices.definition import PayloadFormat as PayloadFormat
from devices.definition import Signing as Signing
from devices.definition import Transport as Transport
from devices.names import is_name
from devices.schema import MAX_DEPTH as MAX_DEPTH
from devices.schema import MAX_SIGNED_INTEGER as MAX_SIGNED_INTEGER
from devices.schema import BadParams as BadParams
from devices.schema import bad_params, compiled, unsignable
from devices.speech.rules import Rule
from devices.speech.speech import LARGEST_NUMBER, Query, Speech
from devices.speech.templates import declared, places, text_places
from devices.speech.topics import with_command
from devices.type_checks import contradictions

Ttl = Annotated[int, Meta(ge=1, le=31_536_000)]
Seconds = Annotated[float, Meta(ge=0.05, le=31_536_000)]
Count = Annotated[int, Meta(ge=1, le=1_000)]
T = TypeVar("T", bound=msgspec.Struct)

ANY = "*"


class UnknownCommand(Exception):
    """The device type has no such command. The caller must correct the name."""

    def __init__(self, device_type: str, command: str, known: tuple[str, ...]) -> None:
        self.device_type, self.command, self.known = device_type, command, known
        names = ", ".join(known) or "any valid name"
        super().__init__(f"{device_type} has no command {command!r:.80}; it has: {names}")


class BadType(Exception):
    """A device type file is wrong. Its author must correct it. `key` is empty if the whole file is wrong."""

    def __init__(self, file: str, key: str, value: Any, right: str) -> None:
        self.file, self.key, self.value, self.right = file, key, value, right
        super().__init__(f"{file}: {key} = {value!r:.120}: {right}" if key else f"{file}: {right}")


class CommandType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """One command as the type's file declares it. A field that is None takes the type's value.

    `rules`: the list form of `answers`. `wire_name`: its name in topics and templates.
    """

    title: str | None = None
    text: str | None = None
    command_suffix: str | None = None
    params: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    answers: dict[str, AnswerStatus] | None = None
    rules: tuple[Rule, ...] | None = None
    wire_name: str | None = None
    command_topic: str | None = None
    template: Any = None
    done_when: str | None = None
    repeatable: bool | None = None
    default_ttl_sec: Ttl | None = None
    completes_on: CompletesOn | None = None
    max_attempts: Count | None = None
    ack_timeout_sec: Seconds | None = None
    result_timeout_sec: Seconds | None = None
    max_run_sec: Seconds | None = None

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The declared types of the parameters in the text."""
        found = {path: declared(self.params, path).get("type") for path in text_places(self.text or "")}
        return {path: kind for path, kind in found.items() if isinstance(kind, str)}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        rules: dict[str, Any] = (self.params or {}).get("properties", {})
        objects = {key: rule for key, rule in rules.items() if isinstance(rule, dict)}
        return {key: rule["default"] for key, rule in objects.items() if "default" in rule}

    @cached_property
    def validator(self) -> jsonschema_rs.Validator | None:
        return None if self.params is None else compiled(self.params)


class DeviceType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """One kind of device. `open`: any command name is allowed. `any_params`: params need not be an object.

    `grants`: the algorithm that signs grants, or "none" if commands carry no grant. `rules`: the list form of
    `answers`. `gateway`: such a device speaks for others too, over its own connection. `other_topics`: what
    the device publishes too and nobody reads. The fields from `command_topic` on are described in
    `devices/speech`.
    """

    name: str
    title: str | None = None
    payload: PayloadFormat = "json"
    command_suffix: str = "rls"
    answer_suffix: str = "ack"
    answers: dict[str, AnswerStatus] = {}
    open: bool = False
    any_params: bool = False
    commands: dict[str, CommandType] = {}
    carries_ids: bool | None = None
    grants: GrantAlgorithm | Literal["none"] | None = None
    answers_signed: Signing = "none"
    completes_on: CompletesOn = "executed"
    repeatable: bool | None = None
    presence: PresenceRule = "required"
    gateway: bool = False
    transports: tuple[Transport, ...] = ("mqtt",)
    default_ttl_sec: Ttl | None = None
    max_in_flight: Annotated[int, Meta(ge=1, le=100)] = 1
    max_attempts: Count = 5
    ack_timeout_sec: Seconds = 10
    result_timeout_sec: Seconds = 60
    max_run_sec: Seconds = 86_400
    backoff_base_sec: Seconds = 5
    backoff_factor: Annotated[float, Meta(ge=1, le=10)] = 2
    backoff_cap_sec: Seconds = 300
    late_answer_sec: Annotated[float, Meta(ge=0, le=31_536_000)] | None = None
    heartbeat_lease_sec: Seconds = 60
    relay_lease_sec: Seconds = 60
    max_payload_bytes: Annotated[int, Meta(ge=1, le=65_536)] = 65_536
    command_topic: str | None = None
    answer_topics: tuple[str, ...] = ()
    state_topics: tuple[str, ...] = ()
    presence_topic: str | None = None
    online: str | None = None
    offline: str | None = None
    silence_sec: Seconds | None = None
    reply_topic: str | None = None
    other_topics: tuple[str, ...] = ()
    shares_topics_with: tuple[str, ...] = ()
    template: Any = None
    rules: tuple[Rule, ...] = ()
    done_when: str | None = None
    query: Query | None = None
    record_state: Literal["changes", "none"] = "changes"
    number_max: Annotated[int, Meta(ge=255, le=MAX_SIGNED_INTEGER)] = LARGEST_NUMBER

    @cached_property
    def listens(self) -> tuple[str, ...]:
        """The patterns of all topics that a device of this type receives."""
        if not (speeches := self.speeches):
            return tuple(sorted(_own(suffix) for suffix in self.command_suffixes))
        return tuple(dict.fromkeys(pattern for speech in speeches for pattern in speech.listens))

    @cached_property
    def says(self) -> tuple[str, ...]:
        """The patterns of all topics of a device of this type that the broker reads."""
        if not (speeches := self.speeches):
            return (_own(self.answer_suffix), self.presence_pattern)
        said = (pattern for speech in speeches for pattern in speech.says)
        return tuple(dict.fromkeys((*said, self.presence_pattern)))

    @cached_property
    def definitions(self) -> tuple[Definition, ...]:
        """Those of all commands; of an open type also the one of all others."""
        return tuple(self.definition(name) for name in [*self.commands, *(["any"] if self.open else [])])

    @property
    def presence_pattern(self) -> str:
        return self.presence_topic or _own("status")

    @cached_property
    def speeches(self) -> tuple[Speech, ...]:
        found = (definition.speech for definition in self.definitions)
        return tuple(speech for speech in found if speech is not None)

    def _speech(self, name: str, own: CommandType) -> Speech | None:
        """How a command is spoken; None if it has Ordain's own form."""
        topics = (self.command_topic, self.presence_topic, self.answer_topics, self.state_topics)
        forms = (self.template, self.rules, self.reply_topic, self.query)
        of_command = (own.rules, own.wire_name, own.command_topic, own.template, own.done_when, own.kinds)
        if not any((*topics, *forms, *of_command, text_places(own.text or ""))):
            return None
        wire = name if own.wire_name is None else own.wire_name
        suffix = _first(own.command_suffix, self.command_suffix)
        answers = self.answer_topics or (() if self.state_topics else (_own(self.answer_suffix),))
        rules = self.rules if own.rules is None else own.rules
        return Speech(
            command_topic=with_command(own.command_topic or self.command_topic or _own(suffix), wire),
            answer_topics=tuple(with_command(topic, wire) for topic in answers),
            state_topics=self.state_topics,
            presence_topic=self.presence_topic,
            online=self.online,
            offline=self.offline,
            silence_sec=self.silence_sec,
            reply_topic=self.reply_topic,
            wire_name=own.wire_name,
            template=self.template if own.template is None else own.template,
            kinds=own.kinds,
            rules=tuple(_of_command(rule, wire) for rule in rules),
            done_when=self.done_when if own.done_when is None else own.done_when,
            query=self.query,
            record_state=self.record_state,
            number_max=self.number_max,
        )

    @cached_property
    def command_suffixes(self) -> frozenset[str]:
        own = (command.command_suffix for command in self.commands.values())
        return frozenset({self.command_suffix, *filter(None, own)})

    @cached_property
    def words(self) -> dict[str, AnswerStatus]:
        """All bare answers of this type and of its commands, with their statuses."""
        found = dict(self.answers)
        for command in self.commands.values():
            found |= command.answers or {}
        return found

    def command(self, command: str) -> CommandType:
        found = self.commands.get(command)
        if found is None and self.open and is_name(command):
            return CommandType()
        if found is None:
            raise UnknownCommand(self.name, command, tuple(self.commands))
        return found

    def declared(self, command: str) -> str:
        """The name of its definition; `*` for all commands that an open type does not list."""
        return command if command in self.commands else ANY

    def definition(self, command: str) -> Definition:
        own = self.command(command)
        speech = self._speech(self.declared(command), own)
        carries_ids = _first(self.carries_ids, _names_itself(self.payload, speech))
        foreign = speech is not None and (speech.template is not None or bool(speech.rules))
        ack_timeout_sec = _first(own.ack_timeout_sec, self.ack_timeout_sec)
        carries = self.payload != "bare" and (not foreign or "$grant" in places(speech and speech.template))
        grants = _first(self.grants, "EdDSA" if carries else "none")
        return Definition(
            device_type=self.name,
            command=self.declared(command),
            payload=self.payload,
            text=own.text,
            command_suffix=_first(own.command_suffix, self.command_suffix),
            answer_suffix=self.answer_suffix,
            answers=_first(own.answers, self.answers),
            carries_ids=carries_ids,
            carries_grant=grants != "none",
            grant_algorithm="HS256" if grants == "HS256" else "EdDSA",
            completes_on=_first(own.completes_on, self.completes_on),
            repeatable=_first(own.repeatable, self.repeatable, carries_ids and not foreign),
            presence=self.presence,
            transports=self.transports,
            max_in_flight=self.max_in_flight,
            max_attempts=_first(own.max_attempts, self.max_attempts),
            ack_timeout_sec=ack_timeout_sec,
            result_timeout_sec=_first(own.result_timeout_sec, self.result_timeout_sec),
            max_run_sec=_first(own.max_run_sec, self.max_run_sec),
            backoff_base_sec=self.backoff_base_sec,
            backoff_factor=self.backoff_factor,
            backoff_cap_sec=self.backoff_cap_sec,
            late_answer_sec=_first(self.late_answer_sec, 2 * ack_timeout_sec),
            heartbeat_lease_sec=self.heartbeat_lease_sec,
            relay_lease_sec=self.relay_lease_sec,
            max_payload_bytes=self.max_payload_bytes,
            result_schema=own.result,
            speech=speech,
            answers_signed=self.answers_signed,
        )

    def default_ttl(self, command: str) -> int | None:
        """The default time to live in seconds; None means that the command never expires."""
        own = self.command(command).default_ttl_sec
        return self.default_ttl_sec if own is None else own

    def check_params(self, command: str, params: Any = UNSET) -> Any:
        """The checked parameters with the schema's defaults; absent means `{}`. Raises `BadParams`."""
        own = self.command(command)
        given = {} if params is UNSET else params
        if self.payload == "bare" and own.params is None and given != {}:
            raise BadParams("params", given, f"{command} takes none: its text is fixed; leave them out")
        if reason := unsignable(given):
            raise BadParams("params", given, reason)
        if not isinstance(given, dict):
            if self.any_params and own.validator is None:
                return given
            raise BadParams("params", given, "must be an object")
        filled = copy.deepcopy(own.defaults) | given
        if own.validator is not None:
            for error in own.validator.iter_errors(filled):
                raise bad_params(error, filled)
        return filled


def load_type(source: Path | str) -> DeviceType:
    """Reads and checks a device type from a file (`Path`) or TOML text (`str`). Raises `BadType`."""
    file = str(source) if isinstance(source, Path) else "(text)"
    try:
        text = source.read_text("utf-8-sig") if isinstance(source, Path) else source.removeprefix("\ufeff")
        table = toml.parse(text)
    except OSError as error:
        raise BadType(file, "", None, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadType(file, "", None, f"is not TOML: {error}") from error
    commands = table.pop("commands", {})
    if not isinstance(commands, dict):
        raise BadType(file, "commands", commands, "must be tables, [commands.<name>]")
    if "name" not in table:
        raise BadType(file, "name", None, "a device type needs a name")
    found = {name: _command(file, f"commands.{name}.", each, CommandType) for name, each in commands.items()}
    device_type = msgspec.structs.replace(_command(file, "", table, DeviceType), commands=found)
    for key, value, right in contradictions(device_type):
        raise BadType(file, key, value, right)
    return device_type


@cache
def shipped_types() -> dict[str, DeviceType]:
    """The device types that are part of Ordain, by name."""
    files = sorted((resources.files("devices") / "shipped").iterdir(), key=lambda file: file.name)
    types = [load_type(file.read_text("utf-8")) for file in files if file.name.endswith(".toml")]
    return {device_type.name: device_type for device_type in types}


def _own(suffix: str) -> str:
    """The pattern of a topic in Ordain's own layout."""
    return f"{{prefix}}/dev/{{hardware_id}}/{suffix}"


def _of_command(rule: Rule, wire: str) -> Rule:
    return rule if rule.topic is None else msgspec.structs.replace(rule, topic=with_command(rule.topic, wire))


def _names_itself(payload: PayloadFormat, speech: Speech | None) -> bool:
    """Whether the device gets what names the command and can give it back."""
    if speech is None or speech.template is None:
        return payload != "bare" and not (speech is not None and speech.rules and not _reads(speech, "id"))
    used = set(places(speech.template))
    by_id = "$id" in used and (not speech.rules or _reads(speech, "id"))
    return by_id or ("$number" in used and _reads(speech, "number"))


def _reads(speech: Speech, key: str) -> bool:
    return any(getattr(rule, key) is not None for rule in speech.rules)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _command(file: str, where: str, table: Any, kind: type[T]) -> T:
    """Like `_convert`; `answers` may be a list of rules."""
    if not isinstance(table, dict) or not isinstance(table.get("answers"), list):
        return _convert(file, where, table, kind)
    rules = [_convert(file, f"{where}answers[{n}].", rule, Rule) for n, rule in enumerate(table["answers"])]
    rest = {key: value for key, value in table.items() if key != "answers"}
    return msgspec.structs.replace(_convert(file, where, rest, kind), rules=tuple(rules))


def _convert(file: str, where: str, table: Any, kind: type[T]) -> T:
    """Converts a TOML table to a Struct. An error names the wrong key, its value and a correct value."""
    known = kind.__struct_fields__
    for key, value in table.items() if isinstance(table, dict) else ():
        if key not in known:
            raise BadType(file, where + key, value, f"unknown key; the known keys are: {', '.join(known)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadType(file, where + key, value, "must be a finite number")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        right, _, path = str(error).partition(" - at `")
        key = path.removeprefix("$.").removeprefix("$").removesuffix("`").partition("[")[0]
        value = table.get(key) if isinstance(table, dict) else table
        right = reason(kind, path.removeprefix("$").removesuffix("`"), right)
        raise BadType(file, (where + key).removesuffix("."), value, right) from error
