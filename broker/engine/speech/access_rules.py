"""The access rules of a Mosquitto, as lines of its ACL file: what follows from the topics of the device
types.

Format: mosquitto.conf(5). Devices in Ordain's own layout share patterns with `%u`, their user name. A device
whose type has topics of its own has rules of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from broker.domain.fleet import DeviceState
from broker.engine.live import Live
from broker.engine.speech.addresses import Addresses
from devices.speech.topics import filter_of
from devices.types import DeviceType

STATUS = "status"


def command_suffixes(types: Mapping[str, DeviceType]) -> frozenset[str]:
    return frozenset[str]().union(*(kind.command_suffixes for kind in types.values()))


def answer_suffixes(types: Mapping[str, DeviceType]) -> set[str]:
    return {kind.answer_suffix for kind in types.values()} | {STATUS}


def common(prefix: str, types: Mapping[str, DeviceType], broker_user: str) -> list[str]:
    """The rules of the broker, and of devices in Ordain's own layout."""
    lines = [f"user {broker_user}", f"topic readwrite {prefix}/#"]
    bought = [kind for kind in types.values() if kind.speeches]
    lines += sorted({f"topic read {filter_of(each, prefix)}" for kind in bought for each in kind.says})
    lines += sorted({f"topic write {filter_of(each, prefix)}" for kind in bought for each in kind.listens})
    lines += [f"pattern read {prefix}/dev/%u/{suffix}" for suffix in sorted(command_suffixes(types))]
    return lines + [f"pattern write {prefix}/dev/%u/{suffix}" for suffix in sorted(answer_suffixes(types))]


def topics_of(addresses: Addresses, device: DeviceState) -> tuple[set[str], set[str]]:
    """The topics that a device receives, and those on which it publishes."""
    if addresses.speaks(device):
        reach = addresses.reach(device)
        return {*reach.hears}, {*reach.says, *reach.others, reach.will}
    own = f"{addresses.prefix}/dev/{device.hardware_id}/"
    suffixes = command_suffixes(addresses.types), answer_suffixes(addresses.types)
    hears, says = ({own + suffix for suffix in each} for each in suffixes)
    return hears, says


def of_device(addresses: Addresses, device: DeviceState, children: Iterable[DeviceState] = ()) -> list[str]:
    """The rules of one device whose type has topics of its own, and of a gateway with its devices; none for
    others."""
    speaking = [*([device] if addresses.speaks(device) else []), *children]
    if not speaking or device.gateway is not None:
        return []
    both = [topics_of(addresses, each) for each in speaking]
    hears, says = (set[str]().union(*found) for found in zip(*both, strict=True))
    lines = [f"user {device.hardware_id}"]
    lines += [f"topic read {topic}" for topic in sorted(hears)]
    return lines + [f"topic write {topic}" for topic in sorted(says)]


def whole_file(
    prefix: str, types: dict[str, DeviceType], devices: Iterable[DeviceState], broker_user: str
) -> list[str]:
    """The rules of the broker, of programs that read events, and of all devices."""
    addresses, known = Addresses(types, prefix, Live()), list(devices)
    children: dict[str, list[DeviceState]] = {}
    for device in known:
        if device.gateway is not None:
            children.setdefault(device.gateway, []).append(device)
    lines = [*common(prefix, types, broker_user), "user service", f"topic read {prefix}/evt/#"]
    own = (of_device(addresses, each, children.get(each.hardware_id, ())) for each in known)
    return lines + [line for lines_of_one in own for line in lines_of_one]
