"""The fold of a device's events."""

from __future__ import annotations

import msgspec
import pytest

from broker.domain.events import (
    Acknowledged,
    Changed,
    Deleted,
    Event,
    Offline,
    Online,
    Registered,
    TokenRotated,
)
from broker.domain.fleet import DeviceState, evolve_device
from tests.integration.core_support import DEVICE, PROJECT, T, recorded

REGISTERED = Registered(
    hardware_id="lamp-1", device_type="generic", token_digest="d0", name="Lamp", attributes={"room": "hall"}
)


def told(*events: Event) -> DeviceState:
    state = None
    for number, event in enumerate((REGISTERED, *events)):
        state = evolve_device(state, recorded(event, number + 1, T + 1_000 * number, f"device/{DEVICE}"))
    assert state is not None
    return state


def test_a_device_starts_as_registered() -> None:
    state = told()

    assert (state.id, state.project, state.hardware_id, state.device_type) == (
        DEVICE,
        PROJECT,
        "lamp-1",
        "generic",
    )
    assert (state.name, state.attributes, state.token_digest) == ("Lamp", {"room": "hall"}, "d0")
    assert (state.online, state.heard, state.seen_at, state.created_at) == (False, False, None, T)


def test_a_change_replaces_only_the_named_fields() -> None:
    assert told(Changed(name="Desk")).attributes == {"room": "hall"}
    assert told(Changed(attributes={})).attributes == {}
    assert told(Changed(attributes={})).name == "Lamp"
    assert told(Changed(name=None)).name is None
    assert told(Changed(device_type="recorder")).device_type == "recorder"


def test_presence_follows_the_last_event() -> None:
    state = told(Online(session="s1"), Offline(session="s1"), Online(session="s2"))

    assert (state.online, state.heard, state.session, state.seen_at) == (True, True, "s2", T + 3_000)
    assert not told(Online(), Offline()).online


def test_a_new_token_replaces_the_old_one() -> None:
    assert told(TokenRotated(token_digest="d1")).token_digest == "d1"


def test_a_deleted_device_is_not_online_and_keeps_its_names() -> None:
    state = told(Online(), Deleted())

    assert (state.online, state.deleted_at, state.hardware_id) == (False, T + 2_000, "lamp-1")


def test_a_device_survives_encoding_as_json() -> None:
    state = told(Online(session="s"), Changed(attributes={"a": [1, {"b": None}]}))

    assert msgspec.json.decode(msgspec.json.encode(state), type=DeviceState) == state


def test_a_device_stream_starts_with_registered_and_contains_only_device_events() -> None:
    with pytest.raises(ValueError, match="online cannot be the first event"):
        evolve_device(None, recorded(Online(), 1))
    with pytest.raises(ValueError, match="acknowledged is not an event of a device"):
        told(Acknowledged())
