"""The server side of part e, in a process of its own: the listener or the floor, without a broker."""

from __future__ import annotations

import argparse
import asyncio
import resource
from typing import cast

import uvloop

from broker.mqtt.access import Access
from broker.mqtt.listener import Listener
from broker.mqtt.services import Services
from broker.mqtt.sockets import Sockets
from broker.mqtt.tls import Certificates
from broker.seams import Message, Outgoing, Receipt
from broker.settings import MqttLimits
from broker.subscriptions.feed import Feed
from devices.mqtt_url import Endpoint
from scripts.bench.floor import Floor
from scripts.bench.trips import COMMAND, PROPERTIES, Trips, serve


class Owner:
    """Accepts every client. Acknowledges in the next turn of the event loop, the earliest a commit could."""

    def __init__(self) -> None:
        self.listener: Listener
        self.here: dict[str, None] = {}
        self.trips: Trips | None = None

    async def check(self, hardware_id: str, token: str | None) -> str | None:
        return None

    def link_up(self) -> None: ...

    def link_down(self, why: str) -> None: ...

    def device_online(self, hardware_id: str) -> None:
        self.here[hardware_id] = None

    def device_offline(self, hardware_id: str) -> None:
        self.here.pop(hardware_id, None)

    def message(self, message: Message) -> None:
        asyncio.get_running_loop().call_soon(self.listener.puback, message)
        if self.trips is not None:
            self.trips.answered(message.topic.split("/")[2])

    def send(self, name: str) -> None:
        message = Outgoing(topic=f"iotee/dev/{name}/rls", payload=COMMAND, **PROPERTIES)
        self.listener.publish(message, _ignore)


def _ignore(receipt: Receipt) -> None: ...


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["listener", "floor"])
    parser.add_argument("--certificate", default="")
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if given.kind == "floor":
        await _floor()
    else:
        await _listener(given.certificate)


async def _listener(certificate: str) -> None:
    owner = Owner()
    bounds = MqttLimits(strangers=50_000, strangers_per_address=50_000)
    access = Access(prefix="iotee", check_device=owner.check)
    # No service connects, so the feed is never used.
    services = Services(cast(Feed, None), access.events, lambda: "", lambda name: None)
    owner.listener = Listener(access, owner, services, bounds)
    endpoint = Endpoint("127.0.0.1", 0, tls=bool(certificate))
    certificates = Certificates(certificate, "") if certificate else None
    sockets = Sockets(owner.listener, [endpoint], certificates=certificates)
    owner.listener.start()
    await sockets.open()

    def trips() -> Trips:
        owner.trips = Trips(list(owner.here), owner.send)
        return owner.trips

    await serve(sockets.endpoints[0].port, lambda: len(owner.here), trips)


async def _floor() -> None:
    clients: list[Floor] = []
    current: list[Trips] = []

    def said(client: Floor, payload: bytes) -> None:
        if current:
            current[-1].answered(client)

    server = await asyncio.get_running_loop().create_server(
        lambda: Floor(clients, said), "127.0.0.1", 0, backlog=4_096
    )

    def trips() -> Trips:
        current.append(Trips(list(clients), lambda client: client.send(COMMAND)))
        return current[-1]

    await serve(server.sockets[0].getsockname()[1], lambda: len(clients), trips)


if __name__ == "__main__":
    uvloop.run(main())
