"""Device types: how to talk to one kind of device, and when a command to it is finished.

A `DeviceType` is read from TOML (one file per type) and checked completely at start. A `Definition` has all
that is needed to deliver one command and to understand its answers. It is a plain value in the log, so a
later change of the type does not affect commands that were already accepted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jsonschema_rs
import msgspec
from msgspec import UNSET, Meta

from devices import toml
from devices.allowed import reason
from devices.names import is_name
from devices.schema import MAX_DEPTH as MAX_DEPTH
from devices.schema import MAX_SIGNED_INTEGER as MAX_SIGNED_INTEGER
from devices.schema import BadParams as BadParams
from devices.schema import bad_params, compiled, misfit, no_schema, unsignable

PayloadFormat = Literal["bare", "json", "msgpack"]
AnswerStatus = Literal["acknowledged", "executed", "failed", "progress"]
Transport = Literal["mqtt", "heartbeat", "relay"]
CompletesOn = Literal["executed", "published"]
GrantAlgorithm = Literal["EdDSA", "HS256"]

Ttl = Annotated[int, Meta(ge=1, le=31_536_000)]
Seconds = Annotated[float, Meta(ge=0.05, le=31_536_000)]
Count = Annotated[int, Meta(ge=1, le=1_000)]
T = TypeVar("T", bound=msgspec.Struct)

MAX_SUFFIX_LEVELS = 4
_SUFFIX_RULE = f"one to {MAX_SUFFIX_LEVELS} topic levels, each an identifier, and not `status`"
ANY = "*"
_NAME_RULE = "must match [A-Za-z0-9][A-Za-z0-9_-]{0,63} and not be `me` or `pending`"


class Definition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command of one device type, with all defaults filled in. Times in seconds.

    `command` is `*` for all commands that an open type does not list.

    `text` is the fixed payload of a `bare` command. `answers` maps a bare answer to its status.
    `carries_ids`: the device receives the command's id and can return it in its answer.
    """

    device_type: str
    command: str
    payload: PayloadFormat = "json"
    text: str | None = None
    command_suffix: str = "rls"
    answer_suffix: str = "ack"
    answers: dict[str, AnswerStatus] = {}
    carries_ids: bool = True
    carries_grant: bool = True
    completes_on: Literal["executed", "published"] = "executed"
    repeatable: bool = True
    presence: Literal["required", "none"] = "required"
    transports: tuple[Transport, ...] = ("mqtt",)
    max_in_flight: int = 1
    max_attempts: int = 5
    ack_timeout_sec: float = 10
    result_timeout_sec: float = 60
    max_run_sec: float = 86_400
    backoff_base_sec: float = 5
    backoff_factor: float = 2
    backoff_cap_sec: float = 300
    late_answer_sec: float = 20
    heartbeat_lease_sec: float = 60
    relay_lease_sec: float = 60
    max_payload_bytes: int = 65_536
    # Added later: older definitions in existing logs lack these fields, so each needs a default.
    grant_algorithm: GrantAlgorithm = "EdDSA"
    result_schema: dict[str, Any] | None = None

    def result_fault(self, result: dict[str, Any] | None) -> str | None:
        """Why a recorded result does not match the command's result schema; None if it matches."""
        return misfit(self.result_schema, result)


class UnknownCommand(Exception):
    """The device type has no such command. The caller must correct the name."""

    def __init__(self, device_type: str, command: str, known: tuple[str, ...]) -> None:
        self.device_type, self.command, self.known = device_type, command, known
        names = ", ".join(known) or "any valid name"
        super().__init__(f"{device_type} has no command {command!r:.80}; it has: {names}")


class BadType(Exception):
    """A device type file is wrong. Its author must correct it."""

    def __init__(self, file: str, key: str, value: Any, right: str) -> None:
        self.file, self.key, self.value, self.right = file, key, value, right
        super().__init__(f"{file}: {key} = {value!r:.120}: {right}")


class CommandType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """One command as the type's file declares it. A field that is None takes the type's value."""

    title: str | None = None
    text: str | None = None
    command_suffix: str | None = None
    params: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    answers: dict[str, AnswerStatus] | None = None
    repeatable: bool | None = None
    default_ttl_sec: Ttl | None = None
    completes_on: CompletesOn | None = None
    max_attempts: Count | None = None
    ack_timeout_sec: Seconds | None = None
    result_timeout_sec: Seconds | None = None
    max_run_sec: Seconds | None = None

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

    `grants`: the algorithm that signs grants, or "none" if commands carry no grant.
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
    completes_on: CompletesOn = "executed"
    repeatable: bool | None = None
    presence: Literal["required", "none"] = "required"
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
        carries_ids = _first(self.carries_ids, self.payload != "bare")
        ack_timeout_sec = _first(own.ack_timeout_sec, self.ack_timeout_sec)
        grants = _first(self.grants, "none" if self.payload == "bare" else "EdDSA")
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
            repeatable=_first(own.repeatable, self.repeatable, carries_ids),
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
        )

    def default_ttl(self, command: str) -> int | None:
        """The default time to live in seconds; None means that the command never expires."""
        own = self.command(command).default_ttl_sec
        return self.default_ttl_sec if own is None else own

    def check_params(self, command: str, params: Any = UNSET) -> Any:
        """The checked parameters with the schema's defaults; absent means `{}`. Raises `BadParams`."""
        own = self.command(command)
        given = {} if params is UNSET else params
        if self.payload == "bare" and given != {}:
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
    except (OSError, ValueError) as error:
        raise BadType(file, "(file)", None, f"cannot be read as TOML: {error}") from error
    commands = table.pop("commands", {})
    if not isinstance(commands, dict):
        raise BadType(file, "commands", commands, "must be tables, [commands.<name>]")
    if "name" not in table:
        raise BadType(file, "name", None, "a device type needs a name")
    declared = {
        name: _convert(file, f"commands.{name}.", command, CommandType) for name, command in commands.items()
    }
    device_type = msgspec.structs.replace(_convert(file, "", table, DeviceType), commands=declared)
    for key, value, right in _contradictions(device_type):
        raise BadType(file, key, value, right)
    return device_type


