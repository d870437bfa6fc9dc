"""No device can be registered so that it may publish on a topic that another device has."""

from __future__ import annotations

from itertools import product

import pytest

from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceState
from broker.engine.live import Live
from broker.engine.speech.addresses import Addresses, names_of
from devices.speech.topics import HARDWARE_ID, NAME, with_prefix
from devices.types import DeviceType, shipped_types
from tests.unit.engine.test_access_rules import device

PREFIX = "iotee"
TYPES = shipped_types()


def allowed(*devices: DeviceState) -> bool:
    """Whether these devices can be registered, one after the other."""
    live = Live()
    addresses = Addresses(dict(TYPES), PREFIX, live)
    for each in devices:
        try:
            addresses.check(TYPES[each.device_type], names_of(each), each.id)
        except Refusal:
            return False
        live.devices.put(each.id, each)
        live.names.put(each.hardware_id, each.id)
        live.names.put(each.id, each.id)
        addresses.put(each)
    return True


def pair(wide: str, topic: str, one: str, other: str) -> tuple[DeviceState, DeviceState] | None:
    """Two devices, of which the first may publish on a topic of the second, if there can be such."""
    levels = with_prefix(wide, PREFIX).removesuffix("/#").split("/")
    named: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for left, right in zip(levels, with_prefix(topic, PREFIX).split("/"), strict=False):
        if left != right and "{" not in left + right:
            return None
        value = next((each for each in (left, right) if "{" not in each), "same")
        for level, known in ((left, named[0]), (right, named[1])):
            known[HARDWARE_ID if level == "{gateway}" else level] = value
    if len(levels) > topic.count("/") + 1:
        return None
    first = device(named[0].get(HARDWARE_ID, "first"), one, named[0].get(NAME))
    second = device(named[1].get(HARDWARE_ID, "second"), other, named[1].get(NAME))
    return None if first.hardware_id == second.hardware_id else (first, second)


def patterns(kind: DeviceType) -> list[str]:
    return [*kind.says, *kind.listens]


def test_no_shipped_type_may_publish_on_a_topic_of_another_device() -> None:
    tried = 0
    for one, other in product(TYPES.values(), TYPES.values()):
        for wide, topic in product(one.other_topics, patterns(other)):
            found = pair(wide, topic, one.name, other.name)
            if found is not None:
                tried += 1
                assert not allowed(*found), (wide, topic, found)
                assert not allowed(*reversed(found)), (wide, topic, found)
    assert tried > 20


@pytest.mark.parametrize("name", ["switch", "status", "online", "bridge"])
def test_a_name_is_free_while_nobody_has_its_topics(name: str) -> None:
    assert allowed(device("lamp", "zigbee2mqtt", name), device("door", "esphome_switch", name))


def test_a_gateway_may_publish_for_its_own_devices() -> None:
    node, door = device("garage", "esphome_node"), device("door", "esphome_node_switch", "relay", "garage")
    assert allowed(node, door)
    assert not allowed(node, door, device("again", "esphome_node_switch", "relay", "garage"))
    assert not allowed(device("zigbee2mqtt", "zigbee2mqtt_bridge"), device("thief", "zigbee2mqtt", "bridge"))
