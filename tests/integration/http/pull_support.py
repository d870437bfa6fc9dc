"""A broker on virtual time behind its real HTTP app, so that waiting for the end of a lease takes no real
time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
from litestar.types import ASGIApp

from broker.control import services
from broker.http.app import create_app
from broker.settings import Limits
from devices.types import load_type
from tests.integration.core_support import Bench, Held, running, simulated
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import SimClock, SimLoop

RECORDER = "rec-1"
BARE = """
name = "bell"
payload = "bare"
presence = "required"
transports = ["mqtt", "relay"]
[answers]
ok = "executed"
[commands.ring]
text = "1"
"""
TYPES = {
    kind.name: kind
    for kind in (
        load_type(BARE),
        load_type('name = "tag"\npayload = "json"\nopen = true\ntransports = ["relay", "heartbeat"]\n'),
        load_type('name = "fuse"\nopen = true\nrepeatable = false\ntransports = ["relay", "heartbeat"]\n'),
        load_type('name = "two"\nopen = true\nmax_in_flight = 2\ntransports = ["relay"]\n'),
        load_type('name = "sealed"\nopen = true\nanswers_signed = "required"\ntransports = ["relay"]\n'),
        load_type('name = "small"\nopen = true\ngrants = "HS256"\ntransports = ["mqtt", "relay"]\n'),
    )
}


class Desk(Bench):
    """A Bench with its HTTP API. `key` is a service's client; `registered` returns a device's client."""

    app: ASGIApp
    key: httpx2.AsyncClient
    disk: SimDisk
    held: Held

    def client(self, secret: str) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(self.app)  # type: ignore[arg-type]
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx2.AsyncClient(transport=transport, base_url="http://ordain", headers=headers)

    async def service(self, project: str = "acme", *scopes: str) -> httpx2.AsyncClient:
        wanted = scopes or ("devices:read", "devices:write")
        _, secret = await self.core.keys.create(project, wanted, None)
        return self.client(secret)

    async def registered(self, hardware_id: str = RECORDER, type: str = "recorder") -> httpx2.AsyncClient:
        """Registers a device and returns a client with its token."""
        body = {"hardware_id": hardware_id, "type": type}
        answer = await self.key.post("/v1/devices", json=body)
        assert answer.status_code == 201, answer.text
        return self.client(answer.json()["device_token"])

    async def sent(self, device: str = RECORDER, type: str = "start_recording", **fields: Any) -> str:
        answer = await self.key.post(f"/v1/devices/{device}/commands", json={"type": type} | fields)
        assert answer.status_code == 201, answer.text
        command_id: str = answer.json()["id"]
        return command_id

    async def read(self, command_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.key.get(f"/v1/commands/{command_id}")).json()
        return found

    async def why(self, command_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.key.get(f"/v1/commands/{command_id}/explain")).json()
        return found


async def fetched(client: httpx2.AsyncClient, how: str = "claim", device: str = RECORDER) -> list[Any]:
    """(id, attempts) of the commands in an answer."""
    path = {"claim": "commands/claim", "pending": "commands/pending"}.get(how, how)
    method = "GET" if how == "pending" else "POST"
    answer = await client.request(method, f"/v1/devices/{device}/{path}")
    assert answer.status_code == 200, answer.text
    return [(command["id"], command["attempts"]) for command in answer.json()["commands"]]


async def reported(
    client: httpx2.AsyncClient, command_id: str, device: str = RECORDER, **body: Any
) -> httpx2.Response:
    """Sends an acknowledgement or, with `status`, a result."""
    path = f"/v1/devices/{device}/commands/{command_id}"
    return await (client.post(f"{path}/result", json=body) if body else client.post(f"{path}/ack"))


def on_desk(
    world: Callable[[Desk], Coroutine[Any, Any, None]],
    *more: Callable[[Desk], Coroutine[Any, Any, None]],
    limits: Limits | None = None,
) -> None:
    """Runs a story on one disk; the broker restarts before each further part."""

    async def main(loop: SimLoop) -> None:
        disk = SimDisk(loop)
        key = ""
        for part in (world, *more):
            held = Held(SimStorage(loop, disk))
            async with running(held, SimClock(loop), limits, types=TYPES) as bench:
                desk = Desk(bench.core, bench.wire)
                desk.disk, desk.held, desk.app = disk, held, create_app(services(bench.core))
                if not key:
                    _, key = await bench.core.keys.create("acme", ("devices:read", "devices:write"), None)
                desk.key = desk.client(key)
                await part(desk)
            await held.close()

    simulated(main)
