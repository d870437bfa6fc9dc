"""The largest packets that the listener allows do not hold the event loop up, from the first byte to the
recorded answer."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.engine.commands import Order
from broker.engine.registry import NewDevice
from broker.mqtt import packets as p
from broker.mqtt.codec import encode
from broker.mqtt.door import mqtt_door
from broker.mqtt.packets import Packet
from broker.settings import Limits, MqttLimits, Settings
from broker.world import SqliteStorage
from devices.speech.signing import sign
from devices.types import load_type, shipped_types
from tests.integration.core_support import ME, PROJECT, new_core
from tests.stretches import LONGEST_SEC, Stretches

PACKET = MqttLimits().packet_bytes - 16
ANSWER = 65_536
SIGNING = load_type('name = "signing"\nopen = true\nanswers_signed = "optional"\n')
TYPES = shipped_types() | {"signing": SIGNING}
DEVICES = {"door": "generic", "vault": "signing", "plug": "shelly_gen2", "tasmota_1": "tasmota"}
V5 = 5
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
RAW = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
PUBLIC = base64.urlsafe_b64encode(RAW).decode().rstrip("=")


class Input(NamedTuple):
    """One write of a client that is let in. `user`: a device, or `service`."""

    what: str
    user: str
    data: bytes


def packed(*found: Packet) -> bytes:
    return b"".join(encode(each, V5) for each in found)


def publish(topic: str, payload: bytes, packet_id: int = 1, **properties: Any) -> p.Publish:
    return p.Publish(topic, payload, qos=1, packet_id=packet_id, properties=properties)


def subscribe(*topics: str) -> p.Subscribe:
    return p.Subscribe(1, [p.Filter(topic, 1) for topic in topics])


def answers(command_id: str) -> Iterator[tuple[str, bytes]]:
    """The largest answers of each shape."""
    shapes: dict[str, Any] = {
        "a long text": "x" * (ANSWER - 200),
        "many numbers": [1.5] * ((ANSWER - 200) // 4),
        "many names": {f"{n:05}": n for n in range((ANSWER - 200) // 15)},
        "many objects": [{}] * ((ANSWER - 200) // 3),
        "nested deeply": [[[[[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]]]]] * ((ANSWER - 200) // 44),
    }
    for shape, value in shapes.items():
        said = {"id": command_id, "status": "executed", "result": value}
        yield f"an answer: {shape}", msgspec.json.encode(said)
        yield f"a msgpack answer: {shape}", msgspec.msgpack.encode(said)
        failed = {"id": command_id, "status": "failed", "error": {"details": value}}
        yield f"an error: {shape}", msgspec.json.encode(failed)
    yield "a text", b"x" * ANSWER
    yield "brackets", b'{"a":' + b"[" * (ANSWER - 6)


def inputs(commands: dict[str, str]) -> Iterator[Input]:
    command_id, ack = commands["door"], "iotee/dev/door/ack"
    for what, payload in answers(command_id):
        yield Input(what, "door", packed(publish(ack, payload)))
    done = {"id": commands["vault"], "status": "executed", "result": "x" * 48_000}
    text = msgspec.json.encode(done)
    vault = "iotee/dev/vault/ack"
    for what, payload in (("signed", sign(text, "vault", KEY)), ("wrongly signed", sign(text, "door", KEY))):
        yield Input(f"a large answer, {what}", "vault", packed(publish(vault, payload)))
    small = sign(msgspec.json.encode({"id": commands["vault"], "status": "executed"}), "vault", KEY)
    burst = MqttLimits().receive_maximum
    yield Input("many signed answers", "vault", packed(*(publish(vault, small, n + 1) for n in range(burst))))
    for n, topic in enumerate(("iotee/rpc/plug/rpc", "plug/status/switch:0")):
        for what, payload in answers(command_id):
            yield Input(f"to rules ({n}): {what}", "plug", packed(publish(topic, payload)))
    for what, payload in answers(command_id):
        yield Input(f"a state: {what}", "tasmota_1", packed(publish("stat/tasmota_1/RESULT", payload)))
    yield Input("the largest payload", "door", packed(publish(ack, b"x" * (PACKET - 100))))
    yield Input("another's topic", "door", packed(publish("iotee/dev/gate/ack", b"x" * (PACKET - 100))))
    yield Input("the longest topic", "door", packed(publish("a/" * 32_000, b"1")))
    pairs = [("", "") for _ in range((PACKET - 100) // 5)]
    yield Input("user properties", "door", packed(publish(ack, b"1", user=pairs)))
    for topic in ("a", "+", "#", "+/" * 60 + "#", "iotee/dev/door/rls"):
        many = (PACKET - 10) // (len(topic) + 3)
        yield Input(f"SUBSCRIBE {topic[:20]}", "door", packed(subscribe(*[topic] * many)))
        yield Input(f"UNSUBSCRIBE {topic[:20]}", "door", packed(p.Unsubscribe(1, [topic] * many)))
        yield Input(f"SUBSCRIBE {topic[:20]}", "service", packed(subscribe(*[topic] * many)))
    own = [f"iotee/evt/door/{n}" for n in range(PACKET // 24)]
    yield Input("SUBSCRIBE own", "service", packed(subscribe(*own)))
    yield Input("UNSUBSCRIBE own", "service", packed(p.Unsubscribe(1, own)))
    yield Input("PINGREQ", "door", packed(p.Ping()) * (PACKET // 2))
    yield Input("many small QoS 0", "door", packed(p.Publish(ack, b"1", qos=0)) * 5_000)
    yield Input("many small QoS 1", "door", packed(*(publish(ack, b"1", n + 1) for n in range(5_000))))
    yield Input("a packet in bytes of nothing", "door", b"\x30\xff\xff\xff\x7f" + b"\0" * PACKET)


def connects() -> Iterator[tuple[str, bytes]]:
    """The largest CONNECT of each shape, of somebody who is not let in yet."""
    room = MqttLimits().connect_bytes - 200
    base: dict[str, Any] = {"client_id": "door", "version": V5, "keepalive": 60, "user": "door"}
    will = p.Will("iotee/dev/door/status", b"x" * room)
    yield "CONNECT with a will", packed(p.Connect(**base, password=b"1", will=will))
    yield "CONNECT with a password", packed(p.Connect(**base, password=b"x" * room))
    pairs = [("", "") for _ in range(room // 5)]
    yield "CONNECT with properties", packed(p.Connect(**base, password=b"1", properties={"user": pairs}))
    yield "CONNECT with a client id", packed(p.Connect(**base | {"client_id": "x" * room}, password=b"1"))
    yield "CONNECT with a user", packed(p.Connect(**base | {"user": "x" * room}, password=b"1"))
    yield "no MQTT", b"GET / HTTP/1.1\r\n" * (room // 16)


def said(address: tuple[str, int], greeting: bytes, data: bytes) -> None:
    """Runs in a thread of its own, so that only the broker's work is measured."""
    with socket.create_connection(address, timeout=60) as client:
        if greeting:
            client.sendall(greeting)
            client.recv(4)
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65_536):
                pass
        except OSError:
            pass  # the broker ends what breaks its rules


