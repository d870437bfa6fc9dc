"""Devices announced to Home Assistant over a real Mosquitto, read as Home Assistant's documentation says.

Sources: home-assistant.io/integrations/mqtt (discovery topic and payload) and
/integrations/binary_sensor.mqtt (keys; an empty template result is ignored, `None` means unknown).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.conftest import Mosquitto, program
from tests.system.conftest import NewBroker
from tests.system.mqtt.test_bought_devices import Connected, order
from tests.system.support import Broker, until

# The keys of a binary sensor that the page documents, as far as they may be used here.
KEYS = {
    "unique_id", "name", "device_class", "state_topic", "value_template", "payload_on", "payload_off", "qos",
    "device", "origin",
}  # fmt: skip
DEVICE_CLASSES = {"lock", "power"}


class Heard:
    """What a client gets that subscribes now, as Home Assistant does at its start: retained messages."""

    def __init__(self, server: Mosquitto) -> None:
        self.server = server

    def configs(self) -> dict[str, dict[str, Any]]:
        found = subprocess.run(
            [program("mosquitto_sub"), "-p", str(self.server.port), "-v", "-W", "1", "-t", "homeassistant/#"],
            capture_output=True,
            text=True,
        ).stdout
        lines = (line.partition(" ") for line in found.splitlines())
        return {topic: json.loads(payload) for topic, _, payload in lines}


def test_locks_and_switches_are_announced_follow_their_events_and_are_removed(
    new_broker: NewBroker, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    broker = with_setting(new_broker, tmp_path, mosquitto)
    home, path = Heard(mosquitto), "homeassistant/binary_sensor/ordain/{}/config"
    before = broker.http(
        "POST", "/v1/devices", {"hardware_id": "door", "type": "iotee_device", "name": "Door"}
    )
    broker.device("recorder-1", "recorder")
    broker.device("plug", "home_assistant_switch")
    door = path.format(before.json()["id"])
    plug = path.format(broker.http("GET", "/v1/devices/plug").json()["id"])
    found = until(lambda: configs if (configs := home.configs()).keys() == {door, plug} else None)

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
    lock = Connected(
        mosquitto.port,
        "lock",
        None,
        ["iotee/dev/door/rls"],
        lambda *_: [("iotee/dev/door/ack", "ok")],
        ("", ""),
    )
    assert listener.ready.wait(60)
    assert lock.ready.wait(60)
    for command in ("unlock", "lock"):
        assert order(broker, "door", command)["state"] == "executed"
    until(lambda: [each for each in states if each] == ["ON", "OFF"] or None, lambda: str(states))

    broker.http("PATCH", "/v1/devices/door", {"name": "Front door"})
    until(lambda: home.configs()[door]["device"]["name"] == "Front door" or None)
    broker.http("DELETE", "/v1/devices/plug?force=true")
    until(lambda: home.configs().keys() == {door} or None)
    assert broker.end() == 0
    broker.ordain("devices", "delete", "door", "--force", "--yes")
    broker.start()
    until(lambda: home.configs() == {} or None)
    for each in (listener, lock):
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
