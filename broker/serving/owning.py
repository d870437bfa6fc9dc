"""What the process that owns a log runs, apart from HTTP: the core, the MQTT server, what watches both."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from broker.control import refuse_replay, remember_prefix, services
from broker.core import Core
from broker.http.edge.services import NodesFacts, Services
from broker.http.edge.strangers import Strangers
from broker.mqtt.door import Door, mqtt_door
from broker.mqtt.external.watch import untrusted
from broker.mqtt.figures import figures
from broker.mqtt.tls import Certificates
from broker.pepper import pepper_of
from broker.seams import Answer, Outbound, Storage
from broker.settings import BadSetting, Settings
from broker.subscriptions.outbound import HttpOutbound
from broker.type_files import load_types
from broker.world import SystemClock, SystemEntropy
from devices.mqtt_url import parse_url
from devices.tls import trust
from devices.types import DeviceType


class Beforehand(NamedTuple):
    """What is read from files, and may take its time, before a log is owned. `verify`: see `_of_webhooks`."""

    types: dict[str, DeviceType]
    verify: ssl.SSLContext | None
    pepper: bytes


def beforehand(settings: Settings) -> Beforehand:
    """Raises:
    BadSetting, BadType, Broken: a file is missing or wrong.
    """
    return Beforehand(
        load_types(settings.types, settings.prefix),
        _of_webhooks(settings),
        pepper_of(Path(settings.data), settings.key_pepper_file),
    )


class WhileHolding:
    """Outgoing HTTP that sends nothing for a node which must not act as the owner any more."""

    def __init__(self, outbound: Outbound, holds: Callable[[], bool]) -> None:
        self._outbound, self._holds = outbound, holds

    async def fault(self, url: str) -> str | None:
        return await self._outbound.fault(url)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        if not self._holds():
            return Answer(error="the lease of this node has ended")
        return await self._outbound.post(url, headers, body, timeout_sec)


class Owning(NamedTuple):
    """`group`: ends with the core. `settings`: with the real address of the MQTT server."""

    core: Core
    parts: Services
    door: Door
    group: asyncio.TaskGroup
    settings: Settings


@asynccontextmanager
async def owning(
    settings: Settings,
    storage: Storage,
    certificates: Certificates | None,
    tls: ssl.SSLContext | None,
    stop: asyncio.Event,
    strangers: Strangers | None = None,
    holds: Callable[[], bool] = lambda: True,
    nodes: Callable[[], NodesFacts | None] = lambda: None,
    files: Beforehand | None = None,
) -> AsyncIterator[Owning]:
    """Reads the log, connects the MQTT server and runs both. At the end everything staged is durable.

    `holds`: whether this process may hand over now. `nodes`: what is known of the other brokers.

    Raises:
        BadSetting: an address cannot be listened on, or `ordain replay` made the log.
        BadType: a file of device types is wrong.
        ExceptionGroup (of Broken): the storage failed while serving.
    """
    types, verify, pepper = files or beforehand(settings)
    outbound = HttpOutbound(settings.webhook_allow, verify=verify, limits=settings.limits)
    sending = WhileHolding(outbound, holds)
    core = Core(storage, SystemClock(), SystemEntropy(), types, settings, sending, pepper)
    core.holds = holds
    embedded = not settings.mqtt_url and settings.mqtt_server == "embedded"
    await core.open(embedded=embedded)
    await refuse_replay(core)
    await remember_prefix(core)
    async with core.running("embedded" if embedded else "external") as group:
        async with mqtt_door(settings, core, types, stop, certificates, tls) as door:
            if not settings.mqtt_url:
                settings = msgspec.structs.replace(settings, mqtt_listen=door.devices_url)
            parts = services(core, settings, door.rules, strangers, nodes)
            if settings.require_mqtt_acl:
                core.also_not_ready = lambda: untrusted(door.rules)
            if door.listener is None:
                parts.metrics.watch_rules(door.rules)
            parts.metrics.watch_lookups(lambda: outbound.lookups.under_way, lambda: outbound.lookups.refused)
            if door.listener is not None:
                parts.metrics.watch_listener(figures(door.listener), door.listener.refusals)
            yield Owning(core, parts, door, group, settings)
    await outbound.aclose()


def _of_webhooks(settings: Settings) -> ssl.SSLContext | None:
    """Whose certificates webhook receivers must have, and the broker's own certificate for them. None: those
    of the system's authorities, and none."""
    files = settings.webhook_ca, settings.webhook_certificate, settings.webhook_key
    if not any(files):
        return None
    try:
        return trust(*files)
    except OSError as error:  # of files, and of what is in them
        names = ", ".join(filter(None, files))
        raise BadSetting(f"webhook_ca, webhook_certificate: {names}: {error.strerror or error}") from error


def trusted(settings: Settings) -> ssl.SSLContext | None:
    """How the link to an external MQTT server is secured; None: without TLS."""
    if not settings.mqtt_url or not parse_url(settings.mqtt_url).tls:
        return None
    key = "mqtt_ca"
    try:
        trust(settings.mqtt_ca)
        key = "mqtt_certificate"
        return trust(settings.mqtt_ca, settings.mqtt_certificate, settings.mqtt_key)
    except OSError as error:  # of files, and of what is in them
        raise BadSetting(f"{key} = {getattr(settings, key)!r}: {error.strerror or error}") from error
