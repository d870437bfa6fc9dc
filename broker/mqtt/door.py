"""Opens the MQTT server for devices: the listener in this process, a supervised Mosquitto, or another server.

The caller gets a link and an address; the differences between the three stay in this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from broker.core import Core
from broker.domain.fleet import DeviceState
from broker.domain.mqtt_rules import MqttRules
from broker.engine.ids import new_secret, token_digest
from broker.engine.speech.access_rules import (
    STATUS,
    answer_suffixes,
    command_suffixes,
    common,
    of_device,
    topics_of,
)
from broker.mqtt.access import Access, Own, Scope
from broker.mqtt.client.link import MqttLink
from broker.mqtt.external.dynsec import RESPONSE, Dynsec, Shared, Topics
from broker.mqtt.external.password_file import PasswordFile
from broker.mqtt.external.watch import Watch
from broker.mqtt.listener import Listener
from broker.mqtt.mosquitto import LINK_USER, Mosquitto
from broker.mqtt.services import Services
from broker.mqtt.sockets import Sockets
from broker.mqtt.tls import Certificates
from broker.seams import Link
from broker.settings import BadSetting, Settings, discovery, listened
from devices.canary import server_of
from devices.mqtt_url import Endpoint, parse_url
from devices.speech.topics import filter_of
from devices.tls import Tls
from devices.types import DeviceType
from projections import devices as devices_view

logger = structlog.get_logger()

LINK_CLIENT_ID = "ordain"
EVERY = 1_000_000_000


class Door(NamedTuple):
    """The MQTT server of the devices. `devices_url`: its address. `rules`: what is known of its users and
    rules. `listener`: only if it is Ordain's own."""

    link: Link
    devices_url: str
    rules: MqttRules
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
        async with _external(settings, core, types, tls) as door:
            yield door
    elif settings.mqtt_server == "mosquitto":
        async with _mosquitto(settings, core, types, stop) as door:
            yield door
    else:
        async with _listening(settings, core, types, certificates) as door:
            yield door


@asynccontextmanager
async def _external(
    settings: Settings, core: Core, types: dict[str, DeviceType], tls: Tls | None
) -> AsyncIterator[Door]:
    """An MQTT server of someone else. Its users are kept in step, if the settings say so; it is tried."""
    url, rules = settings.mqtt_url, MqttRules(users=settings.mqtt_users)
    events: Shared | None = None
    work: list[Coroutine[Any, Any, None]] = []
    devices = list[DeviceState]()
    if settings.mqtt_users != "none":
        devices = await core.storage.read(lambda sql: devices_view.newest(sql, None, None, EVERY))
    if settings.mqtt_users == "dynsec":
        dynsec = Dynsec(
            parse_url(url).username or "",
            sends=[f"{settings.prefix}/#", *_bought(settings.prefix, types), *discovery(settings)],
            topics=partial(_topics_of, core),
            known=partial(_known, core),
            devices=devices,
            rules=rules,
        )
        core.registry.issued, core.registry.entitled = dynsec.issued, dynsec.entitled
        core.registry.gateways.regrouped = dynsec.regrouped
        events = Shared(core.intake, dynsec)
        work.append(dynsec.run())
    elif settings.mqtt_users == "password_file":
        places = Path(settings.mqtt_password_file), Path(settings.mqtt_pid_file)
        deleted = await core.storage.read(devices_view.deleted)
        passwords = PasswordFile(*places, [*devices, *deleted], rules)
        core.registry.entitled = passwords.entitled
        work.append(passwords.run())
    async with _linked(settings, core, types, url, tls, events) as link:
        if events is not None:
            events.serve(link)
        server = server_of(url, settings.mqtt_ca)
        work.append(Watch(core, link, server, Path(settings.data), rules).run())
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
            yield Door(link, url, rules)
            for task in tasks:
                task.cancel()


