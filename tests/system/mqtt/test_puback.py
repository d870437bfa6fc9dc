"""A device's PUBACK means durable: kill -9 in the middle of ten thousand answers loses none that had one."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import httpx2
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.system.conftest import NewBroker
from tests.system.support import until

DEVICES, EACH, KILLED_AFTER = 10, 1_000, 5_000
LIMITS = """
[limits]
queue_per_name = 2000
queue_per_device = 2000
[mqtt_limits]
packets_per_sec = 100000
"""


class Counting:
    """A paho device that answers each command once, and counts which answers had their PUBACK."""

    def __init__(self, port: int, name: str, token: str, version: MQTTProtocolVersion) -> None:
        self.acknowledged: set[str] = set()
        self._answers: dict[int, str] = {}
        self._lock = threading.Lock()
        self._name = name
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=version)
        self.client.username_pw_set(name, token)
        self.client.on_connect = lambda client, *_: client.subscribe(f"iotee/dev/{name}/rls", 1)
        self.client.on_message = self._commanded
        self.client.on_publish = self._published
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def _commanded(self, client: Client, _: Any, message: MQTTMessage) -> None:
        command_id = json.loads(message.payload)["id"]
        answer = json.dumps({"id": command_id, "status": "executed"})
        with self._lock:
            info = client.publish(f"iotee/dev/{self._name}/ack", answer, 1)
            self._answers[info.mid] = command_id

    def _published(self, client: Client, _: Any, mid: int, *more: Any) -> None:
        with self._lock:
            self.acknowledged.add(self._answers[mid])


def test_every_answer_that_had_its_puback_is_in_the_log_after_kill_9(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(LIMITS)
    broker = new_broker("--config", str(config)).start()
    names = [f"door-{number}" for number in range(DEVICES)]
    versions = [MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5]
    doors = [
        Counting(broker.mqtt_port, name, broker.device(name), versions[number % 2])
        for number, name in enumerate(names)
    ]
    try:
        orders = threading.Thread(target=order, args=(broker, names))
        orders.start()
        until(lambda: sum(len(door.acknowledged) for door in doors) >= KILLED_AFTER, within=800)
        broker.kill()
        orders.join()
    finally:
        for door in doors:
            door.client.loop_stop()

    acknowledged = set[str]().union(*(door.acknowledged for door in doors))
    log = sqlite3.connect(f"file:{broker.data / 'ordain.db'}?mode=ro", uri=True)
    executed = {row[0] for row in log.execute("SELECT stream FROM events WHERE type = 'executed'")}
    log.close()
    assert len(acknowledged) >= KILLED_AFTER
    assert acknowledged - executed == set()


def order(broker: Any, names: list[str]) -> None:
    """Commands for all devices, until the broker is killed."""
    for _ in range(EACH):
        try:
            answer = broker.http("POST", "/v1/commands", {"devices": names, "type": "lock"})
        except httpx2.TransportError:
            return
        assert answer.status_code < 300, answer.text
