"""Device types: the shipped ones, the errors of wrong files, and the checks of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from devices.names import is_name
from devices.types import (
    BadParams,
    BadType,
    Definition,
    DeviceType,
    UnknownCommand,
    load_type,
    shipped_types,
)

BARE = """
name = "gate"
payload = "bare"
[answers]
done = "executed"
[commands.open]
text = "O"
"""
JSON = """
name = "lamp"
[commands.dim]
default_ttl_sec = 5
[commands.dim.params]
type = "object"
required = ["level"]
additionalProperties = false
[commands.dim.params.properties.level]
type = "integer"
maximum = 100
[commands.dim.params.properties.fade]
type = "object"
default = {ms = 10}
"""


def shipped(name: str) -> DeviceType:
    return shipped_types()[name]


def test_these_types_are_shipped() -> None:
    own = {"iotee_device", "generic", "recorder", "gateway"}
    bought = {
        "shelly_gen1", "shelly_gen2", "tasmota", "zigbee2mqtt", "zigbee2mqtt_bridge", "esphome_node",
        "esphome_node_switch", "esphome_switch", "home_assistant_lock", "home_assistant_switch",
    }  # fmt: skip
    assert set(shipped_types()) == own | bought


@pytest.mark.parametrize(
    ("command", "text", "suffix", "repeatable"),
    [("lock", "1", "rls", True), ("unlock", "0", "rls", True), ("reboot", "1", "rbt", False)],
)
def test_iotee_device_uses_fixed_texts(command: str, text: str, suffix: str, repeatable: bool) -> None:
    iotee = shipped("iotee_device")

    definition = iotee.definition(command)

    assert (definition.text, definition.command_suffix, definition.repeatable) == (text, suffix, repeatable)
    assert (definition.payload, definition.presence) == ("bare", "none")
    assert (definition.carries_ids, definition.carries_grant) == (False, False)
    assert definition.answers == {"ack": "acknowledged", "ok": "executed", "error": "failed"}
    assert iotee.default_ttl(command) == 60


def test_an_unknown_command_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(UnknownCommand, match="lock, unlock, reboot"):
        shipped("iotee_device").definition("explode")


@pytest.mark.parametrize("params", [{}, None, 5, "x", [1, {"a": None}], {"a": 1.5}, False])
def test_generic_accepts_any_command_name_and_any_json(params: Any) -> None:
    generic = shipped("generic")

    assert generic.definition("anything_at-all").presence == "required"
    assert generic.check_params("anything_at-all", params) == params
    assert generic.check_params("x") == {}
    assert generic.default_ttl("x") is None


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a" * 65, "me", "lock\n", "schloß"])
def test_generic_refuses_an_invalid_command_name(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(UnknownCommand):
        shipped("generic").definition(name)


def test_recorder_fills_in_missing_parameters() -> None:
    recorder = shipped("recorder")
    given = {"metadata": {"room": "A"}}

    filled = recorder.check_params("start_recording", given)

    assert filled == {"metadata": {"room": "A"}, "max_duration_sec": 3600, "upload_immediately": True}
    assert given == {"metadata": {"room": "A"}}
    assert recorder.check_params("stop_recording") == {}
    assert recorder.definition("start_recording").transports == ("mqtt", "heartbeat", "relay")


@pytest.mark.parametrize(
    ("command", "params", "field"),
    [
        ("start_recording", {"max_duration_sec": 0}, "params.max_duration_sec"),
        ("start_recording", {"max_duration_sec": 86_401}, "params.max_duration_sec"),
        ("start_recording", {"max_duration_sec": True}, "params.max_duration_sec"),
        ("start_recording", {"max_duration_sec": "10"}, "params.max_duration_sec"),
        ("start_recording", {"upload_immediately": 1}, "params.upload_immediately"),
        ("start_recording", {"metadata": []}, "params.metadata"),
        ("start_recording", {"colour": "red"}, "params.colour"),
        ("stop_recording", {"now": True}, "params.now"),
        ("stop_recording", [], "params"),
        ("stop_recording", None, "params"),
    ],
)
def test_recorder_names_the_wrong_parameter(command: str, params: Any, field: str) -> None:
    with pytest.raises(BadParams) as refused:
        shipped("recorder").check_params(command, params)

    assert refused.value.field == field
    assert refused.value.reason


def test_a_bare_command_takes_no_parameters() -> None:
    lock = shipped("iotee_device")

    assert lock.check_params("lock") == lock.check_params("lock", {}) == {}
    wrong: tuple[Any, ...] = ({"a": 1}, None, [], False, 0, "")
    for params in wrong:
        with pytest.raises(BadParams, match="params: lock takes none"):
            lock.check_params("lock", params)


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(BadParams, match=r"params\.level: is required"):
        load_type(JSON).check_params("dim", {})


def test_a_default_is_not_shared_between_commands() -> None:
    lamp = load_type(JSON)

    lamp.check_params("dim", {"level": 1})["fade"]["ms"] = 99

    assert lamp.check_params("dim", {"level": 1})["fade"] == {"ms": 10}


def test_parameters_without_an_exact_canonical_form_are_refused() -> None:
    deep: Any = 1
    for _ in range(65):
        deep = [deep]

    for params in (2**53, {"a": [-(2**53)]}, deep, {"x": float("inf")}):
        with pytest.raises(BadParams):
            shipped("generic").check_params("x", params)
    assert shipped("generic").check_params("x", deep[0]) == deep[0]


def test_the_reason_does_not_repeat_the_value() -> None:
    with pytest.raises(BadParams) as refused:
        load_type(JSON).check_params("dim", {"level": "my secret"})

    assert "my secret" not in str(refused.value)
    assert refused.value.value == "my secret"


def test_a_command_inherits_missing_options_from_its_type() -> None:
    lamp = load_type("ack_timeout_sec = 3\n" + JSON)

    assert lamp.definition("dim").ack_timeout_sec == 3
    assert lamp.definition("dim").late_answer_sec == 6
    assert lamp.definition("dim").repeatable is True
    assert load_type(BARE).definition("open").repeatable is False
    assert lamp.default_ttl("dim") == 5


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('nam = "x"\n' + JSON, "nam"),
        ("max_in_flight = 101\n" + JSON, "max_in_flight"),
        ("default_ttl_sec = 0\n" + JSON, "default_ttl_sec"),
        ("default_ttl_sec = 31536001\n" + JSON, "default_ttl_sec"),
        ("max_payload_bytes = 65537\n" + JSON, "max_payload_bytes"),
        ("ack_timeout_sec = nan\n" + JSON, "ack_timeout_sec"),
        ('ack_timeout_sec = "10"\n' + JSON, "ack_timeout_sec"),
        ("backoff_cap_sec = 1\n" + JSON, "backoff_cap_sec"),
        ("transports = []\n" + JSON, "transports"),
        ('transports = ["pigeon"]\n' + JSON, "transports"),
        ('command_suffix = "a//b"\n' + JSON, "command_suffix"),
        ('command_suffix = "a/+"\n' + JSON, "command_suffix"),
        ('command_suffix = "a/b/c/d/e"\n' + JSON, "command_suffix"),
        ('answer_suffix = "a/#"\n' + JSON, "answer_suffix"),
        ('command_suffix = "ack"\n' + JSON, "command_suffix"),
        ('answer_suffix = "status"\n' + JSON, "answer_suffix"),
        ('payload = "cbor"\n' + JSON, "payload"),
        ('grants = "RS256"\n' + JSON, "grants"),
        ('presence = "none"\ncompletes_on = "published"\nopen = true\nname = "x"', "completes_on"),
        (JSON + "[commands.bad]\nresult = {minimum = inf}\n", "commands.bad.result"),
        (JSON + "[commands.bad]\nresult = {const = 2026-01-01}\n", "commands.bad.result"),
        ('transports = ["mqtt", "relay"]\ncompletes_on = "published"\n' + JSON, "commands.dim.completes_on"),
        (JSON + '[commands.bad]\nresult = {type = "wrong"}\n', "commands.bad.result"),
        (JSON + '[commands.bad]\nresult = {"$ref" = "http://127.0.0.1:9/x"}\n', "commands.bad.result"),
        (JSON + '[commands.bad]\nanswers = {"{" = "executed"}\n', "commands.bad.answers.{"),
        (BARE.replace("done", '"\u07c1"'), "answers.\u07c1"),
        (BARE.replace('done = "executed"', 'half = "progress"'), "answers.half"),
        (JSON + "[commands.dim.extra]\n", "commands.dim.extra"),
        (JSON + '[commands.bad]\ntext = "1"\n', "commands.bad.text"),
        (JSON + '[commands."a b"]\n', "commands.a b"),
        (JSON + '[commands.bad]\nparams = {type = "wrong"}\n', "commands.bad.params"),
        (JSON + '[commands.bad]\nparams = {"$ref" = "http://127.0.0.1:9/x"}\n', "commands.bad.params"),
        (
            JSON + '[commands.bad.params.properties.a]\ntype = "integer"\ndefault = "x"\n',
            "commands.bad.params.properties.a.default",
        ),
        (BARE + "[commands.shut]\n", "commands.shut.text"),
        (BARE + '[commands.shut]\ntext = "O"\n', "commands.shut.text"),
        ("carries_ids = true\n" + BARE, "carries_ids"),
        ('grants = "EdDSA"\n' + BARE, "grants"),
        ('grants = "HS256"\n' + BARE, "grants"),
        ("open = true\n" + BARE, "open"),
        ("any_params = true\n" + BARE, "any_params"),
        (BARE + '[commands.open.params]\ntype = "object"\n', "commands.open.params"),
        ("max_in_flight = 2\n" + BARE, "max_in_flight"),
        ('presence = "none"\ncompletes_on = "published"\n' + BARE, "commands.open.completes_on"),
        (BARE.replace('done = "executed"', 'done = "finished"'), "answers"),
        (BARE.replace('done = "executed"', '" done" = "executed"'), "answers. done"),
        ('name = "x"', "commands"),
        ('commands = 5\nname = "x"', "commands"),
        ('name = "x"\n[commands]\ny = 5', "commands.y"),
        ("open = true", "name"),
        ("open = yes", ""),
    ],
)
def test_the_error_of_a_wrong_file_names_the_key(text: str, key: str) -> None:
    with pytest.raises(BadType) as refused:
        load_type(text)

    assert refused.value.key == key
    assert refused.value.right


def test_the_error_names_file_key_value_and_what_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "lamp.toml"
    path.write_text("max_in_flight = 101\n" + JSON)

    with pytest.raises(BadType, match=r"lamp\.toml: max_in_flight = 101: .*100"):
        load_type(path)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('name = "x"\npayload = "xml"\n[commands.a]\n', "bare, json, msgpack (got 'xml')"),
        ('name = "x"\ntransports = ["mqtt", "fax"]\n[commands.a]\n', "heartbeat, mqtt, relay (got 'fax')"),
        ('name = "x"\n[commands.a]\ncompletes_on = 1\n', "executed, published"),
    ],
)
def test_a_wrong_word_is_answered_with_all_allowed_ones(text: str, allowed: str) -> None:
    with pytest.raises(BadType) as refused:
        load_type(text)
    assert refused.value.right == f"must be one of {allowed}"


def test_a_missing_file_is_an_invalid_type(tmp_path: Path) -> None:
    with pytest.raises(BadType, match="cannot be read"):
        load_type(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("grants", "carried", "algorithm"),
    [("", True, "EdDSA"), ('"EdDSA"', True, "EdDSA"), ('"HS256"', True, "HS256"), ('"none"', False, "EdDSA")],
)
def test_a_type_defines_its_grant_algorithm(grants: str, carried: bool, algorithm: str) -> None:
    definition = load_type((f"grants = {grants}\n" if grants else "") + JSON).definition("dim")

    assert (definition.carries_grant, definition.grant_algorithm) == (carried, algorithm)


def test_a_command_may_have_its_own_answers() -> None:
    gate = load_type(BARE + '[commands.shut]\ntext = "S"\nanswers = { closed = "executed" }\n')

    assert gate.definition("open").answers == {"done": "executed"}
    assert gate.definition("shut").answers == {"closed": "executed"}
    assert gate.words == {"done": "executed", "closed": "executed"}


def test_a_topic_suffix_may_have_several_levels() -> None:
    lamp = load_type('command_suffix = "cmnd/POWER"\nanswer_suffix = "stat/POWER"\n' + JSON)

    assert lamp.definition("dim").command_suffix == "cmnd/POWER"


def test_a_result_is_checked_against_the_schema_of_its_commands_creation() -> None:
    rule = '[commands.read]\nresult = {type = "object", required = ["celsius"]}\n'
    definition = load_type(JSON + rule).definition("read")

    assert definition.result_fault({"celsius": 21.5}) is None
    assert definition.result_fault({"kelvin": 294}) == '"celsius" is a required property'
    assert definition.result_fault(None) is not None
    assert load_type(JSON).definition("dim").result_fault({"anything": 1}) is None


def test_the_reason_does_not_repeat_the_value_of_a_result() -> None:
    rule = '[commands.read]\nresult = {type = "object", properties = {pin = {type = "integer"}}}\n'

    fault = load_type(JSON + rule).definition("read").result_fault({"pin": "my secret"})

    assert fault is not None
    assert fault.startswith("pin: ")
    assert "my secret" not in fault


def test_a_definition_from_an_older_log_is_read() -> None:
    old = msgspec.to_builtins(load_type(JSON).definition("dim"))
    del old["grant_algorithm"], old["result_schema"]

    assert msgspec.convert(old, Definition) == load_type(JSON).definition("dim")


@pytest.mark.parametrize("number", ["9" * 5_000, "0x" + "f" * 5_000, "9223372036854775808"])
def test_a_number_of_more_than_64_bits_is_refused(number: str) -> None:
    for line in (f"max_attempts = {number}", f"[commands.lock.params.properties.x]\nmaximum = {number}"):
        with pytest.raises(BadType, match="64 bits"):
            load_type(f'name = "x"\nopen = true\n{line}')


def test_a_deeply_nested_file_is_refused() -> None:
    for levels in (200, 5_000):
        with pytest.raises(BadType, match="nested"):
            load_type('name = "x"\nopen = true\ntitle = ' + "[" * levels + "]" * levels)
