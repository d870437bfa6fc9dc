"""The description of the MQTT messages is valid AsyncAPI and matches the messages on the wire."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from broker.http.schema.asyncapi import document
from devices.names import answer_topic, command_topic, status_topic
from devices.speech.signing import sign
from devices.types import DeviceType, load_type, shipped_types
from devices.wire import Answer, encode_answer, encode_command, encode_status
from tests.integration.http.support import Broker, running

HERE = Path(__file__).parent
TYPES = {name: kind for name, kind in shipped_types().items() if not kind.speeches} | {
    kind.name: kind for kind in map(load_type, sorted((HERE.parents[2] / "docs/types").glob("*.toml")))
}
VALVE = load_type("""
name = "valve"
payload = "msgpack"
open = true
any_params = true
command_suffix = "in/valve"
[commands.turn]
[commands.turn.params]
type = "object"
required = ["percent"]
[commands.turn.result]
type = "object"
""")
TYPES["valve"] = VALVE
for rule in ("optional", "required"):
    TYPES[rule] = load_type(
        f'name = "{rule}"\nopen = true\nanswers_signed = "{rule}"\nanswer_suffix = "{rule}"\n'
    )
PARAMS: dict[str, dict[str, Any]] = {"turn": {"percent": 5}}
COMMANDS = [(kind, name) for kind in TYPES.values() for name in (*kind.commands, *(["x"] * kind.open))]


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(msgspec.json.encode(document(TYPES, "site")))
    return found


@pytest.fixture(scope="module")
def official() -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(json.loads((HERE / "asyncapi" / "3.0.0.json").read_text()))


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


def followed(described: dict[str, Any], reference: str) -> Any:
    found: Any = described
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def fitting(described: dict[str, Any], topic: str, kind: DeviceType | None, payload: Any) -> list[str]:
    """The described messages of one topic and device type that a payload fits."""
    found = []
    for name, channel in described["channels"].items():
        own = kind is None or name.startswith(f"{kind.name}.")
        if own and channel["address"].replace("{hardware_id}", "d-1") == topic:
            for message in channel["messages"].values():
                schema = message["payload"] | {"components": described["components"]}
                if jsonschema_rs.validator_for(schema).is_valid(payload):
                    found.append(message["name"])
    return found


async def test_it_is_public_and_names_the_prefix(broker: Broker) -> None:
    answer = await broker.client().get("/asyncapi.json")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == json.loads(msgspec.json.encode(document(shipped_types(), "iotee")))


def test_it_is_valid_under_the_official_schema(
    described: dict[str, Any], official: jsonschema_rs.Validator
) -> None:
    official.validate(described)


def test_the_official_schema_finds_faults(
    described: dict[str, Any], official: jsonschema_rs.Validator
) -> None:
    operations = {**described["operations"], "planted": {"action": "publish"}}
    with pytest.raises(jsonschema_rs.ValidationError):
        official.validate({**described, "operations": operations})


def test_all_references_resolve(described: dict[str, Any]) -> None:
    found = list(references(described))
    assert found
    for reference in found:
        assert followed(described, reference) is not None
    for operation in described["operations"].values():
        channel = operation["channel"]["$ref"]
        assert operation["messages"]
        assert all(message["$ref"].startswith(f"{channel}/messages/") for message in operation["messages"])


@pytest.mark.parametrize(("kind", "name"), COMMANDS, ids=lambda value: getattr(value, "name", value))
def test_a_command_on_the_wire_fits_the_description(
    described: dict[str, Any], kind: DeviceType, name: str
) -> None:
    definition = kind.definition(name)
    payload: Any = encode_command(
        definition,
        command_id="cmd_1",
        command=name,
        params=kind.check_params(name, PARAMS.get(name, {})),
        attempt=1,
        expires_at=None,
        grant="g",
    )
    if kind.payload == "bare":
        payload = payload.decode()
    else:
        payload = (msgspec.msgpack if kind.payload == "msgpack" else msgspec.json).decode(payload)

    found = fitting(described, command_topic("site", "d-1", definition), kind, payload)

    assert found == [f"{kind.name}.{name if name in kind.commands else '*'}"]
    assert fitting(described, command_topic("site", "d-1", definition), kind, {"id": 1}) == []


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_answers_fit_the_description(described: dict[str, Any], kind: DeviceType) -> None:
    definition = kind.definition(next(iter([*kind.commands, "x"])))
    topic = answer_topic("site", "d-1", definition)
    said = encode_answer(Answer(id="cmd_1", status="executed", result={"a": 1}))

    signed = sign(said, "d-1", b"s" * 32).decode()
    plain = [] if kind.answers_signed == "required" else [f"{kind.name}.answer"]
    assert fitting(described, topic, kind, msgspec.json.decode(said)) == plain
    sealed = [] if kind.answers_signed == "none" else [f"{kind.name}.signed"]
    assert fitting(described, topic, kind, signed) == sealed
    for word in kind.words:
        assert fitting(described, topic, kind, word) == [f"{kind.name}.text"]
    assert fitting(described, topic, kind, {"status": "done"}) == []
    assert fitting(described, topic, kind, "done") == []


def test_a_status_fits_the_description(described: dict[str, Any]) -> None:
    topic = status_topic("site", "d-1")
    assert fitting(described, topic, None, "online") == ["status.word"]
    assert fitting(described, topic, None, msgspec.json.decode(encode_status(True, "s"))) == ["status"]


def test_the_claims_of_a_grant_are_described(described: dict[str, Any]) -> None:
    grant = described["components"]["schemas"]["Grant"]
    assert set(grant["required"]) == {"iss", "aud", "sub", "jti", "iat", "nbf", "exp", "cmd", "phs"}
    assert all("description" in claim for claim in grant["properties"].values())
    assert "RFC 8785" in grant["properties"]["phs"]["description"]
