"""The benchmark's devices: many `generic` devices on a few MQTT connections, in a separate process.

They answer at once and store nothing, so they need little CPU. They are not reference devices: they would
execute a repeated command again. The process prints `ready` when all devices are subscribed and the PUBACKs
of their `online` messages have arrived.
"""

from __future__ import annotations

import argparse
import asyncio
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from scripts.bench.mqtt import Client

PREFIX = "iotee/dev"
RESULTS = {
    "acknowledged": b'{"id":"%s","status":"acknowledged"}',
    "executed": b'{"id":"%s","status":"executed","result":{"ok":true,"battery_percent":87}}',
}


class _Command(msgspec.Struct):
    id: str


_decode = msgspec.json.Decoder(_Command).decode


def hardware_id(number: int) -> str:
    return f"bench_{number:04}"


class _Devices:
    """The devices of one connection."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self.client: Client

    def command(self, topic: bytes, payload: bytes) -> None:
        command_id = _decode(payload).id.encode()
        answer_topic = topic.removesuffix(b"rls") + b"ack"
        for answer in self._answers:
            self.client.publish(answer_topic, answer % command_id)


async def _run(
    port: int, devices: int, connections: int, answers: list[bytes], tokens: dict[str, str] | None
) -> None:
    for number in range(devices if tokens else connections):
        names = [hardware_id(device) for device in range(number, devices, devices if tokens else connections)]
        group = _Devices(answers)
        group.client = client = Client(group.command)
        await client.enter(port, names[0], password=tokens[names[0]] if tokens else "-")
        await client.subscribe([f"{PREFIX}/{name}/rls" for name in names])
        for name in names:
            client.publish(f"{PREFIX}/{name}/status".encode(), b"online", retain=True)
        await client.settled()
    print("ready", flush=True)
    await asyncio.Future()


def main() -> None:
    parser = argparse.ArgumentParser()
    number = partial(parser.add_argument, type=int, required=True)
    number("--port")
    number("--devices")
    number("--connections")
    parser.add_argument("--answers", nargs="+", choices=RESULTS, required=True)
    parser.add_argument("--tokens", type=Path, help="JSON: each device connects as itself, with its token")
    given = parser.parse_args()
    answers = [RESULTS[name] for name in given.answers]
    tokens = msgspec.json.decode(given.tokens.read_bytes()) if given.tokens else None
    uvloop.run(_run(given.port, given.devices, given.connections, answers, tokens))


if __name__ == "__main__":
    main()
