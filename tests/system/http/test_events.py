"""Event streams as a service uses them: real connections to a real broker, through shutdowns and crashes."""

from __future__ import annotations

import json
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from broker.private_socket import socket_path
from tests.conftest import Mosquitto, program
from tests.system.conftest import NewBroker
from tests.system.support import END_WITHIN_SEC, ORDAIN, WITHIN_SEC, Broker, Process, until

COMMANDS = 45


def key_for_events(broker: Broker, project: str = "default") -> str:
    with socket_path(broker.data) as path:
        door = httpx2.HTTPTransport(uds=path, verify=False)
        with httpx2.Client(
            transport=door, base_url="http://ordain", timeout=WITHIN_SEC, trust_env=False
        ) as client:
            wanted = {"project": project, "scopes": ["events:read"]}
            key: str = client.post("/local/keys", json=wanted).json()["key"]
    return key


class Service:
    """Reads the stream and resumes from the last id after each break."""

    def __init__(self, broker: Broker, key: str) -> None:
        self.broker = broker
        self.key = key
        self.events: list[dict[str, Any]] = []
        self.breaks = 0
        self.leave = threading.Event()

    def run(self) -> None:
        while not self.leave.is_set():
            headers = {"Authorization": f"Bearer {self.key}", "Accept": "text/event-stream"}
            headers["Last-Event-ID"] = self.events[-1]["id"] if self.events else "0"
            try:
                with httpx2.stream(
                    "GET",
                    self.broker.url + "/v1/events",
                    headers=headers,
                    timeout=1,
                    verify=False,
                    trust_env=False,
                ) as answer:
                    assert answer.status_code == 200
                    for line in answer.iter_lines():
                        if line.startswith("data: "):
                            self.events.append(json.loads(line[6:]))
            except httpx2.TransportError:
                self.leave.wait(0.05)
            self.breaks += 1

    @property
    def ids(self) -> list[int]:
        return [int(event["id"]) for event in self.events]


@contextmanager
def following(service: Service) -> Iterator[Service]:
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.leave.set()
        thread.join(WITHIN_SEC)
        assert not thread.is_alive()


def of_the_log(broker: Broker) -> list[int]:
    page = broker.http("GET", "/v1/events?limit=1000", Authorization=f"Bearer {key_for_events(broker)}")
    return [int(event["id"]) for event in page.json()["data"]]


def test_a_service_gets_every_event_once_through_crashes(broker: Broker) -> None:
    broker.device("lamp")
    with following(Service(broker, key_for_events(broker))) as service:
        for _ in range(2):
            crash_while_commands_come(broker, service)
        expected = of_the_log(broker)
        until(lambda: len(service.events) >= len(expected))
    assert service.ids == expected
    assert service.breaks >= 2
    assert broker.verified()


def crash_while_commands_come(broker: Broker, service: Service) -> None:
    before = len(service.events)
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(broker.create, "lamp") for _ in range(COMMANDS)]
        until(lambda: len(service.events) > before + COMMANDS // 2)
        broker.kill()
    accepted = {each.result() for each in made if each.exception() is None}
    broker.start()
    until(lambda: accepted <= {event["subject"] for event in service.events})


def test_open_streams_end_with_the_broker(broker: Broker) -> None:
    key = key_for_events(broker)
    where = urlsplit(broker.url)
    head = (
        "GET /v1/events?after=0 HTTP/1.1\r\nHost: ordain\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {key}\r\n\r\n"
    )
    streams = [socket.create_connection((where.hostname, where.port), timeout=WITHIN_SEC) for _ in range(50)]
    for stream in streams:
        stream.sendall(head.encode())
        assert stream.recv(4_096).startswith(b"HTTP/1.1 200 ")

    broker.run.signal(signal.SIGTERM)
    ends = [b"".join(iter(lambda: stream.recv(4_096), b"")) for stream in streams]  # noqa: B023

    assert all(end.endswith(b"0\r\n\r\n") for end in ends)
    assert broker.run.wait(END_WITHIN_SEC) == 0
    assert "Traceback" not in broker.run.err.all()
    for stream in streams:
        stream.close()


def test_the_number_of_streams_is_not_limited_by_the_shells_soft_limit(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shell = tmp_path / "ordain"
    shell.write_text(f'#!/bin/sh\nulimit -S -n 100\nexec {ORDAIN} "$@"\n')
    shell.chmod(0o755)
    broker = new_broker()
    broker.program = str(shell)

    broker.start()

    assert resource.prlimit(broker.run.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


# --- on the MQTT server ----------------------------------------------------------------------------


def on_the_bus(port: int, *login: str, topic: str = "iotee/evt/#") -> Process:
    """mosquitto_sub that prints topic and payload of each message, and its SUBACK when it is subscribed."""
    return Process(
        "stdbuf", "-oL", program("mosquitto_sub"), "-p", str(port), *login, "-q", "1", "-t", topic,
        "-F", "%t %p", "-d",
    )  # fmt: skip


def told(listening: Process) -> list[tuple[str, dict[str, Any]]]:
    lines = (line.partition(" ") for line in listening.out.so_far().splitlines() if line.startswith("iotee/"))
    return [(topic, json.loads(payload)) for topic, _, payload in lines]


def test_a_service_on_the_embedded_server_sees_its_own_project_until_its_key_is_revoked(
    broker: Broker,
) -> None:
    token = broker.device("lamp")
    ours, theirs, stays = (key_for_events(broker, project) for project in ("default", "other", "default"))
    port = broker.mqtt_port
    sees, blind, witness = (on_the_bus(port, "-u", "service", "-P", key) for key in (ours, theirs, stays))
    device = on_the_bus(port, "-i", "lamp", "-u", "lamp", "-P", token)
    for listening in (sees, blind, witness, device):
        listening.out.wait("SUBACK")

    command_id = broker.create("lamp")
    until(lambda: told(sees) and told(witness))

    [(topic, event)] = told(sees)
    assert topic == f"iotee/evt/lamp/{command_id}"
    assert (event["type"], event["subject"]) == ("ordain.command.created.v1", command_id)
    assert on_the_bus(port, "-u", "service", "-P", "sk_live_wrong").wait() != 0
    broker.run.err.wait("event=mqtt.denied")
    ids = [line.split()[0] for line in broker.ordain("keys", "list").stdout.splitlines() if "key_" in line]
    assert broker.ordain("keys", "revoke", ids[1]).returncode == 0  # the first key is the test's own
    broker.create("lamp")
    until(lambda: len(told(witness)) == 2)
    assert sees.wait() != 0  # its connection was ended, and it was not let in again
    sees.out.all()
    assert len(told(sees)) == 1
    assert told(blind) == told(device) == []
    for listening in (blind, witness, device):
        listening.kill()


def test_a_service_with_a_session_on_an_external_server_gets_all_events_through_a_crash(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    broker.device("lamp")
    login = ("-i", "billing", "-c")
    first = on_the_bus(mosquitto.port, *login)
    first.out.wait("SUBACK")
    made = [broker.create("lamp") for _ in range(3)]
    until(lambda: len(told(first)) >= 3)
    first.kill()
    made += [broker.create("lamp") for _ in range(3)]
    broker.kill()
    broker.start()
    made += [broker.create("lamp") for _ in range(3)]

    again = on_the_bus(mosquitto.port, *login)
    until(lambda: len({event["id"] for _, event in told(first) + told(again)}) >= 9)

    seen = [event for _, event in told(first) + told(again)]
    once = {int(event["id"]): event["subject"] for event in seen}
    assert list(once.values()) == made
    assert list(once) == sorted(once)
    again.kill()
