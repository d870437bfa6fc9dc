"""Whether a broker could have recorded a row of a log to import: what every other door refuses is refused.

The hashes of a file only show that nobody has changed it since it was written. They do not show who wrote it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import msgspec
from msgspec import UNSET

from broker.domain.errors import Refusal
from broker.domain.events import Changed, Created, Defined, Event, Registered, TokenRotated, subject_kind
from broker.engine.ids import check_answer_key
from broker.engine.registry import MQTT_USERS
from broker.log import sqlite as log
from broker.log.chain import Row
from devices.names import is_name
from devices.types import Definition

LAST_TIME = 253_402_300_799_999  # the end of the year 9999, in ms: later times cannot be shown
LONGEST_NAME = 200  # of a device, for people
NAME_RULE = "is no identifier: it must match [A-Za-z0-9][A-Za-z0-9_-]{0,63}"
# As `token_digest` makes it: it is written into the password file of a Mosquitto, and its rounds cost time.
TOKEN_DIGEST = re.compile(r"\$7\$1\$[A-Za-z0-9+/]{16}\$[A-Za-z0-9+/]{86}==")
Fault = tuple[str, object, str]  # field, value, what is wrong with it


def unfit(row: Row) -> str | None:
    """Why a broker could not have recorded this row; None if it could."""
    event: Event | None = None
    if row.data is not None:
        try:
            event = log.recorded(row).event
        except (ValueError, TypeError) as error:
            return f"it is no event of a log: {error}"
    for field, value, fault in _faults(row, event):
        shown = repr(value[:64]) if isinstance(value, str) else value
        return f"{field} = {shown} {fault}"
    return None


def _faults(row: Row, event: Event | None) -> Iterator[Fault]:
    names = {"project": row.project or None, "device_id": row.device_id}
    if subject_kind(row.stream) != "broker":
        names["stream"] = row.stream.removeprefix("device/")
    times: dict[str, int | None] = {"recorded_at": row.recorded_at, "decided_at": row.decided}
    match event:
        case Created():
            for field in ("type", "hardware_id", "device_type", "retry_of", "collapse_key"):
                names[field] = getattr(event, field)
            times |= {"expires_at": event.expires_at, "ttl_ms": event.ttl_ms}
            if not event.topic or any(char in event.topic for char in "+#\0"):
                yield "topic", event.topic, "is no topic to publish on"
        case Registered():
            names |= {"hardware_id": event.hardware_id, "device_type": event.device_type}
            if event.hardware_id in MQTT_USERS:
                yield "hardware_id", event.hardware_id, "is a reserved MQTT user name"
        case Changed(device_type=str()):
            names["device_type"] = str(event.device_type)
        case Defined() if _digest(event.definition) != row.stream.removeprefix("type/"):
            yield "stream", row.stream, "is not the digest of its definition"
        case Defined():
            yield from _definition_faults(event)
        case _:
            pass
    if isinstance(event, Registered | Changed):
        names["gateway"] = None if event.gateway is UNSET else event.gateway
        yield from _device_faults(event)
    if isinstance(event, Registered | TokenRotated) and not TOKEN_DIGEST.fullmatch(event.token_digest):
        yield "token_digest", event.token_digest, "is no digest of a token"
    for field, name in names.items():
        if name is not None and not is_name(name):
            yield field, name, NAME_RULE
    for field, time in times.items():
        if time is not None and not 0 <= time <= LAST_TIME:
            yield field, time, "is not in the years 1970 to 9999"


def _device_faults(event: Registered | Changed) -> Iterator[Fault]:
    if isinstance(event.name, str) and len(event.name) > LONGEST_NAME:
        yield "name", event.name, f"has more than {LONGEST_NAME} characters"
    try:
        check_answer_key(None if event.answer_key is UNSET else event.answer_key)
    except Refusal as refused:
        yield "answer_key", event.answer_key, str(refused)


def _definition_faults(event: Defined) -> Iterator[Fault]:
    try:
        msgspec.convert(event.definition, Definition)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        yield "definition", msgspec.json.encode(event.definition).decode(), f"is none: {error}"


def _digest(definition: dict[str, object]) -> str:
    return hashlib.sha256(msgspec.json.encode(definition, order="sorted")).hexdigest()[:32]
