"""Gateways: devices that speak for others over their own MQTT connection, such as Zigbee2MQTT.

Which devices belong to which gateway is in memory only: it is a function of the registered devices. A gateway
has no gateway itself. Presence: without its gateway a device is offline; when the gateway is back, it is
unknown until the device is heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import structlog
from msgspec import UNSET

from broker.domain.errors import Refusal, invalid
from broker.domain.events import Changed
from broker.domain.explain import Speaker
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Presence
from broker.engine.live import Live
from broker.seams import UNREADABLE, Storage
from devices.types import DeviceType

logger = structlog.get_logger()

NOT_ONE = "must be a gateway of the same project: a device whose type says `gateway = true`"


class Gateways:
    """`most`: devices of one gateway. `direct`: the MQTT server is Ordain's own, which tells the presence of
    each device itself.

    `regrouped(gateway)` is called when a gateway speaks for other devices than before, or for other topics.
    `heard(device, presence, session)` and `presence(device_id, presence)`: see `Registry`.
    `newest(name)`: see `Told`.
    """

    def __init__(
        self,
        live: Live,
        types: Mapping[str, DeviceType],
        most: int,
        heard: Callable[[DeviceState, Presence, str | None], None],
        newest: Callable[[str], DeviceState | None],
    ) -> None:
        self.direct = False
        self.regrouped: Callable[[DeviceState], None] = lambda gateway: None
        self.presence: Callable[[str, Presence], None] = lambda device_id, presence: None
        self._live = live
        self._types = types
        self._most = most
        self._heard = heard
        self._newest = newest
        self._children: dict[str, dict[str, str]] = {}  # of each gateway: hardware ids with device ids
        self._of: dict[str, str] = {}  # device id -> hardware id of its gateway
        self._untold = deque[tuple[str, Callable[[DeviceState], None]]]()

    def load(self, devices: Iterable[DeviceState]) -> None:
        self._children.clear()
        self._of.clear()
        for device in devices:
            self.put(device)

    def put(self, device: DeviceState) -> None:
        """Takes in a device as it is now."""
        old = self._of.pop(device.id, None)
        if old is not None:
            del self._children[old][device.hardware_id]
            if not self._children[old]:
                del self._children[old]
        if device.gateway is not None and device.deleted_at is None:
            self._of[device.id] = device.gateway
            self._children.setdefault(device.gateway, {})[device.hardware_id] = device.id

    def children(self, hardware_id: str) -> Mapping[str, str]:
        """The devices of a gateway: hardware ids with device ids."""
        return self._children.get(hardware_id, {})

    def others(self, device_id: str) -> Iterable[str]:
        """The ids of the devices of a gateway, by the gateway's id."""
        gateway = self._live.device(device_id)
        return () if gateway is None else self.children(gateway.hardware_id).values()

    def states(self, hardware_id: str) -> list[DeviceState]:
        """The devices of a gateway, as far as they are in memory."""
        found = (self._live.device(each) for each in self.children(hardware_id))
        return [device for device in found if device is not None]

    def is_gateway(self, type_name: str) -> bool:
        kind = self._types.get(type_name)
        return kind is not None and kind.gateway

    def named(self, name: str | None) -> str | None:
        """The hardware id of a gateway by its id or hardware id, if it is in memory."""
        gateway = None if name is None else self._live.device(name)
        return name if gateway is None else gateway.hardware_id

    def wanted(
        self, name: str | None, sees: Callable[[DeviceState], bool], own_type: str, project: str
    ) -> str | None:
        """The hardware id of the gateway that a device of this type and project shall have. `name`: its id or
        hardware id. `sees`: whether the caller may see a device.

        Raises:
            Refusal: invalid_request, or conflict if the gateway has as many devices as it may.
        """
        if name is None:
            return None
        gateway = self._live.device(name)
        if gateway is None or gateway.deleted_at is not None or not sees(gateway):
            raise invalid("gateway", NOT_ONE, name)
        if gateway.project != project or not self.is_gateway(gateway.device_type):
            raise invalid("gateway", NOT_ONE, name)
        if self.is_gateway(own_type):
            raise invalid("gateway", "a gateway cannot have a gateway itself", name)
        if len(self.children(gateway.hardware_id)) >= self._most:
            raise Refusal("conflict", f"the gateway {name} has {self._most} devices already")
        return gateway.hardware_id

    def after(self, device: DeviceState, change: Changed, sees: Callable[[DeviceState], bool]) -> str | None:
        """The hardware id of the device's gateway after a change.

        Raises:
            Refusal: see `wanted`; also conflict, if the device has devices itself and would be no gateway.
        """
        own_type = device.device_type if change.device_type is UNSET else change.device_type
        if not self.is_gateway(own_type):
            self.check_free(device, "changing its type")
        name = device.gateway if change.gateway is UNSET else change.gateway
        same = None if name is None else self._live.device(name)
        if name is None or name == device.gateway or (same and same.hardware_id == device.gateway):
            if device.gateway is not None and name is not None and self.is_gateway(own_type):
                raise invalid("type", "a device that has a gateway cannot be one itself", own_type)
            return None if name is None else device.gateway
        return self.wanted(name, sees, own_type, device.project)

    def check_free(self, device: DeviceState, what: str) -> None:
        """Checks that nothing depends on a gateway which will not be one any more.

        Raises:
            Refusal: conflict.
        """
        if count := len(self.children(device.hardware_id)):
            raise Refusal(
                "conflict",
                f"{device.hardware_id} is the gateway of {count} devices: move them before {what}",
                {"devices": count},
            )

    async def tell(self, storage: Storage, name: str, change: Callable[[DeviceState], None]) -> None:
        """Tells the MQTT server of a durable change of a device. Calls `change` with its newest state when it
        and those that it speaks for are in memory; if they cannot be read now, `tell_rest` does it later."""
        self._untold.append((name, change))
        await self.tell_rest(storage)

    async def regroup(self, storage: Storage, *names: str | None) -> None:
        """Tells the MQTT server that these gateways have other topics now. The first one loses them."""
        for name in dict.fromkeys(each for each in names if each is not None):
            await self.tell(storage, name, self._regroup)

    def _regroup(self, gateway: DeviceState) -> None:
        if gateway.deleted_at is None:
            self.regrouped(gateway)

    async def tell_rest(self, storage: Storage) -> None:
        """Tells the changes that were not told yet, in order."""
        while self._untold:
            first = name, change = self._untold[0]
            try:
                await self._live.bring(storage, [name, *self.children(name)])
            except UNREADABLE as error:
                logger.warning("mqtt.not_told", device=name, why=str(error))
                return
            if self._untold and self._untold[0] is first:  # else another request has told it
                self._untold.popleft()
                if (device := self._live.device(name)) is not None:
                    change(device)

    # --- presence ---

    def follow(
        self, gateway: DeviceState, before: Presence | None, presence: Presence, *, renewed: bool
    ) -> None:
        """What a gateway's presence says of its devices. `before`: what was known; None: nothing since the
        start, and the log says what was then. `renewed`: it was away unnoticed."""
        offline = gateway.heard and not gateway.online
        was_away = offline if before in (None, Presence.NEVER) else before is Presence.OFFLINE
        back = renewed or (was_away and presence is not Presence.OFFLINE)
        for name, device_id in self.children(gateway.hardware_id).items() if not self.direct else ():
            known = self._live.presence.get(device_id, Presence.NEVER)
            if presence is Presence.OFFLINE or (back and presence is known is Presence.ONLINE):
                self._away(name, device_id)
            if presence is Presence.UNKNOWN and known is Presence.ONLINE:
                self.presence(device_id, Presence.UNKNOWN)
            known = self._live.presence.get(device_id, Presence.NEVER)
            if back and known in (Presence.OFFLINE, Presence.NEVER):
                self._unsure(name, device_id)

    def moved(self, device: DeviceState) -> None:
        """The device has another gateway now, or none: what was known of its presence is void."""
        if self.direct:
            return
        known, away = self._live.presence.get(device.id, Presence.NEVER), self.away(device)
        if away or known is not Presence.NEVER:
            self._away(device.hardware_id, device.id)
        if known is not Presence.NEVER and not away:
            self._unsure(device.hardware_id, device.id)

    def away(self, device: DeviceState) -> bool:
        """Whether the device's gateway is offline."""
        gateway = None if device.gateway is None else self._live.device(device.gateway)
        return gateway is not None and self._live.presence.get(gateway.id) is Presence.OFFLINE

    def _away(self, name: str, device_id: str) -> None:
        device = self._newest(name)
        if device is None:
            self.presence(device_id, Presence.OFFLINE)
        else:
            self._heard(device, Presence.OFFLINE, device.session)

    def _unsure(self, name: str, device_id: str) -> None:
        device = self._live.device(name)
        heard = device is None or device.heard
        self.presence(device_id, Presence.UNKNOWN if heard else Presence.NEVER)


async def speaker_of(device: DeviceState, live: Live, storage: Storage) -> Speaker | None:
    """The gateway of a device. One that was heard before is offline, even if the live state says `never`."""
    if device.gateway is None:
        return None
    await live.bring(storage, [device.gateway])
    if (gateway := live.device(device.gateway)) is None:
        return None
    presence = live.presence.get(gateway.id, Presence.NEVER)
    if presence is Presence.NEVER and gateway.heard:
        presence = Presence.OFFLINE
    return Speaker(gateway.hardware_id, presence)
