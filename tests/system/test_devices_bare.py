"""Devices that use bare texts over MQTT 3.1.1, at both servers: every command, every answer, and one-way
commands."""

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
# Command, topic suffix, payload, answers, and the final status that the API shows.
LIVES = (
    ("lock", "rls", "1", ("ack", "ok"), "completed"),
    ("unlock", "rls", "0", ("ok",), "completed"),
    ("lock", "rls", "1", ("error",), "failed"),
    ("reboot", "rbt", "1", ("ok",), "completed"),
)


def lives(broker: Broker, lock: Device) -> None:
    """Runs one command after the other, because an answer without id counts for the command in flight."""
    for command, suffix, payload, answers, status in LIVES:
        if lock.separate:  # then the server keeps the command until the device listens
            lock.subscribe(suffix)
        listening = lock.listen(suffix, "-V", "311", *(["-c"] if lock.separate else []))
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


def test_every_bare_command_is_delivered_and_answered_at_the_embedded_server(broker: Broker) -> None:
    token = made(broker.ordain("devices", "add", "ABC123", "--type", "iotee_device"))
    lives(broker, Device(broker.mqtt_port, "ABC123", token))


def test_every_bare_command_is_delivered_and_answered_at_mosquitto(
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


def test_a_one_way_command_waits_for_its_device_and_is_done_on_the_servers_puback(
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
    assert broker.command(sent["command_id"])["state"] == "pending", "the device has not been online yet"

    siren.online()

    assert siren.next(siren.listen("rls", "-c", "-V", "311")) == "on"
    broker.reaches(sent["command_id"], "executed")
    events = broker.http("GET", f"/v1/commands/{sent['command_id']}/events").json()["data"]
    assert [(each["type"], each["evidence"]) for each in events] == [
        ("created", "accepted"),
        ("published", "handed_over"),
        ("executed", "mqtt_puback"),
    ]
