"""Client libraries make the round trip on the listener: paho, gmqtt, amqtt's, and the reference device."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import gmqtt  # type: ignore[import-untyped]
import pytest
from amqtt.client import MQTTClient  # type: ignore[import-untyped]
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from devices.agent import Agent, Call
from tests.integration.mqtt.listener_support import ACK, RLS, TOKENS, Owner, Server, listening
from tests.integration.mqtt.test_link import DEADLINE_SEC


@pytest.mark.parametrize("version", [MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5])
async def test_paho_in_its_own_thread(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    async with listening(owner) as server:
        acknowledged = threading.Event()
        client = Client(CallbackAPIVersion.VERSION2, client_id="door", protocol=version)
        client.username_pw_set("door", TOKENS["door"])
        client.on_connect = lambda client, *_: client.subscribe(RLS, 1)

        def commanded(client: Client, _: Any, message: MQTTMessage) -> None:
            client.publish(ACK, b"done " + message.payload, 1)

        client.on_message = commanded
        client.on_publish = lambda *_: acknowledged.set()
        client.connect_async(server.host, server.port, keepalive=10)
        client.loop_start()
        await owner.until(lambda: owner.presence == ["door online"])
        owner.send(b"lock")
        await owner.until(lambda: owner.payloads == [b"done lock"])
        await owner.until(acknowledged.is_set)
        client.disconnect()
        await asyncio.to_thread(client.loop_stop)
        await owner.until(lambda: server.connected == 0)


async def test_pahos_properties_of_mqtt_5_arrive() -> None:
    owner = Owner()
    async with listening(owner) as server:
        client = Client(CallbackAPIVersion.VERSION2, client_id="door", protocol=MQTTProtocolVersion.MQTTv5)
        client.username_pw_set("door", TOKENS["door"])
        asked = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        asked.ReceiveMaximum, asked.SessionExpiryInterval, asked.MaximumPacketSize = 5, 600, 10_000
        told: list[Any] = []
        client.on_connect = lambda *said: told.append(said[3:])
        client.connect_async(server.host, server.port, properties=asked)
        client.loop_start()
        await owner.until(lambda: len(told) == 1)
        reason, properties = told[0]
        assert reason == 0
        assert properties.SessionExpiryInterval == 0
        assert (properties.MaximumQoS, properties.ReceiveMaximum, properties.TopicAliasMaximum) == (1, 20, 0)
        said = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        said.CorrelationData = b"cmd_1"
        client.publish(ACK, b"{}", 1, properties=said)
        await owner.until(lambda: len(owner.messages) == 1)
        assert owner.messages[0].correlation == b"cmd_1"
        client.disconnect()
        await asyncio.to_thread(client.loop_stop)


@pytest.mark.parametrize("version", [4, 5])
async def test_gmqtt(version: int) -> None:
    owner = Owner()
    async with listening(owner) as server:
        client = gmqtt.Client("door", clean_session=True)
        client.set_auth_credentials("door", TOKENS["door"])
        client.on_connect = lambda client, *_: client.subscribe(RLS, qos=1)

        async def commanded(client: Any, topic: str, payload: bytes, qos: int, properties: Any) -> int:
            client.publish(ACK, b"done " + payload, qos=1)
            return 0

        client.on_message = commanded
        await client.connect(server.host, server.port, keepalive=10, version=version)
        await owner.until(lambda: owner.presence == ["door online"])
        owner.send(b"lock")
        await owner.until(lambda: owner.payloads == [b"done lock"])
        await owner.until(lambda: [receipt.reason for receipt in owner.receipts] == [0])
        await client.disconnect()


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_the_client_of_amqtt(qos: int) -> None:
    owner = Owner()
    async with listening(owner) as server:
        client = MQTTClient(client_id="door", config={"auto_reconnect": False, "keep_alive": 10})
        await client.connect(_url(server))
        await client.subscribe([(RLS, qos)])
        owner.send(b"lock")
        async with asyncio.timeout(DEADLINE_SEC):
            command = await client.deliver_message()
        assert (command.data, command.qos) == (b"lock", min(qos, 1))
        await client.publish(ACK, b"ok", qos=qos)
        await owner.until(lambda: owner.payloads == [b"ok"])
        await client.disconnect()
        await owner.until(lambda: server.connected == 0)


@pytest.mark.parametrize(("asked", "spoken"), [("", 4), ("?v=3.1.1", 4), ("?v=5", 5)])
async def test_the_reference_device_speaks_the_version_in_its_url(asked: str, spoken: int) -> None:
    owner = Owner()
    async with listening(owner) as server, asyncio.TaskGroup() as tasks:
        agent = Agent("door", TOKENS["door"], f"mqtt://{server.host}:{server.port}{asked}", grants="none")

        @agent.command("lock")
        async def lock(call: Call) -> None: ...

        device = tasks.create_task(agent.run())
        await owner.until(lambda: owner.presence == ["door online"])
        assert server.listener.peers["door"].session.version == spoken
        owner.send(b'{"id":"cmd_1","type":"lock"}')
        await owner.until(lambda: len(owner.messages) == 3)
        said = [json.loads(payload)["status"] for payload in owner.payloads]
        assert said == ["online", "acknowledged", "executed"]
        device.cancel()


def _url(server: Server) -> str:
    return f"mqtt://door:{TOKENS['door']}@{server.host}:{server.port}/"
