"""Events as the log stores them: every written event can be read, and nothing else can."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain import events
from broker.domain.events import NAMES, SCHEMA, TYPES, Event, Recorded, decode, encode, subject_kind
from tests.integration.core_support import created

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
st.register_type_strategy(msgspec.Raw, JSON.map(lambda value: msgspec.Raw(msgspec.json.encode(value))))


def value(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have; `Any` means JSON."""
    if kind is Any:
        return JSON
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return st.dictionaries(st.text(max_size=3), JSON, max_size=3)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind is int:
        return st.integers(-(2**63), 2**63 - 1)
    if kind is msgspec.UnsetType:
        return st.just(msgspec.UNSET)
    if (origin is not None and origin is not typing.Literal and type(None) in arguments) or _union(kind):
        return st.one_of([value(part) for part in arguments])
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return struct(kind)
    return st.from_type(kind)


def _union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, type(int | str))


def struct(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: value(hints[name]) for name in kind.__struct_fields__})


ANY_EVENT: st.SearchStrategy[Event] = st.sampled_from(sorted(TYPES)).flatmap(lambda name: struct(TYPES[name]))


@given(ANY_EVENT)
def test_every_event_reads_back_as_it_was_written(event: Event) -> None:
    kept = encode(event)

    read = decode(NAMES[type(event)], kept)

    assert type(read) is type(event)
    assert encode(read) == kept


def test_every_event_class_has_a_name_and_is_strict_and_frozen() -> None:
    classes = set(typing.get_args(events.Event))

    assert classes == set(TYPES.values())
    for name, kind in TYPES.items():
        config: Any = kind.__struct_config__
        assert (config.frozen, config.forbid_unknown_fields, config.omit_defaults) == (True, True, True), name


@pytest.mark.parametrize(
    ("name", "data", "schema"),
    [
        ("teleported", b"{}", SCHEMA),
        ("acknowledged", b"{}", SCHEMA + 1),
        ("acknowledged", b'{"colour":"red"}', SCHEMA),
        ("published", b"{}", SCHEMA),
        ("published", b'{"attempt":"1"}', SCHEMA),
        ("failed", b'{"error":{"code":"c"}}', SCHEMA),
        ("acknowledged", b"not json", SCHEMA),
    ],
)
def test_unknown_events_and_fields_are_refused(name: str, data: bytes, schema: int) -> None:
    with pytest.raises(ValueError):
        decode(name, data, schema)


def test_parameters_are_stored_byte_for_byte() -> None:
    spelled = b'{ "b" : 1.50,"a":1e2 }'

    assert spelled in encode(created(params=msgspec.Raw(spelled)))


def test_a_stream_name_gives_its_subject_kind() -> None:
    assert subject_kind("cmd_1") == "command"
    assert subject_kind(events.device_stream("dev_1")) == "device"
    for stream in (events.SYSTEM, events.ERASURES, events.definition_stream("d1")):
        assert subject_kind(stream) == "broker"


def test_a_recorded_event_knows_its_type_name() -> None:
    envelope = Recorded(
        position=1, stream="s", version=1, recorded_at=1, decided_at=1, project="p", device_id=None,
        actor="a", event=events.TimedOut(reason="no_answer"),
    )  # fmt: skip

    assert envelope.type == "timed_out"
