"""Devices that are nothing but mosquitto_sub and mosquitto_pub, at the embedded server and at Mosquitto."""

from __future__ import annotations

import json
import time
from datetime import datetime

from broker.mqtt.link import BACKOFF_SEC
from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import Broker, Device, executed, made, until

# What the broker may take to find its server again.
BACK_SEC = BACKOFF_SEC[1] + 20


def added(broker: Broker, hardware_id: str, type: str) -> Device:
    """A device made on the command line, at the embedded server."""
    return Device(
        broker.mqtt_port, hardware_id, made(broker.ordain("devices", "add", hardware_id, "--type", type))
    )


def passed(moment: str) -> bool:
    return time.time() > datetime.fromisoformat(moment).timestamp()


# --- the embedded server ---------------------------------------------------------------------------


def test_a_json_device_gets_what_waited_for_it_and_its_answer_counts(broker: Broker) -> None:
    door = added(broker, "door-7", "generic")
    command_id = broker.create("door-7", "unlock", params={"for_sec": 5})
    assert broker.command(command_id)["state"] == "pending"

    got = json.loads(door.next())
    assert door.say(executed(command_id, locked=False)) == 0

    command = broker.reaches(command_id, "executed")
    assert (got["id"], got["type"], got["params"]) == (command_id, "unlock", {"for_sec": 5})
    assert (got["attempt"], got["expires_at"]) == (1, command["expires_at"])
    assert got["grant"].count(".") == 2
    assert command["result"] == {"locked": False}
    assert broker.events(command_id) == ["created", "published", "executed"]


def test_a_device_that_knows_only_digits_gets_a_bare_1_and_says_ack_and_ok(broker: Broker) -> None:
    lock = added(broker, "ABC123", "iotee_device")
    listening = lock.listen()
    until(lambda: broker.http("GET", "/v1/devices/ABC123").json()["presence"] == "online")
    command_id = broker.create("ABC123")

    assert lock.next(listening) == "1"
    assert lock.say("ack", "ok") == 0

    broker.reaches(command_id, "executed")
    assert broker.events(command_id) == ["created", "published", "acknowledged", "executed"]


def test_a_wrong_token_does_not_get_in(broker: Broker) -> None:
    added(broker, "door-7", "generic")
    other = added(broker, "door-8", "generic")

    for token in ("dtok_wrong", other.token, ""):
        intruder = Device(broker.mqtt_port, "door-7", token)
        assert intruder.say(executed("cmd_any")) != 0
        assert intruder.listen().wait() != 0


def test_a_device_neither_hears_nor_answers_for_another(broker: Broker) -> None:
    door, spy = added(broker, "door-7", "generic"), added(broker, "spy", "generic")
    for topic in (door.topic("rls"), "iotee/dev/+/rls", "#"):
        listening = spy.listen(topic=topic)
        listening.wait()
        assert "denied" in listening.err.all() + listening.out.all()
    command_id = broker.create("door-7")

    door.next()
    spy.say(executed(command_id, by="spy"), topic=door.topic("ack"))
    spy.say(executed(command_id, by="spy"))
    until(lambda: "reason=wrong_device" in broker.said())
    assert broker.command(command_id)["state"] == "published"
    door.say(executed(command_id, by="door"))

    assert broker.reaches(command_id, "executed")["result"] == {"by": "door"}


# --- Mosquitto -------------------------------------------------------------------------------------


def test_with_mosquitto_a_device_gets_its_commands_when_it_has_said_online(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    door = Device(mosquitto.port, "door-7", own_server=False)
    broker.device("door-7")
    door.subscribe()
    command_id = broker.create("door-7")
    until(lambda: not broker.not_ready())
    assert broker.command(command_id)["state"] == "pending"

    door.online()
    got = json.loads(door.next(door.listen("rls", "-c")))
    door.say(executed(command_id))

    broker.reaches(command_id, "executed")
    assert (got["id"], got["attempt"]) == (command_id, 1)


def test_with_mosquitto_a_digits_only_device_need_not_say_anything_first(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    lock = Device(mosquitto.port, "ABC123", own_server=False)
    broker.device("ABC123", "iotee_device")
    lock.subscribe()
    command_id = broker.create("ABC123")

    assert lock.next(lock.listen("rls", "-c")) == "1"
    lock.say("ack", "ok")

    broker.reaches(command_id, "executed")


def test_answers_given_while_the_broker_is_down_are_taken_in_before_time_runs_out_on_them(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    door = Device(mosquitto.port, "door-7", own_server=False)
    broker.device("door-7")
    door.subscribe()
    door.online()
    command_id = broker.create("door-7", ttl_sec=3)
    door.next(door.listen("rls", "-c"))
    expires_at = broker.command(command_id)["expires_at"]

    broker.kill()
    assert door.say(executed(command_id)) == 0
    until(lambda: passed(expires_at))
    broker.start()

    broker.reaches(command_id, "executed")
    assert broker.events(command_id) == ["created", "published", "executed"]


def test_commands_wait_while_mosquitto_is_away_and_go_out_when_it_is_back(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    lock = Device(mosquitto.port, "ABC123", own_server=False)
    broker.device("ABC123", "iotee_device")
    until(lambda: not broker.not_ready())

    mosquitto.kill()
    assert until(broker.not_ready) == ["mqtt: not connected to the MQTT server"]
    command_id = broker.create("ABC123")
    assert broker.command(command_id)["state"] == "pending"
    mosquitto.start()
    lock.subscribe()

    assert lock.next(lock.listen("rls", "-c")) == "1"
    lock.say("ack", "ok")
    broker.reaches(command_id, "executed")
    until(lambda: not broker.not_ready(), within=BACK_SEC)
    assert len(broker.runs) == 1
