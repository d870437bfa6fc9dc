"""The whole HTTP side on a real socket, in a thread of its own, with one object of each kind in it.

For tests that send many requests and must not share the broker's event loop. They use only HTTP and the log's
last position.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from uvicorn.server import ServerState

from broker.http.edge.protocol import Bounded
from broker.http.schema.openapi import document
from broker.log import sqlite as log
from tests.integration.http.support import Broker, register, running

WITHIN_SEC = 400
ADMIN = ("admin", "devices:read", "devices:write", "events:read")
TYPES = {"lamp-1": "generic", "lock-1": "iotee_device", "rec-1": "recorder"}
# The commands that are sent. The lamp is online, so its commands go out one at a time.
COMMANDS = (("lamp-1", "blink"), ("lamp-1", "blink"), ("lock-1", "lock"), ("rec-1", "stop_recording"))


def description() -> dict[str, Any]:
    """The OpenAPI document."""
    found: dict[str, Any] = json.loads(document())
    return found


def is_stream(operation: dict[str, Any]) -> bool:
    """Whether the operation answers only with an endless event stream. Tests skip it: only a streaming client
    can read it."""
    contents = [answer.get("content", {}) for answer in operation["responses"].values()]
    return any(content.keys() == {"text/event-stream"} for content in contents)


class Names(dict[str, str]):
    """Values for the parameters in paths; an unknown parameter gets `1`."""

    def __missing__(self, name: str) -> str:
        return "1"


class Served:
    """A broker that serves at `url`, with an admin's `key` and the names of its devices and commands."""

    def __init__(self, broker: Broker, url: str, key: str, commands: list[str]) -> None:
        self.url, self.key = url, key
        self.devices, self.commands = list(TYPES), commands
        self._broker = broker
        self._loop = asyncio.get_running_loop()

    def client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=WITHIN_SEC, verify=False)

    def path(self, template: str, **names: str) -> str:
        return template.format_map(Names({"device": "lamp-1", "command_id": self.commands[0]} | names))

    def new_key(self, project: str, *scopes: str) -> str:
        made = self._broker.core.keys.create(project, scopes, None)
        _, secret = asyncio.run_coroutine_threadsafe(made, self._loop).result(WITHIN_SEC)
        return secret

    def position(self) -> int:
        """The last position of the log, after all pending writes."""

        async def look() -> int:
            writer = self._broker.core.writer
            await writer.barrier()
            return (await writer.storage.read(log.head)).position

        return asyncio.run_coroutine_threadsafe(look(), self._loop).result(WITHIN_SEC)


@contextmanager
def served(directory: Path, *, quiet: bool = False) -> Iterator[Served]:
    """Runs a broker. With `quiet` no device is online, so that no event is written without a request."""
    ready: Future[Served] = Future()
    end: Future[None] = Future()

    def work() -> None:
        try:
            asyncio.run(_serve(directory, ready, end, quiet))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ready.result(WITHIN_SEC)
    finally:
        end.set_result(None)
        thread.join(WITHIN_SEC)
        assert not thread.is_alive()


async def _serve(directory: Path, ready: Future[Served], end: Future[None], quiet: bool) -> None:
    loop = asyncio.get_running_loop()
    async with running(directory) as broker:
        _, key = await broker.core.keys.create("acme", ADMIN, None)
        commands = await _populate(broker, key, quiet)
        state = ServerState()
        config = uvicorn.Config(broker.app, ws="none", lifespan="off", log_config=None)
        async with await loop.create_server(lambda: Bounded(config, state, {}), "127.0.0.1", 0) as server:
            url = "http://{}:{}".format(*server.sockets[0].getsockname())
            ready.set_result(Served(broker, url, key, commands))
            await asyncio.wrap_future(end)
            for connection in list(state.connections):
                connection.shutdown()
            async with asyncio.timeout(WITHIN_SEC):
                while state.connections or state.tasks:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)


async def _populate(broker: Broker, key: str, quiet: bool) -> list[str]:
    """Creates a device of each type, and commands in these states: executed, published, pending,
    cancelled."""
    made = []
    async with broker.client(key) as client:
        for hardware_id, type_name in TYPES.items():
            await register(client, hardware_id, type=type_name)
        if not quiet:
            broker.online("lamp-1")
        for device, name in COMMANDS:
            body = {"type": name, "ttl_sec": None}  # nothing ends by itself while a test counts events
            answer = await client.post(f"/v1/devices/{device}/commands", json=body)
            made.append(answer.json()["id"])
        broker.says("lamp-1", b"[")
        while not quiet and broker.core.live.members[made[0]].state.attempts == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for status in ("acknowledged", "executed"):
            broker.says("lamp-1", json.dumps({"id": made[0], "status": status}).encode())
        assert (await client.delete(f"/v1/devices/rec-1/commands/{made[-1]}")).status_code == 200
    return made
