"""kill -9 at the worst moments: no answered command is lost, and none is executed twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from devices.agent import Agent, Call
from devices.memory import SqliteMemory
from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import WITHIN_SEC, Broker, Device, Process, executed, running, until

CLIENTS = 20
ANSWERS = 200


def test_after_a_crash_a_command_is_sent_again_as_its_second_attempt(new_broker: NewBroker) -> None:
    broker = new_broker().start()
    door = Device(broker.mqtt_port, "door-7", broker.device("door-7"))
    command_id = broker.create("door-7")
    first = json.loads(door.next())

    broker.kill()
    broker.start()
    second = json.loads(door.next())
    door.say(executed(command_id))

    assert (first["id"], first["attempt"]) == (command_id, 1)
    assert (second["id"], second["attempt"]) == (command_id, 2)
    broker.reaches(command_id, "executed")
    assert broker.verified()


def test_after_a_crash_the_reference_device_executes_a_repeated_command_once(
    mosquitto: Mosquitto, new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    broker.device("door-7")
    queue = Device(mosquitto.port, "door-7", own_server=False)
    queue.subscribe()
    queue.online()
    command_id = broker.create("door-7")
    until(lambda: broker.events(command_id).count("published") >= 1)

    broker.kill()
    broker.start()
    queue.online()
    until(lambda: broker.events(command_id).count("published") >= 2)
    calls: list[tuple[str, int]] = []

    def agent() -> Agent:
        agent = Agent(
            "door-7", "", mosquitto.url, memory=SqliteMemory(tmp_path / "door.sqlite3"), grants="none"
        )

        @agent.command("lock")
        async def lock(call: Call) -> dict[str, int]:
            calls.append((call.id, call.attempt))
            return {"times": len(calls)}

        return agent

    with running(agent):
        command = broker.reaches(command_id, "executed")
    assert [id for id, _ in calls] == [command_id]
    assert command["result"] == {"times": 1}
    assert broker.verified()


@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_an_answer_without_its_puback_is_sent_again_after_a_crash(
    new_broker: NewBroker, version: str
) -> None:
    broker = new_broker().start()
    token, calls = broker.device("door-7"), []
    stopped = threading.Event()

    def agent() -> Agent:
        url = f"mqtt://127.0.0.1:{broker.mqtt_port}?v={version}"
        agent = Agent("door-7", token, url, grants="none")

        @agent.command("lock")
        async def lock(call: Call) -> None:
            calls.append(call.id)
            await asyncio.to_thread(stopped.wait)

        return agent

    with running(agent):
        command_id = broker.create("door-7")
        broker.reaches(command_id, "acknowledged")  # the broker never sends it again
        broker.run.signal(signal.SIGSTOP)
        stopped.set()
        until(lambda: unread_bytes(broker.mqtt_port) > 0)
        broker.kill()
        assert "executed" not in recorded(broker.data)
        broker.start()
        broker.reaches(command_id, "executed")
    assert broker.events(command_id) == ["created", "published", "acknowledged", "executed"]
    assert calls == [command_id]


def recorded(data: Path) -> set[str]:
    """The types of the events in the log of a broker that does not run."""
    with contextlib.closing(sqlite3.connect(f"file:{data / 'ordain.db'}?mode=ro", uri=True)) as log:
        return {kind for (kind,) in log.execute("SELECT DISTINCT type FROM events")}


def unread_bytes(port: int) -> int:
    """Bytes that clients sent to a port of this machine and that its server has not read. See proc(5)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(
        int(queues.split(":")[1], 16)
        for _, local, _, _, queues, *_ in lines
        if local.endswith(f":{port:04X}")
    )


def test_after_a_crash_a_device_is_offline_until_it_reconnects(broker: Broker) -> None:
    door = Device(broker.mqtt_port, "door-7", broker.device("door-7"))
    listening = door.listen()
    until(lambda: broker.http("GET", "/v1/devices/door-7").json()["presence"] == "online")

    broker.kill()
    listening.kill()
    broker.start()

    assert broker.http("GET", "/v1/devices/door-7").json()["presence"] == "offline"
    assert broker.command(broker.create("door-7"))["state"] == "pending"


