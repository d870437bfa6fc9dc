"""The payloads and topics between broker and device: commands out, answers and statuses in.

Pure, and used by both sides. Decoding a device's payload returns an `Answer` or raises `Malformed`. It must
never raise another exception, for any bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from devices.clock import parse_rfc3339
from devices.names import is_name
from devices.schema import not_json
from devices.speech.messages import message_of, text_of
from devices.speech.numbers import too_hard
from devices.speech.signing import looks_signed, unverified
from devices.speech.templates import Facts, Missing
from devices.types import AnswerStatus, Definition, PayloadFormat

MAX_ANSWER_BYTES = 65_536
# The first byte of a msgpack map. JSON and bare texts never begin with one of these.
MAP_BYTES = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})
MAX_SESSION_BYTES = 128
_SPACE = b" \t\r\n\v\f"
S = TypeVar("S")
T = TypeVar("T")


class Malformed(Exception):
    """The other side sent a payload that cannot be decoded."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Unsendable(Exception):
    """The command can never be sent with this device type. The broker fails it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class CommandMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A command as a `json` or `msgpack` device receives it. Unknown fields are ignored."""

    id: Annotated[str, Meta(description="The same at every attempt. Do not execute a known id again.")]
    type: str
    params: Any = msgspec.field(default_factory=dict)
    attempt: Annotated[int, Meta(ge=1)] = 1
    expires_at: Annotated[str | None, Meta(description="RFC 3339; null: never.")] = None
    grant: Annotated[
        str | None, Meta(description="JWT for this device, command and parameters; its claims: `Grant`.")
    ] = None


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    percent: Annotated[int, Meta(ge=0, le=100)] | Annotated[float, Meta(ge=0, le=100)]
    note: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A device's answer about one command. `result` and `error` are normalised. `at`: the device's clock.

    `unfit`: names of parts that cannot be used and were left out. They only inform, so the answer counts.
    `seq`: in a signed report of progress, greater than in the one before. `token`: the JWS that it came in;
    nothing of it is verified yet.
    """

    id: str | None = None
    status: AnswerStatus
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    progress: Progress | None = None
    at: str | None = None
    unfit: tuple[str, ...] = ()
    seq: int | None = None
    token: str | None = None


class AnswerMessage(msgspec.Struct):
    """A device's answer about one command, as received. `result` and `error` may have any shape."""

    status: AnswerStatus
    id: Annotated[
        str | None, Meta(description="The command's id. Without it, the Correlation Data is used.")
    ] = None
    result: Annotated[Any, Meta(description="For `executed`.")] = None
    error: Annotated[Any, Meta(description="For `failed`: `{code, message, details?}`, or a text.")] = None
    progress: Annotated[Progress | None, Meta(description="For `progress`.")] = None
    at: Annotated[str | None, Meta(description="The device's own clock, RFC 3339.")] = None


class StatusMessage(msgspec.Struct):
    """Whether a device is online. The broker ignores the last will of an older session."""

    status: Annotated[str, Meta(description="`online` or `offline`.")]
    session: str | None = None


class Status(NamedTuple):
    """A status message, decoded. `unfit`: names of parts that cannot be used and were left out."""

    online: bool
    session: str | None = None
    unfit: tuple[str, ...] = ()


class _Said(msgspec.Struct):
    """An `AnswerMessage` whose parts that only inform are not decoded yet."""

    status: AnswerStatus
    id: str | None = None
    result: Any = None
    error: Any = None
    progress: msgspec.Raw = msgspec.Raw(b"")
    at: msgspec.Raw = msgspec.Raw(b"")


class _SaidStatus(msgspec.Struct):
    """A `StatusMessage` whose session is not decoded yet."""

    status: str
    session: msgspec.Raw = msgspec.Raw(b"")


Decoder = msgspec.json.Decoder[S] | msgspec.msgpack.Decoder[S]
_ANSWERS = msgspec.json.Decoder(_Said)
_PACKED_ANSWERS = msgspec.msgpack.Decoder(_Said)
_COMMANDS = msgspec.json.Decoder(CommandMessage)
_PACKED_COMMANDS = msgspec.msgpack.Decoder(CommandMessage)
_STATUSES = msgspec.json.Decoder(_SaidStatus)


