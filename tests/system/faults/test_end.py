"""SIGTERM and SIGINT end the broker cleanly within ten seconds with exit code 0, during any activity."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import unused_port
from tests.system.conftest import NewBroker
from tests.system.support import END_WITHIN_SEC, WITHIN_SEC, Broker, Device, until

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def half_a_request(broker: Broker, device: str) -> tuple[socket.socket, bytes]:
    """A connection with an open request, and the part of the body that is not sent yet."""
    body = json.dumps({"type": "lock"}).encode()
    head = (
        f"POST /v1/devices/{device}/commands HTTP/1.1\r\nHost: ordain\r\n"
        f"Authorization: Bearer {broker.key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    where = urlsplit(broker.url)
    connection = socket.create_connection((where.hostname, where.port), timeout=WITHIN_SEC)
    connection.sendall(head.encode())
    assert b"100 Continue" in connection.recv(1_000)  # this proves that the broker is reading the body
    return connection, body


@BOTH
def test_an_open_request_is_finished_and_its_command_is_kept(broker: Broker, number: signal.Signals) -> None:
    broker.device("lamp")
    connection, rest = half_a_request(broker, "lamp")

    with connection:
        broker.run.signal(number)
        broker.run.err.wait("event=broker.ending")
        connection.sendall(rest)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    code = broker.run.wait(END_WITHIN_SEC)

    assert answer.startswith(b"HTTP/1.1 201 ")
    assert code == 0
    assert "Traceback" not in broker.run.err.all()
    assert not (broker.data / "ordain.sock").exists()
    broker.start()
    command = json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])
    assert broker.command(command["id"])["state"] == "pending"
    assert broker.verified()


def test_an_unfinished_request_does_not_delay_the_end(broker: Broker) -> None:
    broker.device("lamp")
    connection, _ = half_a_request(broker, "lamp")

    with connection:
        assert broker.end() == 0


def test_a_connected_device_and_an_unanswered_command_do_not_delay_the_end(broker: Broker) -> None:
    door = Device(broker.mqtt_port, "door-7", broker.device("door-7"))
    command_id = broker.create("door-7")
    listening = door.listen("rls", "-C", "5")
    until(lambda: broker.command(command_id)["state"] == "published")

    assert broker.end() == 0

    listening.kill()
    broker.start()
    assert broker.command(command_id)["state"] == "published"


@BOTH
def test_it_ends_without_a_reachable_mqtt_server(new_broker: NewBroker, number: signal.Signals) -> None:
    broker = new_broker("--mqtt-url", f"mqtt://127.0.0.1:{unused_port()}").start()
    assert broker.not_ready() == ["mqtt: not connected to the MQTT server"]

    assert broker.end(number) == 0


def test_it_ends_while_its_mqtt_server_accepts_but_never_answers(new_broker: NewBroker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        broker = new_broker("--mqtt-url", "mqtt://127.0.0.1:{1}".format(*silent.getsockname())).start()
        connection, _ = silent.accept()

        with connection:
            assert broker.end() == 0


@BOTH
def test_the_demo_ends_cleanly_too(new_broker: NewBroker, number: signal.Signals) -> None:
    broker = new_broker("--demo").start()
    broker.run.out.wait("Ordain is ready")

    assert broker.end(number) == 0
    assert "Traceback" not in broker.run.err.all()


def test_the_demo_ends_while_it_waits_for_its_devices(new_broker: NewBroker) -> None:
    broker = new_broker("--demo", "--mqtt-url", f"mqtt://127.0.0.1:{unused_port()}").start()

    assert broker.end() == 0
    assert "Ordain is ready" not in broker.run.out.all()
    assert "Traceback" not in broker.run.err.all()


@BOTH
def test_a_signal_during_startup_ends_it_cleanly(
    new_broker: NewBroker, tmp_path: Path, number: signal.Signals
) -> None:
    broker = new_broker()
    run = broker.launch()
    until(lambda: (broker.data / "ordain.lock").exists())

    run.signal(number)

    assert run.wait(END_WITHIN_SEC) == 0
    assert "Traceback" not in run.err.all()
