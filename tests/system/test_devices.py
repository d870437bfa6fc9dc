"""Devices made only of mosquitto_sub and mosquitto_pub, at the embedded server and at Mosquitto."""

from __future__ import annotations

import json
import time
from datetime import datetime

from broker.mqtt.client.link import BACKOFF_SEC
from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import Broker, Device, executed, made, until

# The longest time in seconds that the broker may need to reconnect to its MQTT server.
BACK_SEC = BACKOFF_SEC[1] + 20


def added(broker: Broker, hardware_id: str, type: str) -> Device:
    """A device at the embedded server, registered on the command line."""
    return Device(
        broker.mqtt_port, hardware_id, made(broker.ordain("devices", "add", hardware_id, "--type", type))
    )


def passed(moment: str) -> bool:
    return time.time() > datetime.fromisoformat(moment).timestamp()


# --- the embedded server ---------------------------------------------------------------------------


def test_a_json_device_gets_its_waiting_command_and_its_answer_is_recorded(broker: Broker) -> None:
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


def test_a_bare_device_gets_1_and_answers_ack_and_ok(broker: Broker) -> None:
    lock = added(broker, "ABC123", "iotee_device")
    listening = lock.listen()
    until(lambda: broker.http("GET", "/v1/devices/ABC123").json()["presence"] == "online")
    command_id = broker.create("ABC123")

    assert lock.next(listening) == "1"
    assert lock.say("ack", "ok") == 0

    broker.reaches(command_id, "executed")
    assert broker.events(command_id) == ["created", "published", "acknowledged", "executed"]


def test_a_wrong_token_is_refused(broker: Broker) -> None:
    added(broker, "door-7", "generic")
    other = added(broker, "door-8", "generic")

    for token in ("dtok_wrong", other.token, ""):
        intruder = Device(broker.mqtt_port, "door-7", token)
        assert intruder.say(executed("cmd_any")) != 0
        assert intruder.listen().wait() != 0


def test_a_device_cannot_read_or_answer_for_another_device(broker: Broker) -> None:
    door, spy = added(broker, "door-7", "generic"), added(broker, "spy", "generic")
    for topic in (door.topic("rls"), "iotee/dev/door-7/#", "iotee/evt/#"):
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


def test_with_mosquitto_a_device_gets_its_commands_after_online(
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


def test_with_mosquitto_a_bare_device_need_not_report_online(
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


def test_answers_given_while_the_broker_is_down_are_recorded_before_timeouts(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    door = Device(mosquitto.port, "door-7", own_server=False)
    broker.device("door-7")
    door.subscribe()
    door.online()
    until(lambda: broker.http("GET", "/v1/devices/door-7").json()["presence"] == "online")
    listening = door.listen("rls", "-c")
    # It must be sent and the broker killed before it expires; then the test waits for the expiry.
    command_id = broker.create("door-7", ttl_sec=10)
    door.next(listening)
    expires_at = broker.command(command_id)["expires_at"]

    broker.kill()
    assert door.say(executed(command_id)) == 0
    until(lambda: passed(expires_at))
    broker.start()

    broker.reaches(command_id, "executed")
    assert broker.events(command_id) == ["created", "published", "executed"]


def test_commands_wait_while_mosquitto_is_down_and_go_out_afterwards(
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
