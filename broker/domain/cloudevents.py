"""Recorded events in the form that subscribers get: CloudEvents 1.0 in JSON.

Pure. Only this module decides which data of an event is published. A token's digest never is. An event
whose data was erased shows only that it happened.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec
from msgspec import UNSET, UnsetType

from broker.domain import events
from broker.domain.events import NAMES, CommandEvent, DeviceEvent, Pending, subject_kind
from broker.domain.fleet import DeviceSet
from devices.clock import rfc3339

SECRET = frozenset({"token_digest", "via"})
# Bare name and full name of each event of a command or device -> the bare name.
BARE_TYPES = {
    known: name
    for kind, classes in (("command", CommandEvent), ("device", DeviceEvent))
    for name in (NAMES[each] for each in get_args(classes))
    for known in (name, f"ordain.{kind}.{name}.v1")
}
EVENTS = tuple(dict.fromkeys(BARE_TYPES.values()))
Outward = CommandEvent | DeviceEvent

_encode = msgspec.json.Encoder().encode


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """CloudEvents 1.0, section "Context Attributes"; `project`, `actor`, `schema`, `version` and
    `erased` are extensions.

    `id`: position in the log. `subject`: the command's id, or the device's id for a device event.
    `version`: number of the event within its subject, from 1. `erased`: the data was erased for ever.
    """

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    subject: str
    time: str
    datacontenttype: Literal["application/json"] = "application/json"
    project: str
    actor: str
    schema: int
    version: int
    erased: bool | UnsetType = UNSET
    data: dict[str, Any]


class Entry(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One event to be published, with the fields that subscribers filter by. `command`: the command's name.

    `event` None: the data was erased; then `command` may be unknown too.
    """

    position: int
    stream: str
    version: int
    recorded_at: int
    project: str
    device_id: str
    hardware_id: str
    actor: str
    type: str
    schema: int = events.SCHEMA
    command: str | None = None
    event: Outward | None = None

    @property
    def command_id(self) -> str | None:
        return self.stream if subject_kind(self.stream) == "command" else None

    @property
    def full_type(self) -> str:
        return full_type(self.stream, self.type)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a subscriber; None means any.

    `device`: id or hardware id; no two devices share a name. `command_id`: one command. `command`: the
    command's name. `event`: the bare type, such as `executed`. `within`: only these devices.
    """

    project: str | None = None
    within: DeviceSet | None = None
    device: str | None = None
    command_id: str | None = None
    command: str | None = None
    event: str | None = None

    def fits(self, entry: Entry) -> bool:
        return (
            self.project in (None, entry.project)
            and self.device in (None, entry.device_id, entry.hardware_id)
            and self.command_id in (None, entry.stream)
            and self.command in (None, entry.command)
            and self.event in (None, entry.type)
            and (self.within is None or self.within.covers(entry.device_id, entry.hardware_id))
        )


def entry(pending: Pending, position: int, recorded_at: int, hardware_id: str, command: str | None) -> Entry:
    """The entry of an event of a command or device. `command`: the command's name, None for a device."""
    event = pending.event
    assert isinstance(event, Outward), "callers pass no event of the broker itself"
    return Entry(
        position=position,
        stream=pending.stream,
        version=pending.version,
        recorded_at=recorded_at,
        project=pending.project,
        device_id=pending.device_id or "",
        hardware_id=hardware_id,
        actor=pending.actor,
        type=NAMES[type(event)],
        command=command,
        event=event,
    )


def cloud_event(log_id: str, entry: Entry) -> CloudEvent:
    """The CloudEvent of one entry. Its `data` always names the command and the device."""
    command_id = entry.command_id
    data: dict[str, Any] = {} if command_id is None else {"command_id": command_id}
    data["device_id"], data["hardware_id"] = entry.device_id, entry.hardware_id
    if entry.command is not None and command_id is not None:
        data["type"] = entry.command
    if entry.event is not None:
        data |= event_data(entry.event)
    return CloudEvent(
        id=str(entry.position),
        source=f"/ordain/{log_id}",
        type=entry.full_type,
        subject=command_id or entry.device_id,
        time=rfc3339(entry.recorded_at),
        project=entry.project,
        actor=entry.actor,
        schema=entry.schema,
        version=entry.version,
        erased=UNSET if entry.event is not None else True,
        data=data,
    )


def encoded(log_id: str, entry: Entry) -> bytes:
    """The CloudEvent in JSON; encoded once and kept in the entry, because many subscribers may get it."""
    known: bytes | None = entry.__dict__.get("encoded")
    if known is None:
        known = entry.__dict__["encoded"] = _encode(cloud_event(log_id, entry))
    return known


def full_type(stream: str, name: str) -> str:
    """The full event type, such as `ordain.command.executed.v1` for `executed` in a command's stream."""
    return f"ordain.{subject_kind(stream)}.{name}.v1"


def event_data(event: events.Event) -> dict[str, Any]:
    """The published data of an event: with defaults, without unset and secret fields, times as text."""
    data = {
        field: value
        for field, value in msgspec.structs.asdict(event).items()
        if value is not None and value is not UNSET and field not in SECRET
    }
    if isinstance(event, events.Created) and event.expires_at is not None:
        data["expires_at"] = rfc3339(event.expires_at)
    return data
