"""The examples in `docs/examples`: each is started by its `run`, and does what its page says."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import Mosquitto, program, unused_port
from tests.packages import EXAMPLES, has_c, need, node_modules, python_packages
from tests.system.conftest import NewBroker
from tests.system.support import ROOT, WITHIN_SEC, Broker, Process, environment, until


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a copy of an example by its `run`, with these variables; ended at the end."""
    started: list[Process] = []

    def run(name: str, *arguments: str, **variables: str) -> Process:
        home = tmp_path / "-".join((name, *arguments))
        shutil.copytree(EXAMPLES / name, home, ignore=shutil.ignore_patterns("node_modules", ".venv"))
        if (home / "package.json").exists():
            (home / "node_modules").symlink_to(node_modules(EXAMPLES / name))
        environ = environment(**{"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables})
        started.append(Process(str(home / "run"), *arguments, cwd=home, env=environ))
        return started[-1]

    yield run
    for process in started:
        process.kill()


class Attacker:
    """A client that may read and write every topic of the MQTT server, which has no access rules."""

    def __init__(self, server: Mosquitto) -> None:
        self._at = ["-p", str(server.port), "-q", "1"]
        # Its answer to the subscription is printed too: nothing is sent before it.
        self._ear = Process(
            "stdbuf", "-oL", program("mosquitto_sub"), *self._at, "-d", "-v", "-t", "iotee/dev/door-7/+"
        )
        self._ear.out.wait("SUBACK")

    def close(self) -> None:
        self._ear.kill()

    def heard(self, suffix: str, *words: str) -> dict[str, Any]:
        """The first message on a topic of the device that holds these words."""

        def found() -> dict[str, Any] | None:
            for line in self._ear.out.so_far().splitlines():
                topic, _, payload = line.partition(" ")
                if topic.endswith(f"/{suffix}") and all(word in payload for word in words):
                    message: dict[str, Any] = json.loads(payload)
                    return message
            return None

        return until(found, lambda: self._ear.out.so_far())

    def count(self, suffix: str, *words: str) -> int:
        lines = self._ear.out.so_far().splitlines()
        return sum(f"/{suffix} " in line and all(word in line for word in words) for line in lines)

    def send(self, message: dict[str, Any]) -> None:
        command = [
            program("mosquitto_pub"),
            *self._at,
            "-t",
            "iotee/dev/door-7/rls",
            "-m",
            json.dumps(message),
        ]
        subprocess.run(command, check=True)


@pytest.fixture
def attacker(mosquitto: Mosquitto) -> Iterator[Attacker]:
    attacker = Attacker(mosquitto)
    yield attacker
    attacker.close()


@pytest.mark.parametrize("language", ["python", "node", "c"])
def test_a_device_executes_only_granted_commands_and_each_once(
    language: str,
    new_broker: NewBroker,
    mosquitto: Mosquitto,
    attacker: Attacker,
    start: Callable[..., Process],
) -> None:
    if language == "c":
        has_c()
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    variables = {"TOKEN": broker.device("door-7"), "ORDAIN_URL": broker.url, "MQTT_URL": mosquitto.url}
    variables |= {"MQTT_PORT": str(mosquitto.port), "ORDAIN_KEY": public_key(broker)}
    device = start(f"device-{language}", **variables)

    command_id = broker.create("door-7", "unlock", params={"for_sec": 5})
    assert broker.reaches(command_id, "executed")["result"] == {"locked": False}, device.err.so_far()

    genuine = attacker.heard("rls", command_id)
    for forged in (
        genuine | {"id": "cmd_forged1"},
        genuine | {"id": "cmd_forged2", "grant": None},
        genuine | {"id": "cmd_forged3", "grant": with_claims(genuine["grant"], sub="cmd_forged3")},
        genuine | {"id": "cmd_forged4", "grant": genuine["grant"][:-4]},
    ):
        attacker.send(forged)
        assert attacker.heard("ack", forged["id"], "failed")["error"]["code"].startswith("grant")
    ends = attacker.count("ack", command_id, "executed")
    attacker.send(genuine | {"attempt": 2})
    until(lambda: attacker.count("ack", command_id, "executed") > ends)

    assert [line.split()[:2] for line in device.out.so_far().splitlines()] == [["unlock", command_id]]


def public_key(broker: Broker) -> str:
    with urllib.request.urlopen(f"{broker.url}/.well-known/jwks.json") as answer:
        key: str = json.load(answer)["keys"][0]["x"]
    return key


def with_claims(grant: str, **claims: str) -> str:
    """The grant with other claims under the same signature."""
    header, payload, signature = grant.split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    changed = base64.urlsafe_b64encode(json.dumps(said | claims, separators=(",", ":")).encode())
    return f"{header}.{changed.decode().rstrip('=')}.{signature}"


def test_a_gateway_of_sparkplug_b_writes_metrics_and_the_node_s_reports_end_the_commands(
    new_broker: NewBroker, mosquitto: Mosquitto, start: Callable[..., Process]
) -> None:
    example = EXAMPLES / "sparkplug-b"
    broker = new_broker("--mqtt-url", mosquitto.url)
    (broker.cwd / "types").mkdir()
    shutil.copy(example / "sparkplug_node.toml", broker.cwd / "types")
    settings = broker.cwd / "ordain.toml"
    settings.write_text('types = "types"\n')
    broker.start("--config", str(settings))
    token = broker.device("sparkplug-gw", "gateway")
    child = {"hardware_id": "press-1", "type": "sparkplug_node", "gateway": "sparkplug-gw"}
    assert broker.http("POST", "/v1/devices", child).status_code == 201
    variables = {"TOKEN": token, "ORDAIN_URL": broker.url, "MQTT_URL": mosquitto.url}
    variables["PYTHONPATH"] = f"{python_packages(example)}:{ROOT}"
    edge = start("sparkplug-b", "edge", **variables)
    gateway = start("sparkplug-b", **variables)

    def written(metric: str, value: Any) -> dict[str, Any]:
        params = {"metric": metric, "value": value}
        return broker.reaches(broker.create("press-1", "write", params=params), "executed")

    assert written("speed", -40)["result"] == {"speed": -40}, gateway.err.so_far()
    assert written("valve", True)["result"] == {"valve": True}
    assert written("recipe", "B")["result"] == {"recipe": "B"}
    again = written("recipe", "B")["result"]  # nothing changes: the node is asked
    assert (again["recipe"], again["speed"]) == ("B", -40)
    assert edge.out.so_far().splitlines() == ["speed = -40", "valve = True", "recipe = B"]
    broker.reaches(broker.create("press-1", "rebirth"), "executed")
    for metric, value in (("speed", "fast"), ("pressure", 1)):
        refused = broker.create("press-1", "write", params={"metric": metric, "value": value})
        assert broker.reaches(refused, "failed")["error"]["code"] == "not_written"
    forged = {
        "id": "cmd_forged",
        "type": "write",
        "params": {"metric": "valve", "value": False},
        "grant": None,
    }
    publish = [program("mosquitto_pub"), "-p", str(mosquitto.port), "-q", "1", "-t", "iotee/dev/press-1/rls"]
    subprocess.run([*publish, "-m", json.dumps(forged)], check=True)
    gateway.out.wait("press-1 failed cmd_forged")
    edge.kill()
    until(lambda: broker.http("GET", "/v1/devices/press-1").json()["presence"] == "offline" or None)


@pytest.mark.parametrize("language", ["python", "node"])
def test_a_service_sends_a_command_waits_and_prints_its_outcome(
    language: str, new_broker: NewBroker, start: Callable[..., Process]
) -> None:
    if language == "node":
        need("node", "curl")
    broker = new_broker().start("--demo")
    key = broker.run.out.wait("export KEY=").strip().removeprefix("export KEY=")
    broker.run.out.wait("# docs")

    service = start(f"service-{language}", ORDAIN_URL=broker.url, KEY=key)

    assert service.wait() == 0, service.err.all()
    assert service.out.all().replace(" ", "").lower().startswith("demo_lock:executed{")


@pytest.mark.parametrize("framework", ["fastapi", "express"])
def test_a_receiver_accepts_only_signed_requests_and_handles_each_id_once(
    framework: str, new_broker: NewBroker, start: Callable[..., Process]
) -> None:
    broker = new_broker()
    settings = broker.cwd / "ordain.toml"
    settings.write_text('webhook_allow = ["127.0.0.0/8"]\n')
    broker.start("--config", str(settings))
    broker.device("door-7")
    port = unused_port()
    hook = broker.http(
        "POST", "/v1/webhooks", {"url": f"http://127.0.0.1:{port}/ordain", "events": ["created"]}
    ).json()

    def delivered() -> list[object]:
        path = f"/v1/webhooks/{hook['id']}/deliveries?outcome=delivered"
        found: list[object] = broker.http("GET", path).json()["data"]
        return found

    receiver = start(f"webhook-{framework}", SECRET=hook["secret"], PORT=str(port))
    until(lambda: accepts(port), receiver.err.so_far)

    command_id = broker.create("door-7")

    receiver.out.wait(f"ordain.command.created.v1 {command_id}")
    until(lambda: len(delivered()) == 1)  # the receiver prints before it answers; a redrive ends a request
    redriven = broker.http("POST", f"/v1/webhooks/{hook['id']}/redrive", {"from": 1})
    assert redriven.is_success
    until(lambda: len(delivered()) == 2)
    unsigned = {"webhook-id": "1", "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
    body = {"type": "forged", "subject": "x"}
    url = f"http://127.0.0.1:{port}/ordain"
    refused = httpx2.post(url, json=body, headers=unsigned, timeout=WITHIN_SEC, trust_env=False)
    assert refused.status_code == 400
    assert receiver.out.so_far().splitlines() == [f"ordain.command.created.v1 {command_id}"]


def accepts(port: int) -> bool:
    try:
        answer = httpx2.get(f"http://127.0.0.1:{port}/", timeout=WITHIN_SEC, trust_env=False)
        return answer.status_code == 404
    except httpx2.HTTPError:
        return False
