"""Several nodes on one log in PostgreSQL, with one Mosquitto: real processes, killed, stopped and ended."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import Mosquitto, unused_port
from tests.system.conftest import NewBroker
from tests.system.support import WITHIN_SEC, Broker, Device, executed, until

NewNode = Callable[[str], Broker]


@pytest.fixture
def new_node(new_broker: NewBroker, database: str, mosquitto: Mosquitto, tmp_path: Path) -> NewNode:
    """Starts a node, and waits until it serves."""
    settings = tmp_path / "ordain.toml"
    (tmp_path / "secret").write_text("s" * 40)
    (tmp_path / "pepper").write_text("p" * 40)
    settings.write_text(
        f'log = "{database}"\nmqtt_url = "{mosquitto.url}"\n'
        f'cluster_secret_file = "{tmp_path}/secret"\nkey_pepper_file = "{tmp_path}/pepper"\n'
    )

    def start(name: str) -> Broker:
        place = f"127.0.0.1:{unused_port()}"
        options = ("--config", str(settings), "--node", name, "--http", place, "--advertise", place)
        node = new_broker(*options, data=tmp_path / name)
        node.mqtt_port = mosquitto.port
        return node.start()

    return start


def role(node: Broker) -> str:
    """`owner`, `door`, or why it is neither."""
    answer = httpx2.get(f"{node.url}/readyz", trust_env=False, timeout=WITHIN_SEC)
    said: dict[str, Any] = answer.json()
    return str(said["role"] if answer.status_code == 200 else said)


def owns(node: Broker) -> bool:
    until(lambda: role(node) == "owner", lambda: role(node))
    return True


def is_door(node: Broker) -> bool:
    until(lambda: role(node) == "door", lambda: role(node))
    return True


def registered(node: Broker, mosquitto: Mosquitto) -> Device:
    """A device that is online, with a session in which Mosquitto keeps its commands."""
    node.device("door-7")
    door = Device(mosquitto.port, "door-7", own_server=False)
    door.subscribe()
    door.online()
    return door


def heard(door: Device) -> dict[str, Any]:
    """The next command that the device gets."""
    got: dict[str, Any] = json.loads(door.next(door.listen("rls", "-c")))
    return got


def test_after_kill_9_of_the_owner_a_door_goes_on_without_losing_or_doubling_a_command(
    new_node: NewNode, mosquitto: Mosquitto
) -> None:
    one = new_node("one")
    assert owns(one)
    two = new_node("two")
    assert is_door(two)
    two.key = one.key = two._make_key()  # the operator may ask at any node
    door = registered(two, mosquitto)
    done = two.create("door-7")
    assert heard(door)["id"] == done
    door.say(executed(done))
    assert two.reaches(done, "executed") == one.command(done)
    left = one.create("door-7")
    first = heard(door)
    assert (first["id"], first["attempt"]) == (left, 1)

    one.run.kill()
    between = two.create("door-7")  # waits for the new owner
    assert owns(two)
    again = heard(door)
    door.say(executed(left))
    assert (again["id"], again["attempt"]) == (left, 2)
    two.reaches(left, "executed")
    assert heard(door)["id"] == between
    door.say(executed(between))
    two.reaches(between, "executed")
    assert two.events(done) == ["created", "published", "executed"]
    assert two.end(signal.SIGTERM) == 0
