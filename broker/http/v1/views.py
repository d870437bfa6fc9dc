"""Commands, events, devices and types as `/v1` shows them. Field names are exactly those of the contract.

Pure: computed only from the state and the grant that the caller passes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from broker.domain import events
from broker.domain.cloudevents import event_data
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Presence
from broker.domain.lifecycle import CommandState, State
from broker.log.chain import Row
from devices.clock import rfc3339
from devices.names import PATTERN
from devices.types import DeviceType, Signing

Status = Literal["pending", "delivered", "executed", "failed", "expired", "cancelled"]
StateName = Literal[
    "pending", "published", "acknowledged", "executed", "failed", "timed_out", "expired", "cancelled"
]
PresenceName = Literal["never", "offline", "unknown", "online"]
Time = Annotated[
    str,
    Meta(
        description="RFC 3339 in UTC, with milliseconds.",
        examples=["2026-11-20T09:30:00.000Z"],
        extra_json_schema={"format": "date-time"},
    ),
]
NAME = {"pattern": PATTERN}
Name = Annotated[str, Meta(extra_json_schema=NAME)]
TypeName = Annotated[
    str,
    Meta(description="A device type from `GET /v1/types`.", examples=["generic"], extra_json_schema=NAME),
]

STATUS: dict[State, Status] = {
    State.PENDING: "pending",
    State.PUBLISHED: "pending",
    State.ACKNOWLEDGED: "delivered",
    State.EXECUTED: "executed",
    State.FAILED: "failed",
    State.TIMED_OUT: "failed",
    State.EXPIRED: "expired",
    State.CANCELLED: "cancelled",
}
TIMEOUTS = {
    "no_answer": "the device did not answer in time; it may have executed the command",
    "no_result": "the device acknowledged the command but sent no result in time",
    "ttl": "the command expired after it was handed over, and the device did not answer",
    "unsendable": "the command was handed over without an answer and could not be sent again",
    "device_deleted": "the device was deleted while it may have had the command",
    "operator": "an operator gave up waiting for an answer",
}


class CommandError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a command failed, or why its outcome is not known."""

    code: Annotated[
        str,
        Meta(description="`timeout`, `unsendable`, `refused`, `device_error`, or a code from the device."),
    ]
    message: str
    details: Annotated[
        Any, Meta(description="The details from the device; for `timeout` an object with `reason`.")
    ] = UNSET


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A command to one device, and its outcome."""

    id: Annotated[str, Meta(description="`cmd_…`, sortable by creation time.")]
    device_id: str
    hardware_id: str
    type: str
    status: Annotated[
        Status,
        Meta(
            description="A summary of `state`. Without an answer in time it is `failed`, with the error code "
            "`timeout`."
        ),
    ]
    params: Annotated[Any, Meta(description="The parameters, with all defaults filled in.")]
    grant_token: Annotated[
        str | None,
        Meta(description="A signed grant for this device; null for keys without the scope `devices:write`."),
    ]
    result: Annotated[Any, Meta(description="The device's result: an object, or null.")]
    error: CommandError | None
    expires_at: Time | None
    delivered_at: Annotated[Time | None, Meta(description="When the device first answered in any way.")]
    executed_at: Time | None
    created_at: Time
    state: Annotated[
        StateName, Meta(description="The full state. A `published` command can no longer be cancelled.")
    ]
    published_at: Annotated[Time | None, Meta(description="When it was first handed over.")]
    attempts: Annotated[int, Meta(description="The number of hand-overs.")]
    retry_of: str | None


class CommandList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of commands."""

    data: list[Command]
    has_more: bool
    next_cursor: str | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a command."""

    position: Annotated[int, Meta(description="Its position in the whole log.")]
    version: Annotated[int, Meta(description="Its number among the events of this command, from 1.")]
    type: str
    recorded_at: Time
    evidence: Annotated[
        str | None, Meta(description="The source of the event, such as `device_result` or `mqtt_puback`.")
    ]
    data: dict[str, Any]
    erased: Annotated[bool | UnsetType, Meta(description="Present and true if the data was erased.")] = UNSET


class EventList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the events of a command, in order."""

    data: list[Event]
    has_more: bool
    next_cursor: str | None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device. Only the answer that created a token or a secret contains it."""

    id: str
    hardware_id: Annotated[str, Meta(description="Its name in MQTT topics, and its MQTT user name.")]
    type: str
    name: str | None
    attributes: dict[str, Any]
    gateway: Annotated[str | None, Meta(description="The hardware id of the gateway that speaks for it.")]
    project: str
    presence: Annotated[
        PresenceName,
        Meta(
            description="`unknown`: the device was heard before, but not since the broker connected to the "
            "MQTT server."
        ),
    ]
    last_seen_at: Annotated[Time | None, Meta(description="When it last went online or offline.")]
    created_at: Time
    updated_at: Time
    answer_key: Annotated[
        str | None, Meta(description="The Ed25519 public key that it signs its answers with, base64url.")
    ]
    device_token: Annotated[str | UnsetType, Meta(description="`dtok_…`, its MQTT password. Shown once.")] = (
        UNSET
    )
    device_secret: Annotated[
        str | UnsetType,
        Meta(description="The key of HS256 grants and of answers signed with HMAC, base64url. Shown once."),
    ] = UNSET
    deleted_at: Annotated[Time | UnsetType, Meta(description="Present only if the device was deleted.")] = (
        UNSET
    )


class DeviceList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of devices."""

    data: list[Device]
    has_more: bool
    next_cursor: str | None


