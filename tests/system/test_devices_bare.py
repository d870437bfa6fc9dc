"""Devices that know only texts, over MQTT 3.1.1, at both servers: every command and answer, one-way ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import Broker, Device, made, until

SIREN = """
name = "siren"
payload = "bare"
completes_on = "published"
presence = "required"
[commands.sound]
text = "on"
[commands.hush]
text = "off"
"""
# Which answers end a command, and how it is shown then.
LIVES = (
    ("lock", "rls", "1", ("ack", "ok"), "completed"),
    ("unlock", "rls", "0", ("ok",), "completed"),
    ("lock", "rls", "1", ("error",), "failed"),
    ("reboot", "rbt", "1", ("ok",), "completed"),
)


def lives(broker: Broker, lock: Device) -> None:
    """One command after the other; each answer can only mean the one that is in flight."""
    for command, suffix, payload, answers, status in LIVES:
        listening = lock.listen(suffix, "-V", "311")
        if not lock.separate:
            until(lambda: broker.http("GET", "/v1/devices/ABC123").json()["presence"] == "online")
        sent = broker.http("POST", "/devices/ABC123/commands", {"command": command}).json()

        assert sent["topic"] == lock.topic(suffix)
        assert lock.next(listening) == payload
        assert lock.say(*answers) == 0

        broker.reaches(sent["command_id"], "failed" if status == "failed" else "executed")
        record = broker.http("GET", f"/commands/{sent['command_id']}").json()
        assert record["status"] == status
        assert (record["acknowledged_at"] is None) == ("ack" not in answers)
        assert (record["completed_at"] is None) == (status == "failed")


def test_every_bare_command_is_carried_and_answered_at_the_embedded_server(broker: Broker) -> None:
    token = made(broker.ordain("devices", "add", "ABC123", "--type", "iotee_device"))
    lives(broker, Device(broker.mqtt_port, "ABC123", token))


def test_every_bare_command_is_carried_and_answered_at_mosquitto(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url + "?v=3.1.1").start()
    broker.device("ABC123", "iotee_device")
    until(lambda: not broker.not_ready())
    lives(broker, Device(mosquitto.port, "ABC123", own_server=False))


@pytest.fixture
def types(tmp_path: Path) -> Path:
    place = tmp_path / "types"
    place.mkdir()
    (place / "siren.toml").write_text(SIREN)
    return place


def test_a_device_that_cannot_answer_is_held_for_and_done_when_the_server_has_it(
    types: Path, mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    config = types.parent / "ordain.toml"
    config.write_text(f'types = "{types}"\n')
    broker = new_broker("--mqtt-url", mosquitto.url + "?v=3.1.1", "--config", str(config)).start()
    siren = Device(mosquitto.port, "SIREN", own_server=False)
    broker.device("SIREN", "siren")
    siren.subscribe()
    until(lambda: not broker.not_ready())
    sent = broker.http("POST", "/devices/SIREN/commands", {"command": "sound"}).json()
    assert broker.command(sent["command_id"])["state"] == "pending", "nobody has seen it yet"

    siren.online()

    assert siren.next(siren.listen("rls", "-c", "-V", "311")) == "on"
    broker.reaches(sent["command_id"], "executed")
    events = broker.http("GET", f"/v1/commands/{sent['command_id']}/events").json()["data"]
    assert [(each["type"], each["evidence"]) for each in events] == [
        ("created", "accepted"),
        ("published", "handed_over"),
        ("executed", "mqtt_puback"),
    ]
