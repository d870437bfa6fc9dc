"""A command for an offline device reaches it when it reconnects, after restarts of the broker, the MQTT
server or the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devices.agent import Agent, Call
from devices.memory import SqliteMemory
from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import Broker, running, until


class Door:
    """The reference device with its memory on disk; `done` lists the commands it executed, in order."""

    def __init__(self, broker: Broker, mosquitto: Mosquitto, home: Path) -> None:
        self.token = broker.device("door-7")
        self.url = mosquitto.url
        self.home = home
        self.done: list[Any] = []

    def __call__(self) -> Agent:
        agent = Agent(
            "door-7", self.token, self.url, memory=SqliteMemory(self.home / "door-7.db"), grants="none"
        )

        @agent.command("unlock")
        async def unlock(call: Call) -> None:
            self.done.append(call.params)

        return agent


def send(broker: Broker, data: object, key: str | None = None) -> dict[str, Any]:
    body = {"name": "unlock", "device_ident": ["door-7"], "data": data}
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = broker.http("POST", "/v1/app/command/send", body, **headers)
    assert answer.status_code == 200, answer.text
    sent: dict[str, Any] = answer.json()["door-7"]
    assert sent["sent"] is True
    return sent


def history(broker: Broker) -> list[dict[str, Any]]:
    body = {"name": "unlock", "device_idents": ["door-7"], "start": "2020-01-01"}
    records: list[dict[str, Any]] = broker.http("POST", "/v1/app/command/history", body).json()["door-7"]
    return records


def presence(broker: Broker) -> str:
    found: str = broker.http("GET", "/v1/devices/door-7").json()["presence"]
    return found


def test_an_offline_device_gets_its_commands_on_reconnect_after_any_restart(
    mosquitto: Mosquitto, new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    door = Door(broker, mosquitto, tmp_path)
    with running(door):
        first = send(broker, 1)
        broker.reaches(first["command_id"], "executed")
    until(lambda: presence(broker) == "offline")

    sent = [first, send(broker, 2)]
    mosquitto.kill()
    sent.append(send(broker, 3))
    broker.kill()
    broker.start()
    sent.append(send(broker, 4, key="k"))
    assert [record["status"] for record in history(broker)] == ["executed", "pending", "pending", "pending"]
    assert broker.command(sent[-1]["command_id"])["expires_at"] is None
    broker.kill()
    mosquitto.start()
    broker.start()
    assert send(broker, 4, key="k") == sent[-1]
    assert door.done == [1]

    with running(door):
        for outcome in sent[1:]:
            broker.reaches(outcome["command_id"], "executed")
    until(lambda: presence(broker) == "offline")
    with running(door):
        until(lambda: presence(broker) == "online")
        broker.reaches(send(broker, 5)["command_id"], "executed")

    assert door.done == [1, 2, 3, 4, 5]
    assert [(record["value"], record["command_id"], record["status"]) for record in history(broker)[:4]] == [
        (number, outcome["command_id"], "executed") for number, outcome in enumerate(sent, 1)
    ]
    assert broker.verified()
