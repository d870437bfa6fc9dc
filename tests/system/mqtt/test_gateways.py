"""A gateway over a real broker: one connection, its own devices' topics, and nobody else's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.system.conftest import NewBroker
from tests.system.mqtt.test_bought_devices import Connected, order
from tests.system.support import WITHIN_SEC, Broker, until

BRIDGE, OTHER, NODE = "zigbee2mqtt", "gw-2", "garage"


def zigbee(topic: str, payload: bytes) -> list[tuple[str, str]]:
    """Zigbee2MQTT 2.1: it answers requests, and reports the new state of a device that was set."""
    said = json.loads(payload)
    name, _, what = topic.removeprefix(f"{BRIDGE}/").partition("/")
    if name == "bridge":
        asked = what.removeprefix("request/")
        answer = {"data": {"time": said["time"]}, "status": "ok", "transaction": said["transaction"]}
        return [(f"{BRIDGE}/bridge/response/{asked}", json.dumps(answer))]
    return [(f"{BRIDGE}/{name}", json.dumps({"state": "ON", "linkquality": 120} | said))]


def esphome(topic: str, payload: bytes) -> list[tuple[str, str]]:
    """ESPHome 2024.4: a switch reports the state that it was given; the node says who it is."""
    if topic == f"esphome/ping/{NODE}":
        return [(f"esphome/discover/{NODE}", '{"ip":"192.168.0.122","name":"garage","version":"2024.4.1"}')]
    return [(topic.replace("/command", "/state"), payload.decode())]


@pytest.fixture(params=["listener", "child"])
def served(request: pytest.FixtureRequest, new_broker: NewBroker) -> Broker:
    if request.param == "listener":
        return new_broker().start()
    broker = new_broker("--mqtt-server", "mosquitto").start()
    broker.mqtt_port = int(broker.run.err.wait("event=mosquitto.up").split("port=")[1].split()[0])
    return broker


def register(broker: Broker, hardware_id: str, type: str, **more: Any) -> dict[str, Any]:
    made = broker.http("POST", "/v1/devices", {"hardware_id": hardware_id, "type": type, **more})
    assert made.status_code == 201, made.json()
    return dict(made.json())


def presence(broker: Broker, device: str) -> str:
    return str(broker.http("GET", f"/v1/devices/{device}").json()["presence"])


def state(broker: Broker, device: str) -> Any:
    return broker.http("GET", f"/v1/devices/{device}/state").json()["state"]


def test_one_connection_speaks_for_the_devices_of_a_gateway_and_for_no_others(served: Broker) -> None:
    token = register(served, BRIDGE, "zigbee2mqtt_bridge")["device_token"]
    register(served, OTHER, "gateway")
    lamp = register(served, "lamp", "zigbee2mqtt", gateway=BRIDGE)
    assert lamp["gateway"] == BRIDGE
    register(served, "foreign", "zigbee2mqtt", gateway=OTHER)
    bridge = Connected(
        served.mqtt_port, BRIDGE, token, [f"{BRIDGE}/#"], zigbee, (f"{BRIDGE}/bridge/state", "offline")
    )
    assert bridge.ready.wait(WITHIN_SEC)
    assert bridge.codes == [0]
    bridge.say(f"{BRIDGE}/bridge/state", '{"state":"online"}', retain=True)

    done = order(served, "lamp", "turn_on")
    assert (done["state"], done["result"]["linkquality"]) == ("executed", 120), done
    joined = order(served, BRIDGE, "permit_join", time=60)
    assert (joined["state"], joined["result"]) == ("executed", {"time": 60}), joined

    bridge.say(f"{BRIDGE}/foreign", '{"state":"ON"}')
    bridge.say(f"{BRIDGE}/lamp", '{"state":"OFF"}')
    until(lambda: (state(served, "lamp") or {}).get("state") == "OFF" or None)
    assert state(served, "foreign") is None
    assert not any("foreign" in each.topic for each in bridge.heard)

    refused = served.http("DELETE", f"/v1/devices/{BRIDGE}?force=true")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    bridge.say(f"{BRIDGE}/bridge/state", '{"state":"offline"}', retain=True)
    bridge.end()
    until(lambda: presence(served, "lamp") == "offline" or None)


def test_two_switches_of_one_node_have_the_topics_of_their_node(served: Broker) -> None:
    token = register(served, NODE, "esphome_node")["device_token"]
    register(served, "shed", "esphome_node")
    for hardware_id, name, gateway in (
        ("door", "relay", NODE),
        ("light", "relay_2", NODE),
        ("far", "relay", "shed"),
    ):
        register(served, hardware_id, "esphome_node_switch", name=name, gateway=gateway)
    twice = {"hardware_id": "again", "type": "esphome_node_switch", "name": "relay", "gateway": NODE}
    refused = served.http("POST", "/v1/devices", twice)
    assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (400, "name")
    filters = ["esphome/discover", f"esphome/ping/{NODE}"]
    filters += [f"{NODE}/switch/{name}/command" for name in ("relay", "relay_2")]
    node = Connected(served.mqtt_port, NODE, token, filters, esphome, (f"{NODE}/status", "offline"))
    assert node.ready.wait(WITHIN_SEC)
    node.say(f"{NODE}/status", "online", retain=True)
    for name in ("relay", "relay_2"):
        node.say(f"{NODE}/switch/{name}/state", "OFF", retain=True)

    for device, command, topic in (
        ("door", "turn_on", "garage/switch/relay/command"),
        ("light", "turn_on", "garage/switch/relay_2/command"),
        ("light", "turn_off", "garage/switch/relay_2/command"),
    ):
        done = order(served, device, command)
        assert (done["state"], node.heard[-1].topic) == ("executed", topic), done
    assert order(served, NODE, "identify")["result"]["version"] == "2024.4.1"
    devices = ("door", "light", "far")
    states = [{"state": "ON"}, {"state": "OFF"}, None]
    until(lambda: [state(served, each) for each in devices] == states)

    moved = served.http("PATCH", "/v1/devices/far", {"gateway": NODE})  # there is a relay already
    assert (moved.status_code, moved.json()["error"]["details"]["field"]) == (400, "name")
    node.say(f"{NODE}/status", "offline", retain=True)
    node.end()
    until(lambda: presence(served, "door") == presence(served, "light") == "offline" or None)


def test_a_device_does_not_connect_beside_its_gateway_and_moves_with_its_open_commands(
    new_broker: NewBroker,
) -> None:
    broker = new_broker().start()
    token = register(broker, BRIDGE, "zigbee2mqtt_bridge")["device_token"]
    register(broker, OTHER, "gateway")
    lamp = register(broker, "lamp", "zigbee2mqtt", gateway=OTHER)
    bridge = Connected(broker.mqtt_port, BRIDGE, token, [f"{BRIDGE}/#"], zigbee, ("", ""))
    assert bridge.ready.wait(WITHIN_SEC)
    body = {"type": "turn_on", "ttl_sec": 300}
    waiting = broker.http("POST", "/v1/devices/lamp/commands", body).json()["id"]
    own = Connected(broker.mqtt_port, "lamp", lamp["device_token"], [f"{BRIDGE}/lamp/set"], zigbee, ("", ""))
    broker.run.err.wait("its gateway speaks for it")
    own.end()

    moved = broker.http("PATCH", "/v1/devices/lamp", {"gateway": BRIDGE})

    assert (moved.status_code, moved.json()["gateway"]) == (200, BRIDGE)
    broker.reaches(waiting, "executed")
    assert presence(broker, "lamp") == "online"
    broker.http("PATCH", "/v1/devices/lamp", {"gateway": None})
    until(lambda: presence(broker, "lamp") == "offline" or None)
    bridge.end()
