"""The real core behind the HTTP app, in this process: a temporary SQLite file and no MQTT server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from litestar.types import ASGIApp

from broker.control import services
from broker.core import Core
from broker.http.app import create_app
from broker.seams import Clock, Message, Outbound, Outgoing, Receipt
from broker.settings import Limits, ProjectLimits, Settings
from broker.world import SqliteStorage, SystemEntropy
from devices.types import shipped_types
from tests.integration.core_support import by_turns

WRITE = ("devices:read", "devices:write", "events:read")
READ = ("devices:read",)


class NoServer:
    """A link whose far end is the test: `up` is set by the test, and all publishes are kept."""

    direct = False

    def __init__(self) -> None:
        self.up = False
        self.sent: list[Outgoing] = []
        self.due: list[Callable[[Receipt], None]] = []
        self.took = asyncio.Event()

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        if self.up:
            self.sent.append(outgoing)
            self.due.append(done)
            self.took.set()
        return self.up

    def confirm(self) -> None:
        """Confirms what was published, as an MQTT server does before it delivers an answer."""
        due, self.due = self.due, []
        for done in due:
            done(Receipt(written=True, reason=0))

    def listens(self, topic: str) -> bool:
        return True

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        return


class Broker:
    """A running core with its two apps and a way to create keys."""

    def __init__(self, core: Core, link: NoServer) -> None:
        self.core = core
        self.link = link
        parts = services(core)
        self.streams, self.waits = parts.streams, parts.waits
        self.app: ASGIApp = create_app(parts)
        self.private: ASGIApp = create_app(parts, local=True)

    def client(self, key: str | None = None, app: ASGIApp | None = None) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(app or self.app)  # type: ignore[arg-type]
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.AsyncClient(transport=transport, base_url="http://ordain", headers=headers)

    async def someone(self, project: str = "acme", scopes: tuple[str, ...] = WRITE) -> httpx2.AsyncClient:
        """A client with a new key of a project."""
        _, secret = await self.core.keys.create(project, scopes, None)
        return self.client(secret)

    def online(self, hardware_id: str) -> None:
        """Marks the device online, so that its commands are handed over."""
        self.link.up = True
        self.core.intake.link_up()
        self.core.intake.device_online(hardware_id)

    def says(self, hardware_id: str, payload: bytes) -> None:
        """Sends an answer of the device."""
        self.link.confirm()
        self.core.intake.message(Message(topic=f"iotee/dev/{hardware_id}/ack", payload=payload))


@asynccontextmanager
async def running(
    directory: Path,
    limits: Limits | None = None,
    clock: Clock | None = None,
    outbound: Outbound | None = None,
    **projects: ProjectLimits,
) -> AsyncIterator[Broker]:
    storage = await SqliteStorage.open(directory)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(storage.close)
        settings = Settings(limits=limits or Limits(), projects=projects, mqtt_events=False)
        if clock is None:
            clock = await stack.enter_async_context(by_turns())
        core = Core(storage, clock, SystemEntropy(), shipped_types(), settings, outbound)
        await core.open(embedded=True)
        link = NoServer()
        core.attach(link)
        async with core.running("embedded"):
            yield Broker(core, link)


async def register(client: httpx2.AsyncClient, hardware_id: str = "lamp-1", **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/devices", json={"hardware_id": hardware_id, "type": "generic"} | fields)
    assert answer.status_code == 201, answer.text
    device: dict[str, Any] = answer.json()
    return device


def error_of(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The error in an answer. Asserts the status, the code and the common form of errors."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert {"code", "message"} <= body["error"].keys() <= {"code", "message", "details"}
    assert body["error"]["code"] == code
    error: dict[str, Any] = body["error"]
    return error
