"""Announces locks and switches to Home Assistant by its MQTT discovery, on an external MQTT server.

Each device of a type with the commands of a lock or a switch has one retained configuration. It makes a
binary sensor whose state is read from the device's command events. It must never give Home Assistant a topic
on which a device takes commands: such commands would not be in the log.

Source: home-assistant.io/integrations/mqtt and /integrations/binary_sensor.mqtt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import structlog

from broker import __version__
from broker.domain.cloudevents import Wanted
from broker.domain.errors import Unavailable
from broker.domain.fleet import DeviceState
from broker.engine.writer import Writer
from broker.seams import Link, Outgoing, Put, Receipt, Sql
from broker.subscriptions.feed import Feed
from devices.types import DeviceType
from projections import devices as devices_view

logger = structlog.get_logger()

CHECKPOINT = "home_assistant"
AGAIN_SEC = 1.0
SAVE_SEC = 1.0
EVERY = 1_000_000_000
REFUSED = 0x80
CHANGES = frozenset({"registered", "changed", "deleted"})
UNKNOWN = "None"  # Home Assistant: the state is not known


class Kind(NamedTuple):
    """A kind of device: the command that turns its sensor on, and the one that turns it off."""

    device_class: str
    on: str
    off: str


# In Home Assistant the sensor of a lock is on while it is unlocked.
KINDS = (Kind("lock", "unlock", "lock"), Kind("power", "turn_on", "turn_off"))


def kind_of(device_type: DeviceType | None) -> Kind | None:
    commands = () if device_type is None else device_type.commands
    return next((kind for kind in KINDS if kind.on in commands and kind.off in commands), None)


def topic_of(discovery: str, device_id: str) -> str:
    return f"{discovery}/binary_sensor/ordain/{device_id}/config"


def config(prefix: str, device: DeviceState, kind: Kind, title: str) -> dict[str, Any]:
    """The discovery configuration of a device. An event that says nothing of the state renders as nothing,
    which Home Assistant ignores."""
    name = device.name or device.hardware_id
    state = (
        f"{{% if value_json.data.type in ['{kind.on}', '{kind.off}'] %}}"
        "{% if value_json.type == 'ordain.command.executed.v1' %}"
        f"{{{{ 'ON' if value_json.data.type == '{kind.on}' else 'OFF' }}}}"
        "{% elif value_json.type == 'ordain.command.timed_out.v1' %}"
        f"{UNKNOWN}{{% endif %}}{{% endif %}}"
    )
    return {
        "unique_id": f"ordain_{device.id}",
        "name": None,  # that of the device
        "device_class": kind.device_class,
        "state_topic": f"{prefix}/evt/{device.hardware_id}/+",
        "value_template": state,
        "payload_on": "ON",
        "payload_off": "OFF",
        "qos": 1,
        "device": {"identifiers": [f"ordain_{device.id}"], "name": name, "model": title},
        "origin": {"name": "Ordain", "sw_version": __version__},
    }


class HomeAssistant:
    """`discovery`: the discovery prefix of Home Assistant, empty if nothing is announced."""

    def __init__(
        self, writer: Writer, feed: Feed, types: Mapping[str, DeviceType], prefix: str, discovery: str
    ) -> None:
        self.link: Link
        self._writer = writer
        self._feed = feed
        self._types = types
        self._prefix = prefix
        self._discovery = discovery

    async def run(self) -> None:
        """Announces all devices, then follows the log; for ever. What changed while the broker was away is
        read from the log, after the checkpoint of the last run."""
        checkpoint = await self._writer.storage.read(self._saved)
        announced = False
        while True:
            if self.link.up:
                checkpoint = self._feed.head if checkpoint is None else checkpoint
                if announced or (announced := await self._announce_all()):
                    self._save(checkpoint)
                    checkpoint = await self._follow(checkpoint)
            await asyncio.sleep(AGAIN_SEC)

    async def _saved(self, sql: Sql) -> int | None:
        row = await sql.one("SELECT value FROM meta WHERE key = ?", (CHECKPOINT,))
        return None if row is None else min(int(row[0]), self._feed.head)

    async def _announce_all(self) -> bool:
        devices = await self._writer.storage.read(lambda sql: devices_view.newest(sql, None, None, EVERY))
        for device in devices:
            if kind_of(self._types.get(device.device_type)) is not None and not await self._tell(device):
                return False
        return True

    async def _follow(self, after: int) -> int:
        """Announces changes until the link fails; returns up to which position."""
        with self._feed.subscribed(Wanted(), after) as subscription:
            while self.link.up:
                found = await subscription.next(SAVE_SEC) or ()
                changed = {each.device_id for each in found if each.type in CHANGES}
                for device in await self._read(sorted(changed)):
                    if not await self._tell(device):
                        return after
                after = subscription.reached
                if changed:
                    self._save(after)
        return after

    async def _read(self, ids: list[str]) -> list[DeviceState]:
        if not ids:
            return []
        found = await self._writer.storage.read(lambda sql: devices_view.by_name(sql, ids))
        return list(found.values())

    def _save(self, position: int) -> None:
        try:
            self._writer.also(Put("meta", (CHECKPOINT, str(position))))
        except Unavailable:
            return  # the next change saves it

    async def _tell(self, device: DeviceState) -> bool:
        """Publishes a device's configuration; an empty one removes it. Returns whether the server took it."""
        kind = kind_of(self._types.get(device.device_type))
        payload = b""
        if kind is not None and device.deleted_at is None:
            title = self._types[device.device_type].title or device.device_type
            payload = msgspec.json.encode(config(self._prefix, device, kind, title))
        taken: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        message = Outgoing(topic=topic_of(self._discovery, device.id), payload=payload, retain=True)
        if not self.link.publish(message, taken.set_result):
            return False
        reason = (await taken).reason
        if reason is not None and reason >= REFUSED:
            logger.warning("home_assistant.refused", topic=message.topic, reason=f"0x{reason:02x}")
            return True  # a retry would be refused again
        return reason is not None
