"""The server of part e as it was before the listener: amqtt in our process with our client link to it.

It runs the code of an old commit, whose directory is the argument. The product must not use it.
"""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module
from typing import Any

import structlog
import uvloop

from scripts.bench.trips import COMMAND, PROPERTIES, Trips, serve

PASSWORD = "link"


class Owner:
    """Accepts every client. Acknowledges in the next turn of the event loop, the earliest a commit could."""

    def __init__(self, seams: Any) -> None:
        self.link: Any
        self.up = asyncio.Event()
        self.here: dict[str, None] = {}
        self.trips: Trips | None = None
        self._seams = seams

    async def check(self, hardware_id: str, token: str) -> bool:
        return True

    def link_up(self) -> None:
        self.up.set()

    def link_down(self, why: str) -> None: ...

    def device_online(self, hardware_id: str) -> None:
        self.here[hardware_id] = None

    def device_offline(self, hardware_id: str) -> None:
        self.here.pop(hardware_id, None)

    def message(self, message: Any) -> None:
        asyncio.get_running_loop().call_soon(self.link.puback, message)
        if self.trips is not None:
            self.trips.answered(message.topic.split("/")[2])

    def send(self, name: str) -> None:
        message = self._seams.Outgoing(topic=f"iotee/dev/{name}/rls", payload=COMMAND, **PROPERTIES)
        self.link.publish(message, lambda receipt: None)


async def main(old: str) -> None:
    sys.path.insert(0, old)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for figures
    owner = Owner(import_module("broker.seams"))
    access = import_module("broker.mqtt_access").Access(
        prefix="iotee", link_password=PASSWORD, check_device=owner.check
    )
    server = import_module("broker.mqtt_server").EmbeddedServer(
        host="127.0.0.1", port=0, access=access, presence=owner
    )
    await server.start()
    owner.link = import_module("broker.mqtt").MqttLink(
        server.url,
        client_id="ordain",
        subscriptions=["iotee/dev/+/ack", "iotee/dev/+/status"],
        events=owner,
        clean_session=True,
        entropy=import_module("broker.world").SystemEntropy(),
    )

    def trips() -> Trips:
        owner.trips = Trips(list(owner.here), owner.send)
        return owner.trips

    async with asyncio.TaskGroup() as group:
        group.create_task(owner.link.run())
        await owner.up.wait()
        await serve(server.port, lambda: len(owner.here), trips)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
