"""Which MQTT server the devices connect to: our own in this process, a Mosquitto as our child, or another's.

Whoever serves opens one door and learns how to reach it; what differs behind it stays here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from broker.core import Core
from broker.domain.fleet import DeviceState
from broker.engine.ids import new_secret, token_digest
from broker.mqtt.access import Access
from broker.mqtt.mosquitto import LINK_USER, Mosquitto
from broker.mqtt.server import EmbeddedServer
from broker.settings import BadSetting, Settings, address
from devices.types import DeviceType
from projections import devices as devices_view

EVERY = 1_000_000_000


class Door(NamedTuple):
    """`link_url` holds a password; `embedded`: presence is the connection, and sessions are clean."""

    link_url: str
    devices_url: str
    embedded: bool


@asynccontextmanager
async def mqtt_door(
    settings: Settings, core: Core, types: dict[str, DeviceType], stop: asyncio.Event
) -> AsyncIterator[Door]:
    """The MQTT server of these settings, for as long as it is needed. After `stop` it is not waited for.

    Raises:
        BadSetting: it cannot listen, or Mosquitto is not there.
    """
    if settings.mqtt_url:
        yield Door(settings.mqtt_url, settings.mqtt_url, embedded=False)
    elif settings.mqtt_server == "mosquitto":
        async with _mosquitto(settings, core, types, stop) as door:
            yield door
    else:
        async with _embedded(settings, core, types) as door:
            yield door


@asynccontextmanager
async def _embedded(settings: Settings, core: Core, types: dict[str, DeviceType]) -> AsyncIterator[Door]:
    async def check_device(hardware_id: str, token: str) -> bool:
        device = await core.registry.authenticate(hardware_id, token)
        return device is not None and device.hardware_id == hardware_id

    async def check_service(secret: str) -> Callable[[str], bool] | None:
        def sees(hardware_id: str) -> bool:
            caller = core.keys.caller(secret)  # each time: a key may be revoked
            project = core.mqtt_events.projects.get(hardware_id)
            return caller is not None and project is not None and caller.sees(project)

        caller = core.keys.caller(secret)
        return sees if caller is not None and "events:read" in caller.scopes else None

    host, port = address("mqtt_listen", settings.mqtt_listen)
    access = Access(
        prefix=settings.prefix,
        link_password=new_secret("", core.writer.entropy),
        check_device=check_device,
        check_service=check_service,
        command_suffixes=_command_suffixes(types),
        answer_suffixes={kind.answer_suffix for kind in types.values()},
    )
    server = EmbeddedServer(host=host, port=port, access=access, presence=core.intake)
    try:
        await server.start()
    except OSError as error:
        raise BadSetting(f"mqtt_listen = {settings.mqtt_listen!r}: {error}") from error

    def entitled(device: DeviceState) -> None:
        if device.version > 1:
            server.disconnect(device.hardware_id)

    core.registry.entitled = entitled
    core.mqtt_events.wanted = server.serves
    try:
        yield Door(server.url, f"mqtt://{server.host}:{server.port}", embedded=True)
    finally:
        await server.close()


@asynccontextmanager
async def _mosquitto(
    settings: Settings, core: Core, types: dict[str, DeviceType], stop: asyncio.Event
) -> AsyncIterator[Door]:
    entropy = core.writer.entropy
    host, port = address("mqtt_listen", settings.mqtt_listen)
    password = new_secret("", entropy)
    child = Mosquitto(
        Path(settings.data) / "mosquitto",
        host,
        port,
        link_digest=token_digest(password, entropy),
        acl=_acl(settings.prefix, types),
        entropy=entropy,
    )
    devices = await core.storage.read(lambda sql: devices_view.newest(sql, None, None, EVERY))
    core.registry.entitled = child.admit
    core.mqtt_events.wanted = lambda: False  # its users are the devices alone
    async with asyncio.TaskGroup() as group:
        ready = asyncio.Event()
        running = group.create_task(child.run(devices, ready))
        facts = [group.create_task(fact.wait()) for fact in (ready, stop)]
        await asyncio.wait(facts, return_when=asyncio.FIRST_COMPLETED)
        for fact in facts:
            fact.cancel()
        link_url = f"mqtt://{LINK_USER}:{password}@127.0.0.1:{child.link_port}?v=5"
        yield Door(link_url, f"mqtt://{child.host}:{child.port}", embedded=False)
        running.cancel()


def _command_suffixes(types: dict[str, DeviceType]) -> frozenset[str]:
    return frozenset[str]().union(*(kind.command_suffixes for kind in types.values()))


def _acl(prefix: str, types: dict[str, DeviceType]) -> str:
    """Each device its own topics only, as the embedded server has it. Form: mosquitto.conf(5)."""
    written = sorted({kind.answer_suffix for kind in types.values()} | {"status"})
    lines = [f"user {LINK_USER}", f"topic readwrite {prefix}/#"]
    lines += [f"pattern read {prefix}/dev/%u/{suffix}" for suffix in sorted(_command_suffixes(types))]
    lines += [f"pattern write {prefix}/dev/%u/{suffix}" for suffix in written]
    return "\n".join(lines) + "\n"
