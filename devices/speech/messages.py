"""Between bytes and values: a device's message decoded for rules, and the payload of one attempt."""

from __future__ import annotations

from typing import Any

import msgspec

from devices.schema import not_json
from devices.speech.numbers import too_hard
from devices.speech.rules import Decoded
from devices.speech.speech import Query, Speech
from devices.speech.templates import Facts, filled, filled_text

MAX_BYTES = 65_536
_SPACE = b" \t\r\n\v\f"
# The first byte of a msgpack map or array. JSON and texts never begin with one of these.
_PACKED = frozenset({*range(0x80, 0xA0), *range(0xDC, 0xE0)})


class Unreadable(Exception):
    """The message cannot be decoded. The message of the exception says why."""


def decoded(payload: bytes) -> Decoded:
    """The message as a value: JSON or msgpack, else a text. White space and NUL around it are left out.

    Raises:
        Unreadable: it is too large, not UTF-8, or has values that JSON does not have.
    """
    if len(payload) > MAX_BYTES:
        raise Unreadable(f"the message has {len(payload)} bytes, at most {MAX_BYTES} are allowed")
    if (fault := too_hard(payload)) is not None:
        raise Unreadable(fault)
    try:
        if payload[:1] and payload[0] in _PACKED:
            value, text = msgspec.msgpack.decode(payload), None
        else:
            text = payload.rstrip(_SPACE + b"\0").lstrip(_SPACE).decode()
            value = _parsed(text)
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8") from None
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Unreadable(str(error) or "nested too deeply") from error
    if (fault := not_json(value)) is not None:
        raise Unreadable(fault)
    return Decoded(value, text)


def _parsed(text: str) -> Any:
    """JSON, else the text itself. What begins as a JSON object or array must be one."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        if text[:1] in ("{", "["):
            raise
        return text


def message_of(speech: Speech, facts: Facts) -> Any:
    """The value that the template makes for one attempt."""
    return filled(speech.template, facts)


def text_of(speech: Speech, text: str, facts: Facts) -> str:
    """The text of one attempt of a `bare` command.

    Raises:
        Missing: a parameter that the text needs is absent.
    """
    return filled_text(text, facts.params, speech.kinds)


def query_payload(query: Query, command_id: str, wire_name: str, reply_topic: str | None) -> bytes:
    """The payload of a query."""
    if query.text is not None:
        return query.text.encode()
    facts = Facts(command_id, None, wire_name, {}, 0, None, None, reply_topic)
    return msgspec.json.encode(filled(query.template, facts))