@cache
def shipped_types() -> dict[str, DeviceType]:
    """The device types that are part of Ordain, by name."""
    files = sorted((resources.files("devices") / "shipped").iterdir(), key=lambda file: file.name)
    types = [load_type(file.read_text("utf-8")) for file in files if file.name.endswith(".toml")]
    return {device_type.name: device_type for device_type in types}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


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


def _contradictions(device_type: DeviceType) -> Iterator[tuple[str, Any, str]]:
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
    if t.max_in_flight > 1 and not _first(t.carries_ids, not bare):
        yield "max_in_flight", t.max_in_flight, "must be 1 without ids: the answers name no command"
    if not t.transports or len(set(t.transports)) < len(t.transports):
        yield "transports", t.transports, "must have at least one transport, each only once"
    if t.backoff_cap_sec < t.backoff_base_sec:
        yield "backoff_cap_sec", t.backoff_cap_sec, f"at least backoff_base_sec ({t.backoff_base_sec})"
    yield from _wrong_answers("", t.answers)
    if t.open:
        yield from _wrong_end("", t.completes_on, t)
    said: dict[tuple[str, str], str] = {}
    for name, command in t.commands.items():
        yield from _wrong_command(name, command, t)
        words = command.command_suffix or t.command_suffix, command.text or ""
        if bare and words in said:
            yield f"commands.{name}.text", command.text, f"on this suffix it already means {said[words]}"
        said[words] = name


def _wrong_command(name: str, command: CommandType, t: DeviceType) -> Iterator[tuple[str, Any, str]]:
    where = f"commands.{name}."
    if not is_name(name):
        yield f"commands.{name}", command.title, _NAME_RULE
    if t.payload == "bare" and not command.text:
        yield where + "text", command.text, "a bare command needs the text that is sent for it"
    if t.payload != "bare" and command.text is not None:
        yield where + "text", command.text, "only commands of bare types have a text"
    if len((command.text or "").encode()) > t.max_payload_bytes:
        yield where + "text", command.text, f"must not exceed max_payload_bytes ({t.max_payload_bytes})"
    if t.payload == "bare" and command.params is not None:
        yield where + "params", command.params, "a bare payload has no place for parameters"
    yield from _wrong_suffixes(where, command.command_suffix or t.command_suffix, t)
    yield from _wrong_end(where, command.completes_on or t.completes_on, t)
    yield from _wrong_answers(where, command.answers or {})
    if command.params is not None:
        yield from _wrong_schema(where + "params", command, command.params)
    if command.result is not None:
        yield from no_schema(where + "result", command.result)


def _wrong_end(where: str, completes_on: CompletesOn, t: DeviceType) -> Iterator[tuple[str, Any, str]]:
    if completes_on == "published" and t.presence == "none":
        right = 'needs presence = "required": else a device that never connected silently loses it'
        yield where + "completes_on", completes_on, right
    if completes_on == "published" and t.transports != ("mqtt",):
        yield where + "completes_on", completes_on, 'needs transports = ["mqtt"]: only MQTT has a PUBACK'


def _wrong_answers(where: str, answers: dict[str, AnswerStatus]) -> Iterator[tuple[str, Any, str]]:
    for text, status in answers.items():
        if not text or text != text.strip() or text[0] == "{" or text.encode()[0] in (0xDE, 0xDF):
            right = "must not be empty, have spaces around it, or begin as JSON or msgpack do"
            yield f"{where}answers.{text}", status, right
        if status == "progress":
            yield f"{where}answers.{text}", status, "a bare text has no place for a percentage"


def _wrong_schema(where: str, command: CommandType, schema: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    wrong_schema = list(no_schema(where, schema))
    yield from wrong_schema
    if wrong_schema or command.validator is None:
        return
    for key, value in command.defaults.items():
        for wrong in command.validator.iter_errors({key: value}):
            if wrong.instance_path[:1] == [key]:
                right = f"the default does not match its own schema: {wrong.message}"
                yield f"{where}.properties.{key}.default", value, right


def _wrong_suffixes(where: str, suffix: str, t: DeviceType) -> Iterator[tuple[str, Any, str]]:
    if not _is_suffix(suffix) or suffix == t.answer_suffix:
        yield where + "command_suffix", suffix, f"must be {_SUFFIX_RULE} or the answer suffix"


def _is_suffix(text: str) -> bool:
    levels = text.split("/")
    return text != "status" and len(levels) <= MAX_SUFFIX_LEVELS and all(map(is_name, levels))
