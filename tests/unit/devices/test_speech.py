"""Descriptions of bought devices: patterns of topics, templates, JMESPath with bounds, rules, checks."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from broker.type_files import load_beside, load_types, topic_faults
from devices.speech.answers import trial
from devices.speech.expressions import BadExpression, Unanswerable, compiled, evaluate
from devices.speech.messages import Unreadable, decoded
from devices.speech.rules import Decoded, Reading, Rule, holds, read
from devices.speech.templates import Facts, Missing, filled, filled_text
from devices.speech.topics import Owner, Router, clash, covers, owner_of, pattern_fault, topic_of
from devices.types import BadType, load_type, shipped_types

FACTS = Facts("cmd_1", 7, "Ring", {"level": 3, "to": {"room": "hall"}}, 2, None, None, "iotee/rpc/a")


@pytest.mark.parametrize(
    "pattern",
    [
        "plant/in",
        "plant/dev-{hardware_id}",
        "plant/{hardware_id}/+",
        "plant/{hardware_id}/#",
        "$SYS/{hardware_id}",
        "plant/{prefix}/{hardware_id}",
        "{prefix}/evt/{hardware_id}",
        "{hardware_id}/{hardware_id}",
        "a/{id}/{name}",
        "{gateway}/status",
        "{gateway}/{name}/{gateway}",
        "",
        "{hardware_id}" + "/x" * 200,
    ],
)
def test_a_pattern_that_could_belong_to_two_devices_or_is_no_topic_is_refused(pattern: str) -> None:
    assert pattern_fault(pattern) is not None


@pytest.mark.parametrize(
    "pattern", ["/plant//{name}", "{hardware_id}/status/switch:0", "a b/{hardware_id}/{name}/é"]
)
def test_levels_may_hold_what_mqtt_allows(pattern: str) -> None:
    assert pattern_fault(pattern) is None


def test_a_topic_names_its_device() -> None:
    assert owner_of("iotee/rpc/{hardware_id}/rpc", "iotee/rpc/lamp/rpc") == Owner("{hardware_id}", "lamp")
    assert owner_of("z/{name}", "z/kitchen lamp") == Owner("{name}", "kitchen lamp")
    assert owner_of("z/{name}", "z/a/b") is None
    assert owner_of("{gateway}/{name}", "garage/relay") == Owner("{name}", "relay", "garage")
    assert owner_of("{gateway}/{hardware_id}", "garage/r1") == Owner("{hardware_id}", "r1")
    assert topic_of("{gateway}/{name}", "a", "r1", "relay", "garage") == "garage/relay"
    assert topic_of("{gateway}/{name}", "a", "garage", "relay") == "garage/relay"
    assert clash("{gateway}/x/{name}", "{hardware_id}/x/{name}")
    assert topic_of("{prefix}/{hardware_id}/{name}", "a/b", "lamp", "desk") == "a/b/lamp/desk"
    found = Router(["z/{name}", "{hardware_id}/online"]).owners("z/online")
    assert found == [Owner("{name}", "online"), Owner("{hardware_id}", "z")]
    assert clash("z/{name}", "z/{hardware_id}")
    assert not clash("z/{name}", "{hardware_id}/online")
    assert covers("stat/#", "stat/{hardware_id}/RESULT")
    assert covers("a/#", "a/b/dev/{hardware_id}/ack")
    assert not covers("stat/lamp/#", "stat/{hardware_id}/RESULT")
    assert not covers("lamp/#", "{hardware_id}/online")
    assert not covers("a/b", "a/b/{name}")


def test_a_template_is_filled_with_typed_values() -> None:
    template = {
        "id": "$number",
        "cmd": "$id",
        "what": "$type",
        "all": "$params",
        "room": "$params.to.room",
        "n": ["$attempt"],
        "until": "$expires_at",
        "gone": "$params.none",
        "cash": "$$id",
        "text": "level $params.level",
        "src": "$reply_topic",
    }
    assert filled(template, FACTS) == {
        "id": 7,
        "cmd": "cmd_1",
        "what": "Ring",
        "all": FACTS.params,
        "room": "hall",
        "n": [2],
        "until": None,
        "cash": "$id",
        "text": "level $params.level",
        "src": "iotee/rpc/a",
    }


def test_a_text_is_filled_as_its_parameters_are_declared() -> None:
    kinds = {"a": "integer", "b": "number", "c": "boolean"}
    text = filled_text(
        "{params.a} {params.b} {params.c} {params.d} {x}", {"a": 5.0, "b": 5.0, "c": True, "d": "z"}, kinds
    )
    assert text == "5 5.0 true z {x}"
    with pytest.raises(Missing, match=r"params\.a"):
        filled_text("{params.a}", {}, kinds)


@pytest.mark.parametrize(
    "expression", ["", "a ==", "nothing(@)", "a" * 1_025, "!" * 900 + "a", "a\0", "[" * 40 + "a" + "]" * 40]
)
def test_an_expression_that_is_wrong_or_too_large_is_refused(expression: str) -> None:
    with pytest.raises(BadExpression):
        compiled(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "|".join(["[@,@][]"] * 15),
        "|".join(["join('', [@,@])"] * 30),
        "|".join(["[@,@,@]"] * 15 + ["[]"] * 15),
        "|".join(["[@,@]"] * 18),
        "|".join(["[@,@]"] * 24) + "|to_string(@)",
        "|".join(["{a:@,b:@}"] * 22) + "== `1`",
    ],
)
def test_an_expression_that_grows_is_stopped(expression: str) -> None:
    for message in ([1, 2, 3], "abc"):
        try:
            assert len(str(evaluate(compiled(expression), message))) < 1_000_000
        except Unanswerable:
            continue


def test_a_message_cannot_make_an_expression_take_much_memory() -> None:
    message = {"separator": "x" * 30_000, "texts": [""] * 10_000}
    tracemalloc.start()
    try:
        with pytest.raises(Unanswerable, match="steps"):
            evaluate(compiled("join(separator, texts)"), message)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert evaluate(compiled("join('-', ['a', 'b'])"), message) == "a-b"


def test_parameters_are_compared_as_values() -> None:
    for value in (3, "3", None, {"a": [1]}, "' || `true` || '"):
        condition = "level == $params.to.level && name == '$params.x'"
        message = Decoded({"level": value, "name": "$params.x"})
        assert holds(condition, message, {"to": {"level": value}})
        assert not holds(condition, message, {"to": {"level": "other"}})
    assert not holds("level == $params.level", Decoded({}), {})


def test_the_first_rule_that_fits_decides() -> None:
    rules = [
        Rule(when="error", status="failed", number="id", error="error"),
        Rule(when="id", status="executed", number="id", result="r"),
        Rule(status="acknowledged", topic="other"),
    ]
    assert read(rules, "t", Decoded({"id": 4, "r": 1, "error": "no"})) == Reading(
        0, "failed", number=4, error="no"
    )
    assert read(rules, "t", Decoded({"id": 4.0, "r": 1})) == Reading(1, "executed", number=4, result=1)
    why = read(rules, "t", Decoded({"id": "x"}))
    assert isinstance(why, str)
    assert "rule 2" in why
    assert read(rules, "other", Decoded({})) == Reading(2, "acknowledged")
    assert read([Rule(when="ok", status="executed")], "t", Decoded("ok", "ok")) == Reading(0, "executed")
    assert read([Rule(when="1", status="executed")], "t", Decoded(1, "1")) == Reading(0, "executed")


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[" * 70 + b"]" * 70,
        b"[" * 9_000,
        b"\xff",
        b"x" * 70_000,
        b"\x81\xa1a\xc4\x01x",
        b'{"a":1e999}',
    ],
)
def test_an_unreadable_message_raises_nothing_else(payload: bytes) -> None:
    with pytest.raises(Unreadable):
        decoded(payload)


def test_messages_are_read_as_json_msgpack_or_text() -> None:
    assert decoded(b' {"a": 1}\0') == Decoded({"a": 1}, '{"a": 1}')
    assert decoded(b"true") == Decoded(True, "true")
    assert decoded(b"Online\n") == Decoded("Online", "Online")
    assert decoded(b"\x81\xa1a\x01") == Decoded({"a": 1}, None)


BASE = """name = "x"
command_topic = "x/{hardware_id}/in"
answer_topics = ["x/{hardware_id}/out"]
"""
COMMAND = "[commands.a]\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('command_topic = "x/in"\n' + COMMAND, "command_topic"),
        ('command_topic = "x/{hardware_id}/{command}"\nopen = true\n', "command_topic"),
        (BASE.replace("/out", "/in") + COMMAND, "answer_topics"),
        (BASE + 'template = { id = "$nummer" }\n' + COMMAND, "commands.a.template"),
        (BASE + 'payload = "bare"\ntemplate = { }\n' + COMMAND + 'text = "x"\n', "template"),
        (BASE + '[[answers]]\nwhen = "a =="\nstatus = "executed"\n' + COMMAND, "answers[0].when"),
        (BASE + '[[answers]]\nstatus = "done"\n' + COMMAND, "answers[0].status"),
        (BASE + '[[answers]]\nresult = "("\nstatus = "executed"\n' + COMMAND, "answers[0].result"),
        (BASE + '[[answers]]\nstatus = "progress"\n' + COMMAND, "answers[0].progress"),
        (BASE + '[[answers]]\nwen = "a"\nstatus = "executed"\n' + COMMAND, "answers[0].wen"),
        (BASE + COMMAND + 'done_when = "on"\n', "commands.a.done_when"),
        (BASE + 'presence_topic = "x/{hardware_id}/p"\n' + COMMAND, "online"),
        (BASE + COMMAND + 'wire_name = "a/b"\n', "commands.a.wire_name"),
        (BASE + '[query]\ntopic = "x/{hardware_id}/q"\n' + COMMAND, "query.text"),
        (
            BASE + COMMAND + 'template = { a = "$params.b" }\nparams = { properties = { c = {} } }\n',
            "commands.a.template",
        ),
        (
            BASE + 'payload = "bare"\n' + COMMAND + 'text = "{params.b}"\nparams.properties.b = {}\n',
            "commands.a.text",
        ),
        (BASE + 'max_in_flight = 2\n[[answers]]\nstatus = "executed"\n' + COMMAND, "max_in_flight"),
    ],
)  # fmt: skip
def test_a_wrong_description_names_its_key(text: str, key: str) -> None:
    with pytest.raises(BadType) as wrong:
        load_type(text if "name =" in text else 'name = "x"\n' + text)
    assert wrong.value.key == key


def test_shipped_types_share_no_topic() -> None:
    for kind in shipped_types().values():
        others = {name: other for name, other in shipped_types().items() if name != kind.name}
        assert list(topic_faults(kind, others, "iotee")) == []


def test_a_type_that_has_the_topics_of_another_is_refused_unless_it_says_so(tmp_path: Path) -> None:
    file = tmp_path / "plug.toml"
    text = BASE.replace("x/{hardware_id}/out", "stat/{hardware_id}/RESULT")
    file.write_text(text + COMMAND)
    with pytest.raises(BadType, match="tasmota") as wrong:
        load_beside(file, shipped_types())
    assert wrong.value.key == "answer_topics"
    file.write_text(text + 'shares_topics_with = ["tasmota"]\n' + COMMAND)
    assert "x" in load_types(str(tmp_path))
    file.write_text(BASE.replace("x/{hardware_id}/out", "zigbee2mqtt/{hardware_id}") + COMMAND)
    with pytest.raises(BadType, match="zigbee2mqtt"):
        load_types(str(tmp_path))
    file.write_text(BASE.replace("x/{hardware_id}/out", "site/dev/{hardware_id}/rls") + COMMAND)
    with pytest.raises(BadType, match="a device of type gateway"):
        load_types(str(tmp_path), "site")


def test_a_bought_device_gets_no_grant_and_its_commands_are_sent_once_unless_told_otherwise() -> None:
    kind = load_type(BASE + 'template = { id = "$id" }\n' + COMMAND)
    definition = kind.definition("a")
    assert (definition.carries_grant, definition.repeatable, definition.carries_ids) == (False, False, True)
    shelly = shipped_types()["shelly_gen2"]
    assert [shelly.definition(name).repeatable for name in ("turn_on", "toggle")] == [True, False]
    assert shelly.definition("turn_on").carries_ids
    assert not shipped_types()["tasmota"].definition("turn_on").carries_ids


# As the makers' documentation and public traces show them; each line names its source and version.
MESSAGES = (Path(__file__).parent / "messages.jsonl").read_text().splitlines()


@pytest.mark.parametrize("line", MESSAGES)
def test_the_messages_of_bought_devices_are_understood(line: str) -> None:
    said = json.loads(line)
    kind, payload = shipped_types()[said["type"]], said["payload"].encode()
    found = trial(kind, "iotee", said["topic"], payload, said["params"], [said["command"]])
    assert [(each.event, each.evidence) for each in found.commands] == [(said["event"], said["evidence"])]


@pytest.mark.parametrize(
    ("kind", "topic", "payload", "presence"),
    [
        ("shelly_gen2", "shellyplus1-a8032abe54dc/online", "true", "online"),
        ("shelly_gen1", "shellies/shelly1-B929CC/online", "false", "offline"),
        ("tasmota", "tele/tasmota_9CF9D1/LWT", "Online", "online"),
        ("tasmota", "tele/tasmota_9CF9D1/LWT", "online", None),
        ("zigbee2mqtt", "zigbee2mqtt/lamp/availability", '{"state":"offline"}', "offline"),
        ("zigbee2mqtt", "zigbee2mqtt/lamp/availability", "online", "online"),
        ("esphome_switch", "garage/status", "offline", "offline"),
        ("generic", "iotee/dev/lamp/status", '{"status":"online"}', "online"),
    ],
)
def test_words_of_presence_are_understood(kind: str, topic: str, payload: str, presence: str | None) -> None:
    found = trial(shipped_types()[kind], "iotee", topic, payload.encode(), {})
    assert (found.presence, found.malformed is None) == (presence, presence is not None)