async def longest_by_packet(directory: Path) -> dict[str, float]:
    """The longest stretch of the loop, in seconds, by input. scripts/bench/stretches.py prints it."""
    found: dict[str, float] = {}
    # The rates spread many packets over time. What one turn of the loop handles is bounded without them.
    bounds = MqttLimits(packets_per_sec=1e6, bytes_per_sec=1e9)
    settings = Settings(mqtt_listen="127.0.0.1:0", mqtt_limits=bounds)
    storage = await SqliteStorage.open(directory)
    core = new_core(storage, types=TYPES, limits=Limits(), mqtt_events=True)
    await core.open(embedded=True)
    try:
        async with mqtt_door(settings, core, TYPES, asyncio.Event(), None, None) as door:
            assert door.listener is not None
            async with core.running("embedded"):
                tokens = {}
                commands = {}
                for name, kind in DEVICES.items():
                    new = NewDevice(hardware_id=name, type=kind, project=PROJECT, answer_key=PUBLIC)
                    tokens[name] = (await core.registry.register(ME, new)).token
                    order = Order(device=name, type="turn_on" if name not in ("door", "vault") else "open")
                    commands[name] = (await core.commands.create(ME, order)).state.id
                _, tokens["service"] = await core.keys.create(PROJECT, ("events:read",), None)
                host, _, port = door.devices_url.removeprefix("mqtt://").rpartition(":")
                address = host, int(port)
                for what, data in connects():
                    found[what] = await longest(core, address, b"", data)
                for each in inputs(commands):
                    user = each.user
                    hello = p.Connect(
                        client_id=user, version=V5, user=user, password=tokens[user].encode(), keepalive=60
                    )
                    name = f"{each.user}: {each.what}"
                    found[name] = await longest(core, address, encode(hello, V5), each.data)
    finally:
        await storage.close()
    return found


async def longest(core: Any, address: tuple[str, int], greeting: bytes, data: bytes) -> float:
    async with Stretches() as stretches:
        await asyncio.to_thread(said, address, greeting, data)
        await core.writer.barrier()
    return stretches.cpu_sec


async def test_no_packet_holds_the_loop_up_with_the_most_that_it_may_hold(tmp_path: Path) -> None:
    found = await longest_by_packet(tmp_path)
    assert len(found) > 50
    assert {what: sec for what, sec in found.items() if sec >= LONGEST_SEC} == {}
