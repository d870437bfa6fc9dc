"""Every event Ordain has ever recorded, and the envelope it is kept in.

Pure. An event is a fact that was durable before anything followed from it. Fields may be added with
a default, never changed or removed: logs of every past release are read by this module for ever.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Transport = Literal["mqtt", "heartbeat", "relay"]
Evidence = Literal[
    "accepted",
    "handed_over",
    "device_ack",
    "device_result",
    "inferred",
    "relay_report",
    "mqtt_puback",
    "mqtt_refused",
    "timer",
    "operator",
    "broker",
]
TimeoutReason = Literal["no_answer", "no_result", "ttl", "unsendable", "device_deleted", "operator"]

SYSTEM = "system"
ERASURES = "erasures"


class Error(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Why a command failed: `code` for programs, `message` for people, `details` as the device gave them."""

    code: str
    message: str
    details: Any = None


# --- of a command: stream = the command's id ---------------------------------------------------


class Created(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The request was accepted. `definition` is the digest of what the device type said then; times in ms."""

    hardware_id: str
    type: str
    device_type: str
    definition: str
    topic: str
    params: msgspec.Raw
    expires_at: int | None = None
    ttl_ms: int | None = None
    retry_of: str | None = None
    collapse_key: str | None = None
    evidence: Evidence = "accepted"


class Published(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """From here on the device may have it: recorded before the first byte leaves."""

    attempt: int
    transport: Transport = "mqtt"
    counts: bool = True
    evidence: Evidence = "handed_over"


class Acknowledged(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device says it has it. `at` is the device's own clock, as it wrote it."""

    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_ack"


class Progressed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device reports progress, 0 to 100 percent."""

    percent: int | float | None = None
    note: str | None = None
    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_ack"


class Executed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device did it."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_result"


class Failed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device refused or could not, or the command can never be sent."""

    error: Error
    by: Literal["device", "broker", "mqtt_server"] = "device"
    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_result"


class TimedOut(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Handed over, and we do not know what became of it. A late answer may still correct it."""

    reason: TimeoutReason
    by: str | None = None
    note: str | None = None
    evidence: Evidence = "timer"


class Expired(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Its time ran out and it was never handed over."""

    evidence: Evidence = "timer"


class Cancelled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Called off, and it was never handed over."""

    by: str
    reason: str | None = None
    superseded_by: str | None = None
    evidence: Evidence = "operator"


# --- of a device: stream = device/<id> -----------------------------------------------------------


class Registered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A device is known from here on. `token_digest`: in the form of Mosquitto's password file."""

    hardware_id: str
    device_type: str
    token_digest: str
    name: str | None = None
    attributes: dict[str, Any] = {}


class Changed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What was set anew; a field left out kept its value."""

    device_type: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType | None = msgspec.UNSET
    attributes: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class TokenRotated(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    token_digest: str


class Online(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device was heard; `session` as it named itself in its status message."""

    session: str | None = None


class Offline(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    session: str | None = None


class Deleted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device is gone; its names are never given again."""


# --- of the broker itself ------------------------------------------------------------------------


class Defined(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Stream type/<digest>: what a device type said about one command when one was first accepted."""

    definition: dict[str, Any]


class Started(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A broker process began to serve this log. What it knew of devices being online is void."""

    release: str
    mqtt: Literal["embedded", "external", "none"]


class ClockStepped(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The wall clock moved by this many milliseconds against the clock that never steps."""

    by_ms: int


class Erased(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Stream erasures: data of these commands, or of all created before the cutoff (ms), was erased."""

    ids: list[str] = []
    cutoff: int | None = None
    count: int = 0


CommandEvent = (
    Created
    | Published
    | Acknowledged
    | Progressed
    | Executed
    | Failed
    | TimedOut
    | Expired
    | Cancelled
)  # fmt: skip
DeviceEvent = Registered | Changed | TokenRotated | Online | Offline | Deleted
Event = CommandEvent | DeviceEvent | Defined | Started | ClockStepped | Erased

TYPES: dict[str, type[Event]] = {
    "created": Created,
    "published": Published,
    "acknowledged": Acknowledged,
    "progressed": Progressed,
    "executed": Executed,
    "failed": Failed,
    "timed_out": TimedOut,
    "expired": Expired,
    "cancelled": Cancelled,
    "registered": Registered,
    "changed": Changed,
    "token_rotated": TokenRotated,
    "online": Online,
    "offline": Offline,
    "deleted": Deleted,
    "defined": Defined,
    "started": Started,
    "clock_stepped": ClockStepped,
    "erased": Erased,
}
NAMES: dict[type[Event], str] = {cls: name for name, cls in TYPES.items()}
SCHEMA = 1


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event with the envelope it has in the log. `recorded_at`: Unix time in ms, never falling."""

    position: int
    stream: str
    version: int
    recorded_at: int
    project: str
    device_id: str | None
    actor: str
    event: Event

    @property
    def type(self) -> str:
        return NAMES[type(self.event)]


_encoder = msgspec.json.Encoder()
_decoders: dict[str, msgspec.json.Decoder[Event]] = {
    name: msgspec.json.Decoder(cls) for name, cls in TYPES.items()
}


def encode(event: Event) -> bytes:
    """The bytes the log keeps and hashes; they are never re-serialised."""
    return _encoder.encode(event)


def decode(type_name: str, data: bytes, schema: int = SCHEMA) -> Event:
    """Reads what `encode` wrote in this or any earlier release.

    Raises:
        ValueError: the type or schema is of a later release, or the data is not what it should be.
    """
    decoder = _decoders.get(type_name)
    if decoder is None or schema > SCHEMA:
        raise ValueError(f"event type {type_name!r} schema {schema} is not known to this release")
    return decoder.decode(data)


def device_stream(device_id: str) -> str:
    """A slash is in no identifier, so no command or device can take another's stream."""
    return f"device/{device_id}"


def definition_stream(digest: str) -> str:
    return f"type/{digest}"


def subject_kind(stream: str) -> Literal["command", "device", "broker"]:
    """What a stream is about; the middle word of the CloudEvent type."""
    if stream.startswith("device/"):
        return "device"
    if "/" in stream or stream in (SYSTEM, ERASURES):
        return "broker"
    return "command"
