"""`ordain serve --mqtt-server mosquitto`: an installed Mosquitto as a child, with the registry's devices."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import program
from tests.system.conftest import NewBroker
from tests.system.support import Broker, Device, executed, one_sentence, until


@pytest.fixture
def broker(new_broker: NewBroker) -> Broker:
    started = new_broker("--mqtt-server", "mosquitto").start()
    started.mqtt_port = port_of(started)
    return started


def port_of(broker: Broker) -> int:
    return int(broker.run.err.wait("event=mosquitto.up").split("port=")[1].split()[0])


def child(broker: Broker) -> int:
    return int((broker.data / "mosquitto" / "pid").read_text())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and b"mosquitto" in Path(f"/proc/{pid}/cmdline").read_bytes()


def gets_in(device: Device) -> bool:
    return device.say("online", suffix="status", retain=True) == 0


def lock(broker: Broker, device: Device) -> str:
    """Sends one command to a device with bare payloads and waits until it is executed."""
    device.subscribe()
    command_id = broker.create(device.hardware_id)
    assert device.next(device.listen("rls", "-c")) == "1"
    device.say("ok")
    broker.reaches(command_id, "executed")
    return command_id


def test_a_device_registered_while_it_runs_connects_and_executes(broker: Broker) -> None:
    device = Device(broker.mqtt_port, "ABC123", broker.device("ABC123", "iotee_device"))
    until(lambda: gets_in(device))
    assert broker.events(lock(broker, device)) == ["created", "published", "executed"]


def test_a_wrong_token_and_a_foreign_topic_are_refused(broker: Broker) -> None:
    token = broker.device("ABC123", "iotee_device")
    until(lambda: gets_in(Device(broker.mqtt_port, "ABC123", token)))
    assert not gets_in(Device(broker.mqtt_port, "ABC123", "dtok_wrong"))
    broker.device("other", "iotee_device")
    command_id = broker.create("other")
    Device(broker.mqtt_port, "ABC123", token).say("ok", topic="iotee/dev/other/ack")
    assert lock(broker, Device(broker.mqtt_port, "ABC123", token))
    assert broker.command(command_id)["state"] == "published"


def test_a_rotated_token_stops_working(broker: Broker) -> None:
    old = Device(broker.mqtt_port, "ABC123", broker.device("ABC123", "iotee_device"))
    until(lambda: gets_in(old))
    token = broker.http("POST", "/v1/devices/ABC123/token").json()["device_token"]
    until(lambda: gets_in(Device(broker.mqtt_port, "ABC123", token)))
    assert not gets_in(old)


def test_a_killed_mosquitto_is_restarted_with_its_devices(broker: Broker) -> None:
    device = Device(broker.mqtt_port, "ABC123", broker.device("ABC123", "iotee_device"))
    until(lambda: gets_in(device))
    os.kill(child(broker), signal.SIGKILL)
    until(lambda: gets_in(device))
    until(lambda: not broker.not_ready())
    lock(broker, device)


def test_a_large_mosquitto_log_is_rotated_at_start(new_broker: NewBroker) -> None:
    broker = new_broker("--mqtt-server", "mosquitto")
    home = broker.data / "mosquitto"
    home.mkdir(parents=True)
    with open(home / "mosquitto.log", "wb") as log:
        log.truncate(5_000_000)

    port_of(broker.start())

    assert (home / "mosquitto.log").stat().st_size < 1_000
    assert (home / "mosquitto.log.1").stat().st_size == 5_000_000


def test_mosquitto_ends_with_the_broker(broker: Broker) -> None:
    pid = child(broker)
    assert broker.end() == 0
    assert not alive(pid)


def test_kill_9_leaves_no_mosquitto_behind_and_devices_reconnect_after_a_restart(broker: Broker) -> None:
    device = Device(broker.mqtt_port, "ABC123", broker.device("ABC123", "iotee_device"))
    left = child(broker)
    broker.run.kill()
    again(broker)
    assert not alive(left)
    until(lambda: gets_in(device))
    lock(broker, device)


def again(broker: Broker) -> None:
    broker.start("--mqtt-listen", f"127.0.0.1:{broker.mqtt_port}")
    assert port_of(broker) == broker.mqtt_port


@pytest.mark.parametrize("pdeathsig", [True, False])
def test_an_answer_given_while_the_broker_was_down_is_not_lost(
    new_broker: NewBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pdeathsig: bool
) -> None:
    if not pdeathsig:  # without pdeathsig the child outlives a killed broker, and the next broker ends it
        monkeypatch.setenv("PATH", only("mosquitto", tmp_path / "bin"))
    broker = new_broker("--mqtt-server", "mosquitto").start()
    broker.mqtt_port = port_of(broker)
    device = Device(broker.mqtt_port, "ABC123", broker.device("ABC123", "iotee_device"))
    until(lambda: gets_in(device))
    device.subscribe()
    command_id = broker.create("ABC123")
    assert device.next(device.listen("rls", "-c")) == "1"
    left = child(broker)
    # The broker is stopped, so only Mosquitto can send the PUBACK for the answer.
    broker.run.signal(signal.SIGSTOP)
    assert device.say(executed(command_id)) == 0
    broker.run.kill()
    assert pdeathsig or alive(left)

    again(broker)

    assert not alive(left)
    broker.reaches(command_id, "executed")


def only(name: str, place: Path) -> str:
    """A PATH that contains only this program."""
    place.mkdir()
    (place / name).symlink_to(program(name))
    return str(place)


def test_a_failed_write_of_the_password_file_does_not_end_the_broker_and_is_retried(broker: Broker) -> None:
    home = broker.data / "mosquitto"
    device = Device(broker.mqtt_port, "ABC123", broker.device("ABC123", "iotee_device"))
    until(lambda: gets_in(device))
    (home / "passwd.new").mkdir()
    new = Device(broker.mqtt_port, "ABC124", broker.device("ABC124", "iotee_device"))
    broker.run.err.wait("event=mosquitto.users_not_written")
    os.kill(child(broker), signal.SIGKILL)
    broker.run.err.wait("event=mosquitto.cannot_start")

    (home / "passwd.new").rmdir()

    until(lambda: gets_in(new))
    until(lambda: gets_in(device))


def test_a_silent_mosquitto_does_not_keep_the_broker_from_ending(
    new_broker: NewBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "bin"
    silent.mkdir()
    (silent / "mosquitto").write_text("#!/bin/sh\nexec sleep 100\n")
    (silent / "mosquitto").chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent}:{os.environ['PATH']}")
    broker = new_broker("--mqtt-server", "mosquitto")
    broker.launch()
    until(lambda: (broker.data / "mosquitto" / "pid").exists())
    assert broker.end() == 0

    run = broker.launch()

    assert run.wait() == 2
    one_sentence(run.err.all(), "mqtt_server", "does not answer")


def test_an_unknown_server_and_a_port_in_use_end_the_start_with_one_sentence(
    new_broker: NewBroker, broker: Broker
) -> None:
    run = new_broker("--mqtt-server", "mosquito", data=broker.cwd / "one").launch()
    assert run.wait() == 2
    one_sentence(run.err.all(), "mqtt_server", "mosquito")
    taken = new_broker("--mqtt-server", "mosquitto", data=broker.cwd / "two")
    run = taken.launch("--mqtt-listen", f"127.0.0.1:{broker.mqtt_port}")
    assert run.wait() == 2
    one_sentence(run.err.all(), "mqtt_server", "in use")
