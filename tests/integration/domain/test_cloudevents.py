"""Every event as a CloudEvent, read by the specification's own SDK."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from broker.domain import cloudevents, events
from broker.domain.cloudevents import BARE_TYPES, Entry, encoded
from devices.clock import rfc3339
from tests.integration.core_support import COMMAND, DEVICE, PROJECT, T

CLASSES: list[Any] = [*get_args(events.CommandEvent), *get_args(events.DeviceEvent)]
OF_A_DEVICE = get_args(events.DeviceEvent)


def sample(cls: Any) -> Any:
    """An instance with every required field set."""
    given: dict[Any, Any] = {str: "lamp-1", int: 1, msgspec.Raw: msgspec.Raw(b'{"a": 1}')}
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(cls):
        if field.required:
            kind = field.type if field.type in given else None
            if kind is None and field.type is events.Error:
                values[field.name] = events.Error(code="jammed", message="it is jammed", details={"at": 3})
            elif get_origin(field.type) is dict:
                values[field.name] = {"output": True}
            elif kind is None:
                values[field.name] = (get_args(field.type) or ({},))[0]
            else:
                values[field.name] = given[kind]
    return cls(**values)


def entry_of(event: Any) -> Entry:
    device = isinstance(event, OF_A_DEVICE)
    return Entry(
        position=7,
        stream=f"device/{DEVICE}" if device else COMMAND,
        version=2,
        recorded_at=T,
        project=PROJECT,
        device_id=DEVICE,
        hardware_id="lamp-1",
        actor="key:key_1",
        type=events.NAMES[type(event)],
        command=None if device else "open",
        event=event,
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: events.NAMES[cls])
def test_the_sdk_reads_every_event(cls: Any) -> None:
    entry = entry_of(sample(cls))

    read = JSONFormat().read(CloudEvent, encoded("log_1", entry))

    kind = "device" if cls in OF_A_DEVICE else "command"
    assert read.get_id() == "7"
    assert read.get_source() == "/ordain/log_1"
    assert read.get_type() == f"ordain.{kind}.{entry.type}.v1"
    assert BARE_TYPES[read.get_type()] == entry.type
    assert read.get_subject() == (DEVICE if kind == "device" else COMMAND)
    assert read.get_datacontenttype() == "application/json"
    time = read.get_time()
    assert time is not None
    assert rfc3339(round(time.timestamp() * 1_000)) == rfc3339(T)
    data: Any = read.get_data()
    assert (data["device_id"], data["hardware_id"]) == (DEVICE, "lamp-1")
    assert ("command_id" in data) == (kind == "command")
    assert not cloudevents.SECRET & data.keys()


def test_the_sdk_reads_an_event_with_erased_data() -> None:
    entry = msgspec.structs.replace(entry_of(sample(events.Created)), event=None, command=None)

    read = JSONFormat().read(CloudEvent, encoded("log_1", entry))

    assert read.get_extension("erased") is True
    assert read.get_data() == {"command_id": COMMAND, "device_id": DEVICE, "hardware_id": "lamp-1"}


def test_extension_names_follow_the_specification() -> None:
    read = JSONFormat().read(CloudEvent, encoded("log_1", entry_of(sample(events.Published))))

    own = {"project": PROJECT, "actor": "key:key_1", "schema": 1, "version": 2}
    assert {name: read.get_extension(name) for name in own} == own
    names = {field.name for field in msgspec.structs.fields(cloudevents.CloudEvent)}
    assert all(name.isascii() and name.isalnum() and name == name.lower() for name in names)
