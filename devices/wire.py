"""The bytes and topics between broker and device: commands out, answers and statuses in.

Pure, and used by both sides. Whatever a device sends either becomes an `Answer` or raises
`Malformed`; it must never raise anything else, whatever the bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from devices.clock import parse_rfc3339
from devices.names import is_name
from devices.types import MAX_DEPTH, AnswerStatus, Definition

MAX_ANSWER_BYTES = 65_536
S = TypeVar("S")


class Malformed(Exception):
    """The other side sent what cannot be understood."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Unsendable(Exception):
    """The command can never be sent as its device type says. Ours to answer for."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class CommandMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A command as a `json` device receives it; unknown fields are ignored."""

    id: str
    type: str
    params: Any = msgspec.field(default_factory=dict)
    attempt: Annotated[int, Meta(ge=1)] = 1
    expires_at: str | None = None
    grant: str | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    percent: Annotated[int, Meta(ge=0, le=100)] | Annotated[float, Meta(ge=0, le=100)]
    note: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a device says about one command. `result` and `error` are normalised; `at` is its own clock."""

    id: str | None = None
    status: AnswerStatus
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    progress: Progress | None = None
    at: str | None = None


class _Said(msgspec.Struct):
    """An answer before normalisation: the only place where its JSON may still have any shape."""

    status: AnswerStatus
    id: str | None = None
    result: Any = None
    error: Any = None
    progress: Progress | None = None
    at: str | None = None


class _Status(msgspec.Struct):
    status: str
    session: str | None = None


_ANSWERS = msgspec.json.Decoder(_Said)
_COMMANDS = msgspec.json.Decoder(CommandMessage)
_STATUSES = msgspec.json.Decoder(_Status)


def encode_command(
    definition: Definition,
    *,
    command_id: str,
    params: Any,
    attempt: int,
    expires_at: str | None,
    grant: str | None,
) -> bytes:
    """The payload of one attempt; a `bare` device gets its fixed text and nothing else."""
    if definition.payload == "bare":
        if definition.text is None:
            raise Unsendable(f"{definition.device_type} has no text for {definition.command}")
        payload = definition.text.encode()
    else:
        message = CommandMessage(
            id=command_id,
            type=definition.command,
            params=params,
            attempt=attempt,
            expires_at=expires_at,
            grant=grant,
        )
        try:
            payload = msgspec.json.encode(message)
        except (TypeError, ValueError, RecursionError) as error:
            raise Unsendable(f"the parameters cannot be written as JSON: {error}") from error
    if len(payload) > definition.max_payload_bytes:
        limit = definition.max_payload_bytes
        raise Unsendable(f"payload of {len(payload)} bytes, {definition.device_type} takes {limit}")
    return payload


def decode_command(payload: bytes) -> CommandMessage:
    """The device's reading of a command; raises `Malformed`."""
    message = _decode(_COMMANDS, payload)
    if not is_name(message.id) or not is_name(message.type):
        raise Malformed("id and type must be identifiers")
    _check_time("expires_at", message.expires_at)
    if _deeper_than(message.params, MAX_DEPTH):
        raise Malformed(f"params nested deeper than {MAX_DEPTH} levels")
    return message


def encode_answer(answer: Answer) -> bytes:
    return msgspec.json.encode(answer)


def decode_answer(payload: bytes, correlation: bytes | None, answers: Mapping[str, AnswerStatus]) -> Answer:
    """An answer from JSON or from a bare text of `answers`; raises `Malformed` and nothing else.

    The command is named by `id`, else by `correlation`, else by nobody (`id` is None).
    """
    if len(payload) > MAX_ANSWER_BYTES:
        raise Malformed(f"answer of {len(payload)} bytes, at most {MAX_ANSWER_BYTES}")
    text = payload.strip()
    if not text.startswith(b"{"):
        return _bare_answer(text, correlation, answers)
    said = _decode(_ANSWERS, text)
    _check_time("at", said.at)
    if said.status == "progress" and said.progress is None:
        raise Malformed("progress without a percentage")
    if _deeper_than((said.result, said.error), MAX_DEPTH + 1):
        raise Malformed(f"nested deeper than {MAX_DEPTH} levels")
    return Answer(
        id=_named(said.id, correlation),
        status=said.status,
        result=as_result(said.result) if said.status == "executed" else None,
        error=as_error(said.error) if said.status == "failed" else None,
        progress=said.progress if said.status == "progress" else None,
        at=said.at,
    )


