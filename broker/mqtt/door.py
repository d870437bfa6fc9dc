"""Opens the MQTT server for devices: the listener in this process, a supervised Mosquitto, or another server.

The caller gets a link and an address; the differences between the three stay in this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog

from broker.core import Core
from broker.domain.fleet import DeviceState
from broker.engine.ids import new_secret, token_digest
from broker.mqtt.access import Access, Own, Scope
from broker.mqtt.client.link import MqttLink
from broker.mqtt.listener import Listener
from broker.mqtt.mosquitto import LINK_USER, Mosquitto
from broker.mqtt.services import Services
from broker.mqtt.sockets import Sockets
from broker.mqtt.tls import Certificates
from broker.seams import Link
from broker.settings import BadSetting, Settings, listened
from devices.mqtt_url import Endpoint
from devices.speech.topics import filter_of
from devices.tls import Tls
from devices.types import DeviceType
from projections import devices as devices_view

logger = structlog.get_logger()

LINK_CLIENT_ID = "ordain"
STATUS = "status"
EVERY = 1_000_000_000


class Door(NamedTuple):
    """The MQTT server of the devices. `devices_url`: its address. `listener`: only if it is Ordain's own."""

    link: Link
    devices_url: str
    listener: Listener | None = None


@asynccontextmanager
async def mqtt_door(
    settings: Settings,
    core: Core,
    types: dict[str, DeviceType],
    stop: asyncio.Event,
    certificates: Certificates | None,
    tls: Tls | None,
) -> AsyncIterator[Door]:
    """Runs the MQTT server of these settings, and the core's link to it.

    If `stop` is set, it does not wait for Mosquitto to start. `tls`: for the link to an external server.

    Raises:
        BadSetting: an address cannot be listened on, or Mosquitto is not installed.
    """
    if settings.mqtt_url:
        async with _linked(settings, core, types, settings.mqtt_url, tls) as link:
            yield Door(link, settings.mqtt_url)
    elif settings.mqtt_server == "mosquitto":
        async with _mosquitto(settings, core, types, stop) as door:
            yield door
    else:
        async with _listening(settings, core, types, certificates) as door:
            yield door


@asynccontextmanager
async def _linked(
    settings: Settings, core: Core, types: dict[str, DeviceType], url: str, tls: Tls | None = None
) -> AsyncIterator[MqttLink]:
    link = MqttLink(
        url,
        client_id=LINK_CLIENT_ID,
        subscriptions=[f"{settings.prefix}/dev/+/{suffix}" for suffix in sorted(_answer_suffixes(types))],
        events=core.intake,
        clean_session=False,
        entropy=core.writer.entropy,
        tls=tls,
    )
    core.attach(link)
    link.want(list(core.commands.addresses.filters))
    core.commands.addresses.used = link.want
    async with asyncio.TaskGroup() as group:
        group.create_task(link.run())
        try:
            yield link
        finally:
            await link.close()


@asynccontextmanager
async def _listening(
    settings: Settings, core: Core, types: dict[str, DeviceType], certificates: Certificates | None
) -> AsyncIterator[Door]:
    bounds = settings.mqtt_limits
    access = Access(
        prefix=settings.prefix,
        check_device=partial(_check_device, core),
        check_service=partial(_check_service, core) if settings.mqtt_events else None,
        command_suffixes=_command_suffixes(types),
        answer_suffixes=_answer_suffixes(types) - {STATUS},
        own=partial(_own, core),
    )
    heard = Services(
        core.feed,
        access.events,
        lambda: core.log_id,
        core.mqtt_events.devices.get,
        stalled_sec=bounds.stalled_sec,
        filters=bounds.filters,
    )
    listener = Listener(access, core.intake, heard, bounds)
    sockets = Sockets(
        listener,
        listened(settings),
        certificates=certificates,
        identity_field=settings.tls_client_identity,
        trusted_proxies=settings.trusted_proxies,
    )

    def entitled(device: DeviceState) -> None:
        if device.deleted_at is not None:
            listener.disconnect(device.hardware_id, "the device was deleted")
        elif device.version > 1:
            listener.disconnect(device.hardware_id)

    core.attach(listener)
    core.registry.entitled = entitled
    core.mqtt_events.wanted = lambda: False  # each service has its own position in the log
    listener.start()
    try:
        await sockets.open()
        for endpoint in sockets.endpoints:
            logger.info("mqtt.listening", address=str(endpoint))
        yield Door(listener, str(sockets.endpoints[0]), listener)
    except OSError as error:
        raise BadSetting(f"mqtt_listen: {error.strerror or error}") from error
    finally:
        await sockets.close()
        await listener.close()