@asynccontextmanager
async def _linked(
    settings: Settings,
    core: Core,
    types: dict[str, DeviceType],
    url: str,
    tls: Tls | None = None,
    events: Shared | None = None,
) -> AsyncIterator[MqttLink]:
    control = [] if events is None else [RESPONSE]
    link = MqttLink(
        url,
        client_id=LINK_CLIENT_ID,
        subscriptions=[
            *(f"{settings.prefix}/dev/+/{suffix}" for suffix in sorted(answer_suffixes(types))),
            *control,
        ],
        events=core.intake if events is None else events,
        clean_session=False,
        entropy=core.writer.entropy,
        tls=tls,
        holds=lambda: core.holds(),
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
        command_suffixes=command_suffixes(types),
        answer_suffixes=answer_suffixes(types) - {STATUS},
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
    core.registry.gateways.regrouped = lambda gateway: listener.regrouped(gateway.hardware_id)
    core.mqtt_events.wanted = lambda: False  # each service has its own position in the log
    listener.start()
    try:
        await sockets.open()
        for endpoint in sockets.endpoints:
            logger.info("mqtt.listening", address=str(endpoint))
        yield Door(listener, str(sockets.endpoints[0]), MqttRules(users="listener"), listener)
    except OSError as error:
        raise BadSetting(f"mqtt_listen: {error.strerror or error}") from error
    finally:
        await sockets.close()
        await listener.close()


async def _check_device(core: Core, hardware_id: str, token: str | None) -> str | None:
    """Checks the token of a device; with None (client certificate), only that the device exists. Brings the
    devices into memory that it speaks for.

    Returns None if the device is accepted, else the reason, for the log only.
    """
    right = token is None or await core.registry.authenticate(hardware_id, token) is not None
    await core.live.bring(core.storage, [hardware_id])
    device = core.live.device(hardware_id)
    if device is None or device.hardware_id != hardware_id:
        return "no device has this hardware id"
    if device.deleted_at is not None:
        return "the device was deleted"
    if device.gateway is not None:
        return "its gateway speaks for it"
    if not right:
        return "wrong token"
    await core.live.bring(core.storage, core.registry.gateways.children(hardware_id))
    return None


def _own(core: Core, hardware_id: str) -> Own | None:
    """The topics of a device whose type has topics of its own, or that speaks for others. They are in memory:
    see `_check_device`."""
    device, addresses = core.live.device(hardware_id), core.commands.addresses
    children = core.registry.gateways.states(hardware_id)
    if device is None or not (children or addresses.speaks(device)):
        return None
    found = [addresses.reach(each) for each in (device, *children)]
    own, *others = (Own(each.hears, frozenset(each.says), each.others, each.will) for each in found)
    devices = {child.hardware_id: each for child, each in zip(children, others, strict=True)}
    return own._replace(devices=devices)


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
    devices = await core.storage.read(lambda sql: devices_view.newest(sql, None, None, EVERY))
    child = Mosquitto(
        Path(settings.data) / "mosquitto",
        host,
        port,
        link_digest=token_digest(password, entropy),
        acl="\n".join([*common(settings.prefix, types, LINK_USER), ""]),
        acl_of=partial(_rules_of, core, {each.hardware_id: each for each in devices if each.gateway}),
        entropy=entropy,
    )
    core.registry.entitled = core.registry.gateways.regrouped = child.admit
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
            yield Door(link, str(Endpoint(child.host, child.port)), MqttRules(users="child"))
        running.cancel()


def _bought(prefix: str, types: dict[str, DeviceType]) -> set[str]:
    """Filters of the command topics of bought devices, which have topics of their own."""
    return {filter_of(each, prefix) for kind in types.values() if kind.speeches for each in kind.listens}


def _topics_of(core: Core, device: DeviceState) -> Topics:
    """All topics of a device, and of those that it speaks for."""
    speaking = (device, *core.registry.gateways.states(device.hardware_id))
    both = [topics_of(core.commands.addresses, each) for each in speaking]
    reads, writes = (set[str]().union(*found) for found in zip(*both, strict=True))
    return Topics(reads, writes)


async def _known(core: Core, hardware_id: str) -> DeviceState | None:
    """A device, also a deleted one. Those that it speaks for are in memory then."""
    await core.live.bring(core.storage, [hardware_id, *core.registry.gateways.children(hardware_id)])
    device = core.live.device(hardware_id)
    return device if device is not None and device.hardware_id == hardware_id else None


def _rules_of(core: Core, known: dict[str, DeviceState], device: DeviceState) -> list[str]:
    """`known`: the devices that have a gateway, as they were last seen in memory."""
    names = core.registry.gateways.children(device.hardware_id)
    children = [core.live.device(name) or known[name] for name in names]
    known |= {child.hardware_id: child for child in children}
    return of_device(core.commands.addresses, device, children)
