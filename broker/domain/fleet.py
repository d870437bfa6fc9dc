"""The state of a device: the fold of the events in its stream; and sets of devices. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.domain.events import Changed, Deleted, Offline, Online, Recorded, Registered, TokenRotated


class DeviceSet(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The devices that an API key is limited to: those with one of these names (id or hardware id), and those
    whose hardware id begins with a prefix. They need not be registered yet."""

    names: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()

    def covers(self, device_id: str, hardware_id: str) -> bool:
        return device_id in self.names or hardware_id in self.names or hardware_id.startswith(self.prefixes)


class DeviceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Times in ms. `online`: from the last presence event; not valid once a later `started` is in the log.

    `seen_at`: time of that event. `position`: position of `registered`. `last_position`: position of the
    last folded event.
    """

    id: str
    project: str
    hardware_id: str
    device_type: str
    token_digest: str
    version: int
    position: int
    created_at: int
    updated_at: int
    name: str | None = None
    attributes: dict[str, Any] = {}
    online: bool = False
    heard: bool = False
    seen_at: int | None = None
    session: str | None = None
    deleted_at: int | None = None
    last_position: int = 0


def evolve_device(state: DeviceState | None, recorded: Recorded) -> DeviceState:
    """The state of the device after one more event.

    Raises:
        ValueError: the first event is not `registered`, or the event is not a device event.
    """
    event, at = recorded.event, recorded.recorded_at
    if isinstance(event, Registered):
        return DeviceState(
            id=recorded.device_id or "",
            project=recorded.project,
            hardware_id=event.hardware_id,
            device_type=event.device_type,
            token_digest=event.token_digest,
            version=recorded.version,
            position=recorded.position,
            created_at=at,
            updated_at=at,
            name=event.name,
            attributes=event.attributes,
            last_position=recorded.position,
        )
    if state is None:
        raise ValueError(f"{recorded.type} cannot be the first event of {recorded.stream}")
    changes: dict[str, object] = {
        "version": recorded.version,
        "updated_at": at,
        "last_position": recorded.position,
    }
    match event:
        case Changed():
            for field in ("device_type", "name", "attributes"):
                if (value := getattr(event, field)) is not msgspec.UNSET:
                    changes[field] = value
        case TokenRotated():
            changes["token_digest"] = event.token_digest
        case Online() | Offline():
            online = isinstance(event, Online)
            changes |= {"online": online, "heard": True, "seen_at": at, "session": event.session}
        case Deleted():
            changes |= {"deleted_at": at, "online": False}
        case _:
            raise ValueError(f"{recorded.type} is not an event of a device")
    return msgspec.structs.replace(state, **changes)
