"""The state of a device: the fold of the events in its stream; and sets of devices. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.domain.events import (
    Changed,
    Deleted,
    Offline,
    Online,
    Pending,
    Registered,
    Reported,
    TokenRotated,
)


class DeviceSet(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The devices that an API key is limited to: those with one of these names (id or hardware id), and those
    whose hardware id begins with a prefix. They need not be registered yet."""

    names: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()

    def covers(self, device_id: str, hardware_id: str) -> bool:
        return device_id in self.names or hardware_id in self.names or hardware_id.startswith(self.prefixes)


class DeviceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Times in ms. `online`: from the last presence event; not valid once a later `started` is in the log.

    `seen_at`: time of that event. `reported`: the last known state, from `reported_at`. `answer_key`: the
    Ed25519 key (base64url) that it signs its answers with. `gateway`: the hardware id of the gateway that
    speaks for it.
    """

    id: str
    project: str
    hardware_id: str
    device_type: str
    token_digest: str
    version: int
    created_at: int
    updated_at: int
    name: str | None = None
    attributes: dict[str, Any] = {}
    online: bool = False
    heard: bool = False
    seen_at: int | None = None
    session: str | None = None
    deleted_at: int | None = None
    reported: dict[str, Any] | None = None
    reported_at: int | None = None
    answer_key: str | None = None
    gateway: str | None = None


class News(msgspec.Struct, frozen=True, kw_only=True):
    """The newest presence, attributes and state that a device reported and that are not recorded yet.
    `actor`: who sent the attributes."""

    presence: Online | Offline | None = None
    attributes: dict[str, Any] | None = None
    actor: str = ""
    state: dict[str, Any] | None = None

    def then(self, newer: News) -> News:
        """Combines two reports. If both have a value, the newer one counts."""
        presence = newer.presence or self.presence
        state = self.state if newer.state is None else newer.state
        if newer.attributes is None:
            return msgspec.structs.replace(self, presence=presence, state=state)
        return News(presence=presence, attributes=newer.attributes, actor=newer.actor, state=state)

    def applied(self, device: DeviceState) -> DeviceState:
        """The device as it will be after this is recorded. Its version and times do not change."""
        if self.presence is not None:
            online = isinstance(self.presence, Online)
            device = msgspec.structs.replace(device, online=online, session=self.presence.session)
        if self.attributes is not None:
            device = msgspec.structs.replace(device, attributes=self.attributes)
        return device if self.state is None else msgspec.structs.replace(device, reported=self.state)

    def events(self, device: DeviceState) -> list[tuple[Online | Offline | Changed | Reported, str]]:
        """The events that record this, each with its actor. Values that are already recorded: no event."""
        found: list[tuple[Online | Offline | Changed | Reported, str]] = []
        if self.presence is not None and changes_presence(device, self.presence):
            found.append((self.presence, f"device:{device.id}"))
        if self.attributes is not None and not same_attributes(self.attributes, device.attributes):
            found.append((Changed(attributes=self.attributes), self.actor))
        if self.state is not None and not same_attributes(self.state, device.reported or {}):
            found.append((Reported(state=self.state), f"device:{device.id}"))
        return found


def changes_presence(device: DeviceState, event: Online | Offline) -> bool:
    """An `offline` while the device is offline changes nothing, nor an `online` of the same session."""
    if isinstance(event, Offline):
        return device.online
    return not device.online or event.session != device.session


def same_attributes(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compares them as JSON: in Python 1, 1.0 and True are equal."""
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")


def spend(used_until: int, now: int, per_sec: int, burst: int) -> int | None:
    """Takes one event from a rate of `per_sec` with a burst (generic cell rate algorithm, ITU-T I.371).

    `used_until`: the time (ms) until which the rate is used up. Returns its new value; None if the rate does
    not allow an event at `now` (ms).
    """
    gap = -(-1_000 // per_sec)
    until = max(used_until, now) + gap
    return None if until - now > burst * gap else until


def evolve_device(state: DeviceState | None, pending: Pending) -> DeviceState:
    """The state of the device after one more event.

    Raises:
        ValueError: the first event is not `registered`, or the event is not a device event.
    """
    event, at = pending.event, pending.decided_at
    if isinstance(event, Registered):
        return DeviceState(
            id=pending.device_id or "",
            project=pending.project,
            hardware_id=event.hardware_id,
            device_type=event.device_type,
            token_digest=event.token_digest,
            version=pending.version,
            created_at=at,
            updated_at=at,
            name=event.name,
            attributes=event.attributes,
            answer_key=event.answer_key,
            gateway=event.gateway,
        )
    if state is None:
        raise ValueError(f"{pending.type} cannot be the first event of {pending.stream}")
    changes: dict[str, object] = {"version": pending.version, "updated_at": at}
    match event:
        case Changed():
            for field in ("device_type", "name", "attributes", "answer_key", "gateway"):
                if (value := getattr(event, field)) is not msgspec.UNSET:
                    changes[field] = value
        case TokenRotated():
            changes["token_digest"] = event.token_digest
        case Online() | Offline():
            online = isinstance(event, Online)
            changes |= {"online": online, "heard": True, "seen_at": at, "session": event.session}
        case Reported():
            changes |= {"reported": event.state, "reported_at": at}
        case Deleted():
            changes |= {"deleted_at": at, "online": False}
        case _:
            raise ValueError(f"{pending.type} is not an event of a device")
    return msgspec.structs.replace(state, **changes)