def encode_command(
    definition: Definition,
    *,
    command_id: str,
    command: str,
    params: Any,
    attempt: int,
    expires_at: str | None,
    grant: str | None,
    number: int | None = None,
    reply_topic: str | None = None,
) -> bytes:
    """The payload of one attempt. For a `bare` device it is only the text.

    Raises:
        Unsendable: there is no text, the parameters cannot be encoded, or the payload is too large.
    """
    speech = definition.speech
    wire_name = command if speech is None or speech.wire_name is None else speech.wire_name
    given = msgspec.json.decode(params) if speech is not None and isinstance(params, msgspec.Raw) else params
    facts = Facts(command_id, number, wire_name, given, attempt, expires_at, grant, reply_topic)
    try:
        if definition.payload == "bare":
            if definition.text is None:
                raise Unsendable(f"{definition.device_type} has no text for {definition.command}")
            text = definition.text if speech is None else text_of(speech, definition.text, facts)
            payload = text.encode()
        elif speech is not None and speech.template is not None:
            payload = _encode(message_of(speech, facts), definition.payload)
        else:
            message = CommandMessage(
                id=command_id,
                type=wire_name,
                params=params,
                attempt=attempt,
                expires_at=expires_at,
                grant=grant,
            )
            payload = _encode(message, definition.payload)
    except Missing as error:
        raise Unsendable(str(error)) from error
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise Unsendable(f"the parameters cannot be written as {definition.payload}: {error}") from error
    if len(payload) > definition.max_payload_bytes:
        limit = definition.max_payload_bytes
        raise Unsendable(
            f"the payload has {len(payload)} bytes, {definition.device_type} allows at most {limit}"
        )
    return payload


def decode_command(payload: bytes) -> CommandMessage:
    """Decodes a command on the device, from JSON or msgpack.

    Raises:
        Malformed: it cannot be decoded.
    """
    packed = _is_map(payload)
    message = _decode(_PACKED_COMMANDS, payload) if packed else _decode(_COMMANDS, payload)
    if not is_name(message.id) or not is_name(message.type):
        raise Malformed("id and type must be identifiers")
    _check_time("expires_at", message.expires_at)
    _check_value(message.params)
    return message


def encode_answer(answer: Answer, payload: PayloadFormat = "json") -> bytes:
    return _encode(answer, payload)


def decode_answer(payload: bytes, correlation: bytes | None, answers: Mapping[str, AnswerStatus]) -> Answer:
    """Decodes an answer from JSON, msgpack, a JWS or a bare text of `answers`.

    The command id is the answer's `id`, else `correlation`, else None. In a JWS it is the `id` only.

    Raises:
        Malformed: it cannot be decoded. No other exception is raised.
    """
    if len(payload) > MAX_ANSWER_BYTES:
        raise Malformed(f"the answer has {len(payload)} bytes, at most {MAX_ANSWER_BYTES} are allowed")
    if (fault := too_hard(payload)) is not None:
        raise Malformed(fault)
    trimmed, packed = _trimmed(payload), _is_map(payload)
    if looks_signed(trimmed):
        return _signed_answer(trimmed.decode("ascii", "replace"))
    word = bare_word(payload)
    if word is not None:
        return _bare_answer(word, correlation, answers)
    said = _decode_map(payload) if packed else _decode(_ANSWERS, trimmed)
    _check_value(said.result)
    _check_value(said.error)
    unfit = []
    at = _informs(said.at, str, packed)
    try:
        _check_time("at", at or None)
    except Malformed:
        at = msgspec.UNSET
    if at is msgspec.UNSET:
        unfit.append("at")
    progress = _informs(said.progress, Progress, packed)
    if said.status == "progress" and not isinstance(progress, Progress):
        raise Malformed("progress without a percentage from 0 to 100")
    if progress is msgspec.UNSET:
        unfit.append("progress")
    return Answer(
        id=_named(said.id, correlation),
        status=said.status,
        result=as_result(said.result) if said.status == "executed" else None,
        error=as_error(said.error) if said.status == "failed" else None,
        progress=progress if said.status == "progress" else None,  # type: ignore[arg-type]
        at=at or None,
        unfit=tuple(unfit),
    )


