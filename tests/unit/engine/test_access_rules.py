"""The ACL file of a Mosquitto follows from the device types and the registered devices."""

from __future__ import annotations

from broker.domain.fleet import DeviceState
from broker.engine.speech.access_rules import whole_file
from devices.types import shipped_types


def device(hardware_id: str, kind: str, name: str | None = None, gateway: str | None = None) -> DeviceState:
    return DeviceState(
        id=f"dev_{hardware_id}",
        project="acme",
        hardware_id=hardware_id,
        device_type=kind,
        token_digest="",
        version=1,
        created_at=0,
        updated_at=0,
        name=name,
        gateway=gateway,
    )


def test_each_bought_device_gets_its_own_topics_and_others_share_patterns() -> None:
    devices = [device("door", "generic", "Front door"), device("0x01", "zigbee2mqtt", "kitchen lamp")]

    lines = whole_file("site", shipped_types(), devices, "ordain")

    assert lines[:2] == ["user ordain", "topic readwrite site/#"]
    assert {"topic read +/online", "topic write zigbee2mqtt/+/set", "pattern write site/dev/%u/ack"} <= set(
        lines
    )
    assert lines[lines.index("user 0x01") :] == [
        "user 0x01",
        "topic read zigbee2mqtt/kitchen lamp/get",
        "topic read zigbee2mqtt/kitchen lamp/set",
        "topic write zigbee2mqtt/kitchen lamp",
        "topic write zigbee2mqtt/kitchen lamp/#",
        "topic write zigbee2mqtt/kitchen lamp/availability",
    ]
    assert not any("Front door" in line for line in lines)


def test_a_gateway_has_the_topics_of_its_devices_which_have_no_rules_of_their_own() -> None:
    devices = [
        device("gw", "gateway"),
        device("door", "iotee_device", gateway="gw"),
        device("lamp", "home_assistant_switch", gateway="gw"),
        device("other", "gateway"),
    ]

    lines = whole_file("site", shipped_types(), devices, "ordain")

    assert lines[lines.index("user gw") :] == [
        "user gw",
        "topic read homeassistant/switch/lamp/set",
        "topic read site/dev/door/rbt",
        "topic read site/dev/door/rls",
        "topic write homeassistant/switch/lamp/availability",
        "topic write homeassistant/switch/lamp/config",
        "topic write homeassistant/switch/lamp/state",
        "topic write site/dev/door/ack",
        "topic write site/dev/door/status",
    ]


def test_the_topics_of_a_device_may_have_the_name_of_its_gateway() -> None:
    devices = [
        device("garage", "esphome_node"),
        device("door", "esphome_node_switch", "relay", gateway="garage"),
        device("shed", "esphome_switch", "relay"),
        device("attic", "esphome_switch", "fan", gateway="garage"),  # a node of its own
    ]

    lines = whole_file("site", shipped_types(), devices, "ordain")

    assert "topic write +/switch/+/command" in lines
    of_node = lines[lines.index("user garage") : lines.index("user shed")]
    assert {"topic read garage/switch/relay/command", "topic write garage/switch/relay/state"} <= set(of_node)
    assert "topic read attic/switch/fan/command" in of_node
    assert {"topic read shed/switch/relay/command", "topic write shed/status"} <= set(
        lines[lines.index("user shed") :]
    )
