"""The shipped mosquitto.conf and its ACL in a real Mosquitto: each user reaches its own topics and no others.

Only the ports and the persistence path are changed; no rule is repeated in a test configuration.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import aiomqtt
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.conftest import Mosquitto, program, unused_port

REPOSITORY = Path(__file__).parents[3]
DEADLINE_SEC = 120

PASSWORDS = {name: f"secret-of-{name}" for name in ("ordain", "service", "door-a", "door-b")}
DEVICE_TOPICS = {
    f"iotee/dev/{device}/{suffix}"
    for device in ("door-a", "door-b")
    for suffix in ("rls", "rbt", "ack", "status")
}
TOPICS = DEVICE_TOPICS | {"iotee/evt/door-a/cmd_1", "iotee/dev/door-a", "iotee/dev/door-a/rls/x", "elsewhere"}
OURS = {topic for topic in TOPICS if topic.startswith("iotee/")}
MAY_READ = {
    "ordain": OURS,
    "service": {"iotee/evt/door-a/cmd_1"},
    "door-a": {"iotee/dev/door-a/rls", "iotee/dev/door-a/rbt"},
    "door-b": {"iotee/dev/door-b/rls", "iotee/dev/door-b/rbt"},
}
MAY_WRITE = {
    "ordain": OURS,
    "service": set[str](),
    "door-a": {"iotee/dev/door-a/ack", "iotee/dev/door-a/status"},
    "door-b": {"iotee/dev/door-b/ack", "iotee/dev/door-b/status"},
}


class Production(Mosquitto):
    """`port` serves the broker and services, `device_port` serves devices."""

    device_port: int

    def client(self, user: str, client_id: str | None = None, password: str | None = None) -> aiomqtt.Client:
        port = self.device_port if user.startswith("door-") else self.port
        return aiomqtt.Client(
            self.host, port, username=user, password=password or PASSWORDS[user], identifier=client_id
        )

    def another(self, broker: aiomqtt.Client, user: str) -> AbstractAsyncContextManager[aiomqtt.Client]:
        """A connection for `user`. A second connection of the broker's user would end the first, so `broker`
        is reused."""
        return nullcontext(broker) if user == "ordain" else self.client(user)


@pytest.fixture
def production(tmp_path: Path) -> Iterator[Production]:
    config = (REPOSITORY / "mosquitto.conf").read_text()
    port, device_port = unused_port(), unused_port()
    for shipped, ours in {
        "listener 1883 127.0.0.1": f"listener {port} 127.0.0.1",
        "listener 8883": f"listener {device_port} 127.0.0.1",
        "persistence_location /var/lib/mosquitto/": f"persistence_location {tmp_path}/",
    }.items():
        assert config.count(f"\n{shipped}\n") == 1, shipped
        config = config.replace(f"\n{shipped}\n", f"\n{ours}\n")
    (tmp_path / "docs").mkdir()
    shutil.copy(REPOSITORY / "docs" / "mosquitto.acl", tmp_path / "docs")
    passwords = tmp_path / "mosquitto.passwd"
    passwords.write_text("".join(f"{name}:{password}\n" for name, password in PASSWORDS.items()))
    subprocess.run([program("mosquitto_passwd"), "-U", passwords], check=True)
    server = Production(config, port, tmp_path)
    server.device_port = device_port
    server.start()
    yield server
    server.kill()


async def topics_until_the_end(client: aiomqtt.Client) -> set[str]:
    """All topics that this client receives before the message `end`."""
    seen: set[str] = set()
    async with asyncio.timeout(DEADLINE_SEC):
        async for message in client.messages:
            if message.payload == b"end":
                return seen
            seen.add(message.topic.value)
    raise AssertionError("the connection ended first")


@pytest.mark.parametrize("user", PASSWORDS)
async def test_every_user_receives_exactly_the_topics_it_may_read(production: Production, user: str) -> None:
    async with production.client("ordain") as broker, production.another(broker, user) as reader:
        await reader.subscribe("#", qos=1)
        await reader.subscribe("$SYS/#", qos=1)
        for topic in sorted(TOPICS):
            await broker.publish(topic, b"1", qos=1)
        await broker.publish(min(MAY_READ[user]), b"end", qos=1)
        assert await topics_until_the_end(reader) == MAY_READ[user]


@pytest.mark.parametrize("user", PASSWORDS)
async def test_a_users_messages_arrive_only_on_topics_it_may_write(production: Production, user: str) -> None:
    async with production.client("ordain") as broker, production.another(broker, user) as writer:
        await broker.subscribe("#", qos=1)
        for topic in sorted(TOPICS):
            await writer.publish(topic, b"1", qos=1)
        await broker.publish("iotee/dev/door-a/status", b"end", qos=1)
        assert await topics_until_the_end(broker) == MAY_WRITE[user]


@pytest.mark.parametrize("topic", sorted(DEVICE_TOPICS))
async def test_a_last_will_is_published_only_on_the_devices_own_topics(
    production: Production, topic: str
) -> None:
    async with production.client("ordain") as broker:
        await broker.subscribe("#", qos=1)
        vanish(production, "door-a", will=topic)
        # The server accepts door-b after it has noticed the loss of door-a.
        async with production.client("door-b"):
            await broker.publish("iotee/dev/door-b/status", b"end", qos=1)
        assert await topics_until_the_end(broker) == MAY_WRITE["door-a"] & {topic}


def vanish(server: Production, user: str, will: str) -> None:
    """A client that sets a will and disappears without DISCONNECT."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=user)
    client.username_pw_set(user, PASSWORDS[user])
    client.will_set(will, b"1", qos=1)
    client.connect(server.host, server.device_port)
    while not client.is_connected():
        assert client.loop(DEADLINE_SEC) == paho.MQTT_ERR_SUCCESS, "refused"
    connection = client.socket()
    assert connection is not None
    connection.close()


