"""The shipped types against what real devices and their controllers were seen to say: see `traces.toml`.

Requests are made by the code that makes Ordain's own; messages are read by that of `ordain types test`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.mqtt.access import fits
from devices.speech.answers import Trial, trial
from devices.speech.topics import topic_of
from devices.types import DeviceType, shipped_types
from devices.wire import encode_command

PREFIX, COMMAND_ID = "iotee", "cmd_01h455vb4pex5vsknk084sn02q"
TRACES = tomllib.loads((Path(__file__).parent / "traces.toml").read_text())["trace"]


def topic(trace: dict[str, Any], pattern: str) -> str:
    name = trace.get("name", trace["hardware_id"])
    return topic_of(pattern, PREFIX, trace["hardware_id"], name, trace.get("gateway"))


def request(trace: dict[str, Any], kind: DeviceType, seen: str, command: str, params: Any) -> tuple[str, Any]:
    """The topic and the payload of a command. `seen`: the payload of the trace, which has a number."""
    definition = kind.definition(command)
    assert definition.speech is not None
    reply = definition.speech.reply_topic or next(iter(definition.speech.answer_topics), None)
    payload = encode_command(
        definition,
        command_id=COMMAND_ID,
        command=command,
        params=msgspec.Raw(msgspec.json.encode(kind.check_params(command, params))),
        attempt=1,
        expires_at=None,
        grant=None,
        number=value(seen).get("id") if definition.speech.numbered else None,
        reply_topic=None if reply is None else topic(trace, reply),
    )
    return topic(trace, definition.speech.command_topic), value(payload.decode())


def value(payload: str) -> Any:
    return msgspec.json.decode(payload) if payload[:1] == "{" else payload


def reading(trace: dict[str, Any], kind: DeviceType, found: Trial, said: str) -> str:
    """What a message is, as the last element of its line says it."""
    if not found.roles:
        others = (topic(trace, each) for each in kind.other_topics)
        return "unread" if any(fits(each, said) for each in others) else "foreign"
    assert topic(trace, found.pattern or "") == said
    assert found.malformed is None
    return found.presence or next((each.event for each in found.commands if each.event), "nothing")


@pytest.mark.parametrize("trace", TRACES, ids=[f"{each['type']}: {each['device']}" for each in TRACES])
def test_a_type_says_and_understands_what_was_seen(trace: dict[str, Any]) -> None:
    kind, command, params = shipped_types()[trace["type"]], "", {}
    for way, where, payload, what, *more in trace["said"]:
        if way == "to":
            command, params = what, dict(*more)
            assert request(trace, kind, payload, command, params) == (where, value(payload))
        else:
            found = trial(kind, PREFIX, where, payload.encode(), params, [command] if command else ())
            assert (where, payload, reading(trace, kind, found, where)) == (where, payload, what)


def test_each_type_of_bought_devices_has_a_trace_or_messages() -> None:
    lines = (Path(__file__).parent / "messages.jsonl").read_text().splitlines()
    seen = {trace["type"] for trace in TRACES} | {msgspec.json.decode(line)["type"] for line in lines}
    assert seen == {name for name, kind in shipped_types().items() if kind.speeches}
