"""The documented device types against a real Mosquitto, with simulated devices that follow their makers'
documentation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import aiomqtt

from broker.type_files import load_types
from devices.names import answer_topic, command_topic, parse_topic
from devices.types import Definition, DeviceType
from devices.wire import Answer, decode_answer, encode_command

DOCS = Path(__file__).parents[3] / "docs"
HARDWARE_ID = "PLUG"
WITHIN_SEC = 120
TYPES = load_types(str(DOCS / "types"))


class Server(Protocol):
    """The part of the `mosquitto` fixture that these tests use."""

    host: str
    port: int


class Heard(NamedTuple):
    suffix: str
    payload: bytes


class Broker:
    """Sends to and reads from one device as its type defines: topics, payloads and answers through
    `devices.wire`."""

    def __init__(self, client: aiomqtt.Client, kind: DeviceType) -> None:
        self._client, self._kind = client, kind

    async def tell(self, command: str) -> Answer:
        definition = self._kind.definition(command)
        payload = encode_command(
            definition, command_id="cmd_1", command=command, params={}, attempt=1, expires_at=None, grant=None
        )
        await self._client.publish(command_topic("iotee", HARDWARE_ID, definition), payload, qos=1)
        return decode_answer(await self.hear(definition.answer_suffix), None, definition.answers)

    async def hear(self, suffix: str) -> bytes:
        async for message in self._client.messages:
            if parse_topic("iotee", message.topic.value) == (HARDWARE_ID, suffix):
                return bytes(message.payload)
        raise AssertionError("the connection ended")


async def tasmota_plug(client: aiomqtt.Client) -> None:
    """A plug as Tasmota documents it, with FullTopic iotee/dev/%topic%/%prefix%/ and one relay."""
    base, on = f"iotee/dev/{HARDWARE_ID}", False
    await client.publish(f"{base}/tele/LWT", b"Online", retain=True)
    async for message in client.messages:
        word = bytes(message.payload).upper()
        if message.topic.value.upper() != f"{base}/cmnd/POWER".upper():
            continue
        on = {b"ON": True, b"OFF": False, b"TOGGLE": not on}.get(word, on)
        state = "ON" if on else "OFF"
        await client.publish(f"{base}/stat/RESULT", f'{{"POWER":"{state}"}}')
        await client.publish(f"{base}/stat/POWER", state)


@contextlib.asynccontextmanager
async def met(
    server: Server, kind: str, device: Callable[[aiomqtt.Client], Awaitable[None]], subscribes: str
) -> AsyncIterator[Broker]:
    """The broker's side and the device, both connected; the device is subscribed."""
    topic = f"iotee/dev/{HARDWARE_ID}/{subscribes}"
    async with (
        asyncio.timeout(WITHIN_SEC),
        aiomqtt.Client(server.host, server.port, clean_session=True) as ours,
        aiomqtt.Client(server.host, server.port, identifier=HARDWARE_ID) as theirs,
    ):
        await ours.subscribe(
            [(f"iotee/dev/+/{suffix}", 1) for suffix in (TYPES[kind].answer_suffix, "status")]
        )
        await theirs.subscribe(topic)
        acting = asyncio.ensure_future(device(theirs))
        yield Broker(ours, TYPES[kind])
        acting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await acting


async def test_a_tasmota_plug_is_switched_and_its_answers_are_read(mosquitto: Server) -> None:
    async with met(mosquitto, "tasmota_plug", tasmota_plug, "cmnd/#") as broker:
        for command in ("turn_on", "turn_off", "toggle", "toggle"):
            assert await broker.tell(command) == Answer(status="executed")


def test_the_page_names_the_topics_that_the_type_uses() -> None:
    page = (DOCS / "how-to" / "tasmota.md").read_text()
    definition: Definition = TYPES["tasmota_plug"].definition("turn_on")

    topics = [command_topic("iotee", HARDWARE_ID, definition), answer_topic("iotee", HARDWARE_ID, definition)]

    assert [topic for topic in topics if topic not in page] == []