async def test_an_unknown_user_and_a_wrong_password_are_refused(production: Production) -> None:
    for user, password in (("door-a", "wrong"), ("nobody", "secret-of-nobody")):
        with pytest.raises(aiomqtt.MqttError):
            async with production.client(user, password=password):
                pass
    with pytest.raises(aiomqtt.MqttError):
        async with aiomqtt.Client(production.host, production.port):
            pass


async def test_a_device_cannot_take_over_the_session_of_another(production: Production) -> None:
    async with production.client("door-a", client_id="door-a") as victim:
        await victim.subscribe("iotee/dev/door-a/rls", qos=1)
        async with production.client("door-b", client_id="door-a"), production.client("ordain") as broker:
            await broker.publish("iotee/dev/door-a/rls", b"end", qos=1)
            assert await topics_until_the_end(victim) == set()


async def test_a_service_cannot_take_over_the_session_of_the_broker(production: Production) -> None:
    async with production.client("ordain", client_id="ordain") as victim:
        await victim.subscribe("iotee/dev/door-a/ack", qos=1)
        async with production.client("service", client_id="ordain"), production.client("door-a") as device:
            await device.publish("iotee/dev/door-a/ack", b"end", qos=1)
            assert await topics_until_the_end(victim) == set()


async def test_the_brokers_persistent_session_survives_its_connection(production: Production) -> None:
    def bridge() -> aiomqtt.Client:
        return aiomqtt.Client(
            production.host,
            production.port,
            username="ordain",
            password=PASSWORDS["ordain"],
            identifier="ordain-bridge",
            clean_session=False,
        )

    async with bridge() as broker:
        await broker.subscribe("iotee/dev/+/ack", qos=1)
    async with production.client("door-a") as device:
        for _ in range(1500):
            await device.publish("iotee/dev/door-a/ack", b"ok", qos=1)
    received = 0
    async with asyncio.timeout(DEADLINE_SEC), bridge() as broker:
        async for _ in broker.messages:
            received += 1
            if received == 1500:
                break
