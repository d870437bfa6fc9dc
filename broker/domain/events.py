"""All event types that Ordain has ever recorded, and the envelope that the log keeps around them.

Pure. An event is a fact that is durable before any effect of it. Fields may be added with a default,
but never changed or removed: this module must read the logs of every past release.
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
    "observed",
    "relay_report",
    "mqtt_puback",
    "mqtt_refused",
    "timer",
    "operator",
    "broker",
]
# Whether the answer was signed by its device; None: answers of its type are not signed.
Signed = bool | None
TimeoutReason = Literal["no_answer", "no_result", "ttl", "unsendable", "device_deleted", "operator"]

SYSTEM = "system"
ERASURES = "erasures"
AUDIT = "audit"
OWNER = "owner"
_OF_BROKER = frozenset({SYSTEM, ERASURES, AUDIT, OWNER})


class Error(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Why a command failed: `code` for programs, `message` for people, `details` as the device gave them."""

    code: str
    message: str
    details: Any = None


class Via(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The HTTP request that caused an event: its id, and the network address it came from."""

    request: str
    peer: str


class Caused(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """An event that a request can cause. `via` is for the audit only; it is never published."""

    via: Via | None = None


# --- events of a command; stream: the command's id ----------------------------------------------


class Created(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The request was accepted. Times in ms. `definition`: digest of the device type's definition at that
    time."""

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


class Published(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The command is handed over: recorded before the first byte is sent; the device may have it from now on.

    `attempt`: number of this hand-over, from 1. `counts`: it counts towards max_attempts. `number`: the
    number that the device gets for this attempt, if its type uses `$number`; the device's answer names it.
    """

    attempt: int
    transport: Transport = "mqtt"
    counts: bool = True
    evidence: Evidence = "handed_over"
    number: int | None = None


class Acknowledged(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device says that it has the command. `at`: time of the device's own clock, as it wrote it."""

    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_ack"
    signed: Signed = None


class Progressed(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device reports progress, 0 to 100 percent. `seq`: of a signed report, greater than in those
    before."""

    percent: int | float | None = None
    note: str | None = None
    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_ack"
    signed: Signed = None
    seq: int | None = None


class Executed(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device executed the command. `result`: JSON."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_result"
    signed: Signed = None


class Failed(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device reported a failure, or the command can never be sent."""

    error: Error
    by: Literal["device", "broker", "mqtt_server"] = "device"
    late: bool = False
    at: str | None = None
    evidence: Evidence = "device_result"
    signed: Signed = None


class TimedOut(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The command was handed over, and its outcome is unknown. A late answer may still correct this."""

    reason: TimeoutReason
    by: str | None = None
    note: str | None = None
    evidence: Evidence = "timer"


class Expired(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The command expired and was never handed over."""

    evidence: Evidence = "timer"


class Cancelled(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The command was cancelled and was never handed over."""

    by: str
    reason: str | None = None
    superseded_by: str | None = None
    evidence: Evidence = "operator"


# --- events of a device; stream: device/<id> -----------------------------------------------------


class Registered(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A device was registered. `token_digest`: in the format of Mosquitto's password file. `answer_key`: the
    public key that it signs its answers with. `gateway`: the hardware id of the gateway that speaks for it.
    """

    hardware_id: str
    device_type: str
    token_digest: str
    name: str | None = None
    attributes: dict[str, Any] = {}
    answer_key: str | None = None
    gateway: str | None = None


class Changed(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Fields of a device were changed; unset fields keep their value. `gateway`: the device moved to this one
    (a hardware id); None: from here on it connects itself."""

    device_type: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType | None = msgspec.UNSET
    attributes: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    answer_key: str | msgspec.UnsetType | None = msgspec.UNSET
    gateway: str | msgspec.UnsetType | None = msgspec.UNSET


class TokenRotated(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    token_digest: str


class Online(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device came online. `session`: the session id in its status message."""

    session: str | None = None


class Offline(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    session: str | None = None


class Reported(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The state that the device reported last, if it has changed. Within the rate of a device's events."""

    state: dict[str, Any]


class Deleted(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The device was deleted; its names are never used again."""


# --- events of the broker itself -----------------------------------------------------------------


class Defined(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Stream type/<digest>: the definition of one command of a device type, when first used."""

    definition: dict[str, Any]


class Started(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A broker process began to serve this log. Earlier `online` events are not valid any more.

    `settings`: those that differ from the defaults.
    """

    release: str
    mqtt: Literal["embedded", "external", "none"]
    settings: dict[str, Any] = {}


class ClockStepped(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The wall clock was stepped by `by_ms` milliseconds against the monotonic clock."""

    by_ms: int


class Erased(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Stream erasures: the data of these commands, or of all closed commands created before `cutoff` (ms),
    is erased. `positions`: of device events that newer ones replaced, whose data is erased. `count`: how many
    commands or device events."""

    ids: list[str] = []
    positions: list[int] = []
    cutoff: int | None = None
    count: int = 0


class Operated(Caused, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Stream audit: something was changed that lies beside the log, such as a key. It never holds a secret.

    `action`: what was done, such as `key.created`. `subject`: the id of what was changed."""

    action: str
    subject: str
    details: dict[str, Any] = {}


class Owned(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Stream owner: from here on this run of a node decides. Its version is the term of all later appends.

    `incarnation`: the run of the process; a node that starts again has another one. `address`: where other
    nodes reach it.
    """

    incarnation: str
    node: str
    address: str | None = None


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
DeviceEvent = Registered | Changed | TokenRotated | Online | Offline | Reported | Deleted
Event = CommandEvent | DeviceEvent | Defined | Started | ClockStepped | Erased | Operated | Owned

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
    "reported": Reported,
    "deleted": Deleted,
    "defined": Defined,
    "started": Started,
    "clock_stepped": ClockStepped,
    "erased": Erased,
    "operated": Operated,
    "owned": Owned,
}
NAMES: dict[type[Event], str] = {cls: name for name, cls in TYPES.items()}
SCHEMA = 1


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """An event with its envelope, before the log has taken it.

    `decided_at`: the clock of the broker that decided it, Unix time in ms. States and timers follow from it.
    """

    stream: str
    version: int
    decided_at: int
    project: str
    device_id: str | None
    actor: str
    event: Event

    @property
    def type(self) -> str:
        return NAMES[type(self.event)]


class Recorded(Pending, frozen=True, kw_only=True):
    """An event as the log has it. Both fields are given by the log: `recorded_at`, Unix time in ms, is never
    less than in the event before it. It only orders; no state and no timer depends on it."""

    position: int
    recorded_at: int


_encoder = msgspec.json.Encoder()
_decoders: dict[str, msgspec.json.Decoder[Event]] = {
    name: msgspec.json.Decoder(cls) for name, cls in TYPES.items()
}


def encode(event: Event) -> bytes:
    """The bytes that the log stores and hashes; they are never encoded again."""
    return _encoder.encode(event)


def decode(type_name: str, data: bytes, schema: int = SCHEMA) -> Event:
    """Decodes the output of `encode` of this or any earlier release.

    Raises:
        ValueError: the type or schema is from a later release, the data does not fit the type, or it is
            nested too deeply.
    """
    decoder = _decoders.get(type_name)
    if decoder is None or schema > SCHEMA:
        raise ValueError(f"event type {type_name!r} schema {schema} is not known to this release")
    try:
        return decoder.decode(data)
    except RecursionError:
        raise ValueError("the data is nested too deeply") from None


def device_stream(device_id: str) -> str:
    """The stream of a device. Identifiers contain no slash, so no command id can equal this name."""
    return f"device/{device_id}"


def definition_stream(digest: str) -> str:
    return f"type/{digest}"


def subject_kind(stream: str) -> Literal["command", "device", "broker"]:
    """The kind of thing that a stream is about; the middle word of the CloudEvent type."""
    if "/" in stream:
        return "device" if stream.startswith("device/") else "broker"
    return "broker" if stream in _OF_BROKER else "command"