async def keep_creating(url: str, key: str, device: str, accepted: list[str]) -> None:
    """One client that creates commands until the broker is killed."""
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=WITHIN_SEC, trust_env=False
    ) as client:
        while True:
            try:
                answer = await client.post(f"/v1/devices/{device}/commands", json={"type": "lock"})
            except httpx2.TransportError:
                return
            if answer.status_code != 201:
                return  # the device's queue is full
            accepted.append(answer.json()["id"])


async def test_every_command_that_was_answered_201_survives_kill_9(broker: Broker) -> None:
    names = [f"lamp-{number}" for number in range(CLIENTS)]
    for name in names:
        await asyncio.to_thread(broker.device, name)
    accepted: list[str] = []

    async with asyncio.TaskGroup() as clients:
        for name in names:
            clients.create_task(keep_creating(broker.url, broker.key, name, accepted))
        await asyncio.to_thread(until, lambda: len(accepted) > ANSWERS)
        broker.run.signal(signal.SIGKILL)

    await asyncio.to_thread(broker.start)
    tail = await asyncio.to_thread(broker.ordain, "log", "tail", "--lines", "100000", "--json")
    recorded = {json.loads(line)["stream"] for line in tail.stdout.splitlines()}
    assert len(accepted) > ANSWERS
    assert set(accepted) <= recorded
    assert broker.verified()


def _exists(name: str) -> Callable[[Broker, Process], bool]:
    return lambda broker, run: (broker.data / name).exists()


def _said(event: str) -> Callable[[Broker, Process], bool]:
    return lambda broker, run: f"event={event}" in run.err.so_far()


MOMENTS = {
    "the lock is there": _exists("ordain.lock"),
    "the database is there": _exists("ordain.db"),
    "its journal is there": _exists("ordain.db-wal"),
    "the MQTT server is up": _said("mqtt.listening"),
    "the socket is there": _exists("ordain.sock"),
    "it serves": _said("broker.serving"),
}


def test_repeated_kill_9_during_startup_does_no_harm(new_broker: NewBroker) -> None:
    broker = new_broker()
    for moment, there in MOMENTS.items():
        run = broker.launch()
        until(lambda there=there, run=run: there(broker, run), moment)  # type: ignore[misc]
        run.kill()

    broker.start()
    broker.device("lamp")
    assert broker.create("lamp")
    assert broker.verified()


@pytest.mark.parametrize("last", [1, 3])
def test_repeated_kill_9_between_commands_loses_no_command(new_broker: NewBroker, last: int) -> None:
    broker = new_broker().start()
    broker.device("lamp")
    made = []
    for _ in range(last):
        made.append(broker.create("lamp"))
        broker.kill()
        broker.start()

    assert [broker.command(command_id)["state"] for command_id in made] == ["pending"] * last
    assert broker.verified()


def test_a_lease_survives_a_broker_restart(new_broker: NewBroker) -> None:
    broker = new_broker().start()
    token = broker.device("rec-1", "recorder")
    command_id = broker.create("rec-1", "start_recording")
    claim = "/v1/devices/rec-1/commands/claim"
    first = broker.http("POST", claim).json()["commands"]
    broker.run.kill()
    broker.start()

    again = broker.http("POST", claim).json()["commands"]
    beat = broker.http("POST", "/v1/devices/me/heartbeat", Authorization=f"Bearer {token}").json()
    done = broker.http("POST", f"/v1/devices/rec-1/commands/{command_id}/result", {"status": "executed"})

    assert [(command["id"], command["attempts"]) for command in first + again] == [(command_id, 1)] * 2
    assert beat == {"status": "ok", "commands": []}
    assert done.json()["status"] == "executed"
    assert broker.events(command_id) == ["created", "published", "executed"]
    assert broker.verified()
