"""Bought devices through a real broker: over a Mosquitto of one's own, over the child Mosquitto, and over
Ordain's own listener. The devices say what the firmwares say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.system.conftest import NewBroker
from tests.system.support import WITHIN_SEC, Broker, until

SHELLY = "shellyplus1-a8032abe54dc"


class Heard(NamedTuple):
    topic: str
    payload: bytes
    retain: bool


class Connected:
    """A device: it answers each message on `subscribes` with what `reply` returns: (topic, payload)."""

    def __init__(
        self,
        port: int,
        name: str,
        token: str | None,
        subscribes: list[str],
        reply: Callable[[str, bytes], list[tuple[str, str]]],
        will: tuple[str, str],
    ) -> None:
        self.heard: list[Heard] = []
        self.codes: list[int] = []
        self.ready = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv311)
        if token is not None:
            self.client.username_pw_set(name, token)
        if will[0]:
            self.client.will_set(*will, qos=1, retain=True)
        self._subscribes, self._reply = subscribes, reply
        self.client.on_connect = self._connected
        self.client.on_subscribe = self._subscribed
        self.client.on_message = self._message
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def _connected(self, client: Any, data: Any, flags: Any, code: Any, properties: Any) -> None:
        client.subscribe([(each, 0) for each in self._subscribes])

    def _subscribed(self, client: Any, data: Any, mid: int, codes: Any, properties: Any) -> None:
        self.codes = [code.value for code in codes]
        self.ready.set()

    def _message(self, client: Any, data: Any, message: Any) -> None:
        self.heard.append(Heard(message.topic, message.payload, message.retain))
        for topic, payload in self._reply(message.topic, message.payload):
            self.client.publish(topic, payload)

    def say(self, topic: str, payload: str, *, retain: bool = False) -> None:
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(WITHIN_SEC)

    def end(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def shelly(topic: str, payload: bytes) -> list[tuple[str, str]]:
    """A Plus 1 with firmware 1.4: it has one switch."""
    asked = json.loads(payload)
    answer: dict[str, Any] = {"id": asked["id"], "src": SHELLY, "dst": asked["src"]}
    channel = asked["params"]["id"]
    if channel:
        message = f"Argument 'id', value {channel} not found!"
        answer["error"] = {"code": -105, "message": message}
    elif asked["method"] == "Switch.GetStatus":
        answer["result"] = {
            "id": 0,
            "source": "MQTT",
            "output": True,
            "temperature": {"tC": 43.2, "tF": 109.8},
        }
    else:
        answer["result"] = {"was_on": False}
    return [(f"{asked['src']}/rpc", json.dumps(answer))]


def lamp(topic: str, payload: bytes) -> list[tuple[str, str]]:
    """Zigbee2MQTT 1.42 for a bulb that is on: it publishes the state when it was set, or asked for."""
    said = json.loads(payload)
    asked = topic.endswith("/get")
    state = {"brightness": 254, "color_mode": "color_temp", "linkquality": 87, "state": "ON"}
    return [("zigbee2mqtt/lamp", json.dumps(state | ({} if asked else said)))]


@pytest.fixture(params=["listener", "child", "external"])
def served(request: pytest.FixtureRequest, new_broker: NewBroker, mosquitto: Any) -> Broker:
    if request.param == "external":
        broker = new_broker("--mqtt-url", f"mqtt://{mosquitto.host}:{mosquitto.port}").start()
        broker.mqtt_port = mosquitto.port
    elif request.param == "child":
        broker = new_broker("--mqtt-server", "mosquitto").start()
        broker.mqtt_port = int(broker.run.err.wait("event=mosquitto.up").split("port=")[1].split()[0])
    else:
        broker = new_broker().start()
    return broker


def order(broker: Broker, device: str, type: str, **params: Any) -> dict[str, Any]:
    body = {"type": type, "params": params, "ttl_sec": 120}
    answer = broker.http("POST", f"/v1/devices/{device}/commands?wait=60", body)
    return dict(answer.json())


def test_a_shelly_and_a_zigbee_lamp_are_commanded_with_their_own_topics(served: Broker) -> None:
    token = served.device(SHELLY, "shelly_gen2")
    topics = [f"{SHELLY}/rpc", f"{SHELLY}/command"]
    device = Connected(served.mqtt_port, SHELLY, token, topics, shelly, (f"{SHELLY}/online", "false"))
    assert device.ready.wait(WITHIN_SEC)
    device.say(f"{SHELLY}/online", "true", retain=True)
    device.say(f"{SHELLY}/events/rpc", json.dumps({"src": SHELLY, "method": "NotifyStatus"}))
    done = order(served, SHELLY, "turn_on")
    assert (done["state"], done["result"]) == ("executed", {"was_on": False}), done
    failed = order(served, SHELLY, "toggle", channel=3)
    assert (failed["state"], failed["error"]["code"]) == ("failed", "-105"), failed
    status = order(served, SHELLY, "get_status")
    assert status["result"]["output"] is True
    device.end()

    token = served.device("lamp", "zigbee2mqtt")
    will = ("zigbee2mqtt/lamp/availability", '{"state":"offline"}')
    device = Connected(
        served.mqtt_port, "lamp", token, ["zigbee2mqtt/lamp/set", "zigbee2mqtt/lamp/get"], lamp, will
    )
    assert device.ready.wait(WITHIN_SEC)
    done = order(served, "lamp", "set_brightness", brightness=120)
    assert (done["state"], done["result"]["brightness"]) == ("executed", 120), done
    state = until(lambda: served.http("GET", "/v1/devices/lamp/state").json()["state"])
    assert state["brightness"] == 120
    device.end()


def test_a_device_that_was_online_before_it_was_registered_is_known_to_be_there(
    new_broker: NewBroker, mosquitto: Any
) -> None:
    broker = new_broker("--mqtt-url", f"mqtt://{mosquitto.host}:{mosquitto.port}").start()
    devices = []
    for name in ("shelly-a", "shelly-b"):
        topic = f"{name}/online"
        devices.append(Connected(mosquitto.port, name, None, [f"{name}/rpc"], shelly, (topic, "false")))
        assert devices[-1].ready.wait(WITHIN_SEC)
        devices[-1].say(topic, "true", retain=True)
    for name in ("shelly-a", "shelly-b"):
        broker.device(name, "shelly_gen2")
        assert order(broker, name, "turn_off")["state"] == "executed", name
    for device in devices:
        device.end()