def bare_word(payload: bytes) -> str | None:
    """The text of an answer that is neither JSON nor msgpack nor a JWS, else None."""
    if payload.startswith(b"{") or (text := _trimmed(payload)).startswith(b"{"):
        return None
    return None if _is_map(payload) or looks_signed(text) else text.decode(errors="replace")


def _signed_answer(token: str) -> Answer:
    """The answer in a JWS. It names its command itself, because the signature covers nothing else."""
    try:
        text, seq = unverified(token)
    except ValueError as error:
        raise Malformed(f"not a signed answer: {error}") from error
    answer = decode_answer(text, None, {})
    if answer.id is None:
        raise Malformed("a signed answer needs the id of its command")
    if answer.status == "progress" and seq is None:
        raise Malformed("signed progress needs `seq`, so that it cannot be repeated later")
    return msgspec.structs.replace(answer, token=token, seq=seq)


def as_result(result: Any) -> dict[str, Any] | None:
    """The recorded form of a result: an object, or `{"value": …}`, or None if it is absent or null."""
    return result if result is None or isinstance(result, dict) else {"value": result}


def as_error(error: Any) -> dict[str, Any]:
    """The recorded form of an error: `code` and `message`, and `details` if the device sent them."""
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


def decode_status(payload: bytes) -> Status:
    """Decodes a status message, bare `online` or `offline` or JSON.

    Raises:
        Malformed: it cannot be decoded.
    """
    text = _trimmed(payload)
    session: Any = None
    if text.startswith(b"{"):
        said = _decode(_STATUSES, text)
        word, session = said.status, _informs(said.session, str, packed=False)
    else:
        word = _text(text)
    if word not in ("online", "offline"):
        raise Malformed(f"neither online nor offline: {word[:32]!r}")
    if session is msgspec.UNSET or len((session or "").encode()) > MAX_SESSION_BYTES:
        return Status(word == "online", None, ("session",))
    return Status(word == "online", session)


def encode_status(online: bool, session: str) -> bytes:
    return msgspec.json.encode(StatusMessage(status="online" if online else "offline", session=session))


def _bare_answer(word: str, correlation: bytes | None, answers: Mapping[str, AnswerStatus]) -> Answer:
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


def _informs(raw: msgspec.Raw, wanted: type[T], packed: bool) -> T | msgspec.UnsetType | None:
    """The decoded value of a part that only informs; None if it is absent or null; UNSET if it is unfit."""
    if not bytes(raw):
        return None
    decode = msgspec.msgpack.decode if packed else msgspec.json.decode
    try:
        return decode(raw, type=wanted | None)
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError):
        return msgspec.UNSET


def _trimmed(payload: bytes) -> bytes:
    """Without white space around it and without the NUL bytes that C programs append."""
    return payload.rstrip(_SPACE + b"\0").lstrip(_SPACE)


def _decode_map(payload: bytes) -> _Said:
    """A msgpack map may end with bytes that look like white space: those are cut off only if they must be."""
    try:
        return _decode(_PACKED_ANSWERS, payload)
    except Malformed:
        trimmed = payload.rstrip(_SPACE + b"\0")
        if trimmed == payload:
            raise
        return _decode(_PACKED_ANSWERS, trimmed)


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None


def _is_map(payload: bytes) -> bool:
    return payload[:1] != b"" and payload[0] in MAP_BYTES


def _encode(message: Any, payload: PayloadFormat) -> bytes:
    """Encodes msgpack from the decoded JSON, so that both formats contain only JSON types."""
    text = msgspec.json.encode(message)
    return msgspec.msgpack.encode(msgspec.json.decode(text)) if payload == "msgpack" else text


def _decode(decoder: Decoder[S], payload: bytes) -> S:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
        raise Malformed(str(error)) from error
    except RecursionError as error:
        raise Malformed("nested too deeply") from error


def _check_value(value: Any) -> None:
    if (fault := not_json(value)) is not None:
        raise Malformed(fault)