async def _check_device(core: Core, hardware_id: str, token: str | None) -> str | None:
    """Checks the token of a device; with None (client certificate), only that the device exists.

    Returns None if the device is accepted, else the reason, for the log only.
    """
    right = token is None or await core.registry.authenticate(hardware_id, token) is not None
    await core.live.bring(core.storage, [hardware_id])
    device = core.live.device(hardware_id)
    if device is None or device.hardware_id != hardware_id:
        return "no device has this hardware id"
    if device.deleted_at is not None:
        return "the device was deleted"
    return None if right else "wrong token"


def _own(core: Core, hardware_id: str) -> Own | None:
    """The topics of a device whose type has topics of its own. The device is in memory: see
    `_check_device`."""
    device, addresses = core.live.device(hardware_id), core.commands.addresses
    if device is None or not addresses.speaks(device):
        return None
    reach = addresses.reach(device)
    return Own(reach.hears, frozenset(reach.says), reach.others, reach.will)


async def _check_service(core: Core, secret: str) -> Scope | None:
    def valid() -> bool:
        caller = core.keys.caller(secret)  # looked up each time: a key may be revoked
        return caller is not None and "events:read" in caller.scopes

    caller = core.keys.caller(secret)
    return Scope(caller.project, valid, caller.devices) if caller is not None and valid() else None


@asynccontextmanager
async def _mosquitto(
    settings: Settings, core: Core, types: dict[str, DeviceType], stop: asyncio.Event
) -> AsyncIterator[Door]:
    entropy = core.writer.entropy
    host, port, _ = listened(settings)[0]
    password = new_secret("", entropy)
    child = Mosquitto(
        Path(settings.data) / "mosquitto",
        host,
        port,
        link_digest=token_digest(password, entropy),
        acl=_acl(settings.prefix, types),
        acl_of=partial(_acl_of, core),
        entropy=entropy,
    )
    devices = await core.storage.read(lambda sql: devices_view.newest(sql, None, None, EVERY))
    core.registry.entitled = child.admit
    core.mqtt_events.wanted = lambda: False  # only devices have users there
    async with asyncio.TaskGroup() as group:
        ready = asyncio.Event()
        running = group.create_task(child.run(devices, ready))
        facts = [group.create_task(fact.wait()) for fact in (ready, stop)]
        await asyncio.wait(facts, return_when=asyncio.FIRST_COMPLETED)
        for fact in facts:
            fact.cancel()
        link_url = f"mqtt://{LINK_USER}:{password}@127.0.0.1:{child.link_port}?v=5"
        async with _linked(settings, core, types, link_url) as link:
            yield Door(link, str(Endpoint(child.host, child.port)))
        running.cancel()


def _command_suffixes(types: dict[str, DeviceType]) -> frozenset[str]:
    return frozenset[str]().union(*(kind.command_suffixes for kind in types.values()))


def _answer_suffixes(types: dict[str, DeviceType]) -> set[str]:
    return {kind.answer_suffix for kind in types.values()} | {STATUS}


def _acl_of(core: Core, device: DeviceState) -> list[str]:
    """The rules of one device whose type has topics of its own."""
    if not core.commands.addresses.speaks(device):
        return []
    reach = core.commands.addresses.reach(device)
    lines = [f"user {device.hardware_id}"]
    lines += [f"topic read {topic}" for topic in sorted(reach.hears)]
    return lines + [f"topic write {topic}" for topic in sorted({*reach.says, *reach.others, reach.will})]


def _acl(prefix: str, types: dict[str, DeviceType]) -> str:
    """Allows each device only its own topics, like the listener. Format: mosquitto.conf(5)."""
    written = sorted(_answer_suffixes(types))
    lines = [f"user {LINK_USER}", f"topic readwrite {prefix}/#"]
    bought = [kind for kind in types.values() if kind.speeches]
    lines += sorted({f"topic read {filter_of(each, prefix)}" for kind in bought for each in kind.says})
    lines += sorted({f"topic write {filter_of(each, prefix)}" for kind in bought for each in kind.listens})
    lines += [f"pattern read {prefix}/dev/%u/{suffix}" for suffix in sorted(_command_suffixes(types))]
    lines += [f"pattern write {prefix}/dev/%u/{suffix}" for suffix in written]
    return "\n".join(lines) + "\n"
