"""Devices announced to Home Assistant over a real Mosquitto, read as Home Assistant's documentation says.

Sources: home-assistant.io/integrations/mqtt (discovery topic and payload) and
/integrations/binary_sensor.mqtt (keys; an empty template result is ignored, `None` means unknown).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import jinja2
import pytest
import yaml  # type: ignore[import-untyped]

from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.mqtt.test_bought_devices import Connected, order
from tests.system.support import WITHIN_SEC, Broker, until

# The keys of a binary sensor that the page documents, as far as they may be used here.
KEYS = {
    "unique_id", "name", "device_class", "state_topic", "value_template", "payload_on", "payload_off", "qos",
    "device", "origin",
}  # fmt: skip
ROOT = Path(__file__).parents[3]
DEVICE_CLASSES = {"lock", "power"}
END = "reader/end"


def configs_at(server: Mosquitto) -> dict[str, dict[str, Any]]:
    """What a client gets that subscribes now, as Home Assistant does at its start: retained messages."""
    home = Connected(server.port, "reader", None, ["homeassistant/#", END], lambda *_: [], ("", ""))
    try:
        assert home.ready.wait(WITHIN_SEC)
        home.say(END, "all retained messages came before this one")
        until(lambda: any(each.topic == END for each in home.heard))
    finally:
        home.end()
    return {each.topic: json.loads(each.payload) for each in home.heard if each.retain}


def door_of(server: Mosquitto, client_id: str) -> Connected:
    """A device that says `ok` to each command for `door`."""
    say_ok = [("iotee/dev/door/ack", "ok")]
    door = Connected(server.port, client_id, None, ["iotee/dev/door/rls"], lambda *_: say_ok, ("", ""))
    assert door.ready.wait(WITHIN_SEC)
    return door


def test_locks_and_switches_are_announced_follow_their_events_and_are_removed(
    new_broker: NewBroker, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    broker = with_setting(new_broker, tmp_path, mosquitto)
    path = "homeassistant/binary_sensor/ordain/{}/config"
    before = broker.http(
        "POST", "/v1/devices", {"hardware_id": "door", "type": "iotee_device", "name": "Door"}
    )
    broker.device("recorder-1", "recorder")
    broker.device("plug", "home_assistant_switch")
    door = path.format(before.json()["id"])
    plug = path.format(broker.http("GET", "/v1/devices/plug").json()["id"])
    found = until(lambda: configs if (configs := configs_at(mosquitto)).keys() == {door, plug} else None)

    assert [each["device_class"] for each in (found[door], found[plug])] == ["lock", "power"]
    for config in found.values():
        assert config.keys() <= KEYS
        assert config["device_class"] in DEVICE_CLASSES
        assert config["device"]["identifiers"] == [config["unique_id"]]
        assert config["origin"]["name"] == "Ordain"
        assert "command_topic" not in config
    assert found[door]["device"]["name"] == "Door"
    assert found[door]["state_topic"] == "iotee/evt/door/+"

    states: list[str] = []
    template = jinja2.Environment(autoescape=False).from_string(found[door]["value_template"])

    def event(topic: str, payload: bytes) -> list[tuple[str, str]]:
        states.append(template.render(value_json=json.loads(payload)).strip())
        return []

    listener = Connected(
        mosquitto.port, "home-assistant", None, [found[door]["state_topic"]], event, ("", "")
    )
    lock = door_of(mosquitto, "lock")
    assert listener.ready.wait(WITHIN_SEC)
    for command in ("unlock", "lock"):
        assert order(broker, "door", command)["state"] == "executed"
    until(lambda: [each for each in states if each] == ["ON", "OFF"] or None, lambda: str(states))

    broker.http("PATCH", "/v1/devices/door", {"name": "Front door"})
    until(lambda: configs_at(mosquitto)[door]["device"]["name"] == "Front door" or None)
    broker.http("DELETE", "/v1/devices/plug?force=true")
    until(lambda: configs_at(mosquitto).keys() == {door} or None)
    assert broker.end() == 0
    broker.ordain("devices", "delete", "door", "--force", "--yes")
    broker.start()
    until(lambda: configs_at(mosquitto) == {} or None)
    for each in (listener, lock):
        each.end()


def test_a_button_of_the_page_makes_a_durable_command_and_its_entity_shows_what_came_of_it(
    new_broker: NewBroker, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    broker = with_setting(new_broker, tmp_path, mosquitto)
    door_named = {"hardware_id": "door", "type": "iotee_device", "name": "Front door"}
    broker.http("POST", "/v1/devices", door_named)
    page = (ROOT / "docs/how-to/home-assistant.md").read_text()
    here = page.replace("http://192.0.2.10:8080", broker.url).replace("sk_live_…", broker.key)
    blocks = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", here, re.DOTALL))
    config = next(each for each in blocks if "rest_command" in each)
    call = config["rest_command"]["ordain"]
    lock = config["template"][0]["lock"][0]
    found = until(lambda: list(configs_at(mosquitto).values()) or None)
    entity = f"binary_sensor.{found[0]['device']['name'].lower().replace(' ', '_')}"
    states = {entity: "unknown"}
    environment = jinja2.Environment(autoescape=False)
    shown = environment.from_string(lock["state"], {"states": states.__getitem__})
    sensor = environment.from_string(found[0]["value_template"])

    def event(topic: str, payload: bytes) -> list[tuple[str, str]]:
        if state := sensor.render(value_json=json.loads(payload)).strip():
            states[entity] = {"ON": "on", "OFF": "off"}.get(state, "unknown")
        return []

    def press(button: str) -> Any:
        """As the integrations `template` and `rest_command` do it."""
        (step,) = lock[button]
        assert step["action"] == "rest_command.ordain"
        url, payload = (environment.from_string(call[key]).render(step["data"]) for key in ("url", "payload"))
        headers = call["headers"] | {"Content-Type": call["content_type"]}
        wait = float(url.rpartition("?wait=")[2])
        assert wait < call["timeout"] < WITHIN_SEC
        url = url.replace(f"?wait={wait:g}", "?wait=60")  # a busy machine is slower than a door
        answer = httpx2.request(call["method"], url, headers=headers, content=payload, timeout=WITHIN_SEC)
        return answer.raise_for_status().json()

    home = Connected(mosquitto.port, "home", None, [found[0]["state_topic"]], event, ("", ""))
    door = door_of(mosquitto, "door")
    assert home.ready.wait(WITHIN_SEC)

    assert shown.render() == "None"
    for button, after in (("unlock", "unlocked"), ("lock", "locked")):
        pressed = press(button)
        assert (pressed["type"], pressed["state"]) == (button, "executed")
        until(lambda after=after: shown.render() == after or None)  # type: ignore[misc]
    for each in (home, door):
        each.end()


def with_setting(new_broker: NewBroker, tmp_path: Path, mosquitto: Mosquitto) -> Broker:
    settings = tmp_path / "ordain.toml"
    settings.write_text('home_assistant = "homeassistant"\n')
    return new_broker("--config", str(settings), "--mqtt-url", mosquitto.url).start()


@pytest.mark.parametrize("text", ['home_assistant = "homeassistant"', 'home_assistant = "a/b"'])
def test_it_needs_an_external_server_and_one_level(new_broker: NewBroker, tmp_path: Path, text: str) -> None:
    settings = tmp_path / "ordain.toml"
    settings.write_text(f"{text}\n")
    broker = new_broker()

    said = broker.ordain("serve", "--config", str(settings))

    assert said.returncode == 2
    assert "home_assistant" in said.stderr