class TypeCommand(msgspec.Struct, frozen=True, kw_only=True):
    """One command of a device type."""

    name: str
    title: str | None
    params: Annotated[
        dict[str, Any] | None, Meta(description="JSON Schema of the parameters; null: any parameters.")
    ]
    repeatable: bool
    completes_on: str
    default_ttl_sec: int | None


class Type(msgspec.Struct, frozen=True, kw_only=True):
    """One device type. `open`: it accepts any command name. `gateway`: such devices speak for others too."""

    name: str
    title: str | None
    payload: str
    open: bool
    gateway: bool
    presence: str
    transports: list[str]
    max_in_flight: int
    answers_signed: Signing
    commands: list[TypeCommand]


class TypeList(msgspec.Struct, frozen=True, kw_only=True):
    """All device types."""

    data: list[Type]
    has_more: bool = False
    next_cursor: str | None = None


def time(ms: int | None) -> str | None:
    return None if ms is None else rfc3339(ms)


def command(state: CommandState, grant_token: str | None) -> Command:
    return Command(
        id=state.id,
        device_id=state.device_id,
        hardware_id=state.hardware_id,
        type=state.type,
        status=STATUS[state.state],
        params=state.params,
        grant_token=grant_token,
        result=state.result,
        error=error(state),
        expires_at=time(state.expires_at),
        delivered_at=time(state.delivered_at),
        executed_at=time(state.executed_at),
        created_at=rfc3339(state.created_at),
        state=state.state.value,  # type: ignore[arg-type]
        published_at=time(state.published_at),
        attempts=state.attempts,
        retry_of=state.retry_of,
    )


def error(state: CommandState) -> CommandError | None:
    if state.state is State.TIMED_OUT:
        reason = state.reason or "no_answer"
        return CommandError(code="timeout", message=TIMEOUTS[reason], details={"reason": reason})
    if state.error is None:
        return None
    details = UNSET if state.error.details is None else state.error.details
    return CommandError(code=state.error.code, message=state.error.message, details=details)


def event(row: Row) -> Event:
    """An event from a row of the log. An erased row is shown with empty `data` and `erased: true`."""
    data, evidence = {}, None
    if row.data is not None:
        data = event_data(events.decode(row.type, row.data, row.schema))
        evidence = data.pop("evidence", None)
    return Event(
        position=row.position,
        version=row.version,
        type=row.type,
        recorded_at=rfc3339(row.recorded_at),
        evidence=evidence,
        data=data,
        erased=UNSET if row.data is not None else True,
    )


def device(state: DeviceState, presence: Presence | None, token: str | UnsetType = UNSET) -> Device:
    return Device(
        id=state.id,
        hardware_id=state.hardware_id,
        type=state.device_type,
        name=state.name,
        attributes=state.attributes,
        gateway=state.gateway,
        project=state.project,
        presence=presence_of(state, presence).value,
        last_seen_at=time(state.seen_at),
        created_at=rfc3339(state.created_at),
        updated_at=rfc3339(state.updated_at),
        answer_key=state.answer_key,
        device_token=token,
        deleted_at=UNSET if state.deleted_at is None else rfc3339(state.deleted_at),
    )


def presence_of(state: DeviceState, known: Presence | None) -> Presence:
    """The presence that this process knows (`known`), except for the first `online` of a device while its
    event is not durable: after a crash nothing would be left of it. Without one, the log decides: a device
    that was ever heard is offline, all others are `never`."""
    if known is None or known is Presence.NEVER or (known is Presence.ONLINE and not state.heard):
        return Presence.OFFLINE if state.heard else Presence.NEVER
    return known


def types(known: Mapping[str, DeviceType]) -> TypeList:
    return TypeList(data=[_type(kind) for _, kind in sorted(known.items())])


def _type(kind: DeviceType) -> Type:
    commands = []
    for name, declared in kind.commands.items():
        definition = kind.definition(name)
        commands.append(
            TypeCommand(
                name=name,
                title=declared.title,
                params=declared.params,
                repeatable=definition.repeatable,
                completes_on=definition.completes_on,
                default_ttl_sec=kind.default_ttl(name),
            )
        )
    return Type(
        name=kind.name,
        title=kind.title,
        payload=kind.payload,
        open=kind.open,
        gateway=kind.gateway,
        presence=kind.presence,
        transports=list(kind.transports),
        max_in_flight=kind.max_in_flight,
        answers_signed=kind.answers_signed,
        commands=commands,
    )