def as_result(result: Any) -> dict[str, Any] | None:
    """A result as it is recorded: an object, or `{"value": …}`, or None if there is none (or null)."""
    return result if result is None or isinstance(result, dict) else {"value": result}


def as_error(error: Any) -> dict[str, Any]:
    """An error as it is recorded: always `code` and `message`, and `details` where the device gave some."""
    if isinstance(error, dict):
        code, message = error.get("code"), error.get("message")
        kept = {
            "code": code if isinstance(code, str) and code else "device_error",
            "message": message if isinstance(message, str) else "",
        }
        return kept | ({"details": error["details"]} if error.get("details") is not None else {})
    if error is None:
        return {"code": "device_error", "message": "the device gave no reason"}
    text = error if isinstance(error, str) else msgspec.json.encode(error).decode()
    return {"code": "device_error", "message": text}


def decode_status(payload: bytes) -> tuple[bool, str | None]:
    """(online, session) of a status message: bare `online` or `offline`, or JSON; raises `Malformed`."""
    text = payload.strip()
    if text.startswith(b"{"):
        said = _decode(_STATUSES, text)
        word, session = said.status, said.session
    else:
        word, session = _text(text), None
    if word not in ("online", "offline"):
        raise Malformed(f"neither online nor offline: {word[:32]!r}")
    return word == "online", session


def encode_status(online: bool, session: str) -> bytes:
    return msgspec.json.encode(_Status(status="online" if online else "offline", session=session))


def command_topic(prefix: str, hardware_id: str, definition: Definition) -> str:
    return device_topic(prefix, hardware_id, definition.command_suffix)


def answer_topic(prefix: str, hardware_id: str, definition: Definition) -> str:
    return device_topic(prefix, hardware_id, definition.answer_suffix)


def status_topic(prefix: str, hardware_id: str) -> str:
    return device_topic(prefix, hardware_id, "status")


def device_topic(prefix: str, hardware_id: str, suffix: str) -> str:
    return f"{prefix}/dev/{hardware_id}/{suffix}"


def parse_topic(prefix: str, topic: str) -> tuple[str, str] | None:
    """(hardware_id, suffix) of a device's topic, or None if it is not one."""
    start = f"{prefix}/dev/"
    if not topic.startswith(start):
        return None
    hardware_id, _, suffix = topic[len(start) :].partition("/")
    return (hardware_id, suffix) if is_name(hardware_id) and is_name(suffix) else None


def _bare_answer(text: bytes, correlation: bytes | None, answers: Mapping[str, AnswerStatus]) -> Answer:
    word = _text(text)
    status = answers.get(word)
    if status is None:
        raise Malformed(f"neither a JSON object nor an answer of this device type: {word[:32]!r}")
    if status == "progress":
        raise Malformed("progress without a percentage")
    error = as_error(word) if status == "failed" else None
    return Answer(id=_named(None, correlation), status=status, error=error)


def _named(given: str | None, correlation: bytes | None) -> str | None:
    name = given if given is not None or correlation is None else _text(correlation)
    if name is not None and not is_name(name):
        raise Malformed(f"not a command id: {name[:64]!r}")
    return name


def _check_time(field: str, text: str | None) -> None:
    try:
        if text is not None:
            parse_rfc3339(text)
    except ValueError as error:
        raise Malformed(f"{field}: {error}") from error


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None


def _decode(decoder: msgspec.json.Decoder[S], payload: bytes) -> S:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, ValueError) as error:
        raise Malformed(str(error)) from error
    except RecursionError as error:
        raise Malformed("nested too deeply") from error


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(item, levels - 1) for item in items)
