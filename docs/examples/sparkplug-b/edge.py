"""A simulated edge node, to try the gateway without hardware: one press with a speed and a valve."""

import os
import time
from typing import Any

from node import BOOLEAN, REBIRTH, SESSION, put, value_of
from paho.mqtt import client as paho
from sparkplug_pb2 import Payload

from devices.mqtt_url import parse_url

GROUP, NODE = os.environ.get("NODE", "plant/press-1").split("/")
SERVER = parse_url(os.environ.get("MQTT_URL", "mqtt://127.0.0.1:1883"))
KINDS = {SESSION: 8, REBIRTH: BOOLEAN, "speed": 3, "valve": BOOLEAN, "recipe": 12}
values: dict[str, Any] = {SESSION: 7, REBIRTH: False, "speed": -5, "valve": False, "recipe": "A"}


def topic(kind: str) -> str:
    return f"spBv1.0/{GROUP}/{kind}/{NODE}"


def message(*names: str) -> bytes:
    payload = Payload(timestamp=int(time.time() * 1_000))
    for name in names:
        metric = payload.metrics.add(name=name, datatype=KINDS[name])
        put(metric, KINDS[name], values[name])
    return bytes(payload.SerializeToString())


def connected(client: paho.Client, *_: Any) -> None:
    client.subscribe(topic("NCMD"), 1)
    client.publish(topic("NBIRTH"), message(*values))


def ordered(client: paho.Client, data: Any, received: paho.MQTTMessage) -> None:
    for metric in Payload.FromString(received.payload).metrics:
        if metric.name == REBIRTH:
            client.publish(topic("NBIRTH"), message(*values))
        elif values[metric.name] != (value := value_of(metric, KINDS[metric.name])):
            values[metric.name] = value  # reported by exception: only if it changes
            print(f"{metric.name} = {value}", flush=True)
            client.publish(topic("NDATA"), message(metric.name))


client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=f"{GROUP}-{NODE}")
client.on_connect, client.on_message = connected, ordered
client.will_set(topic("NDEATH"), message(SESSION), qos=1)
client.connect(SERVER.host, SERVER.port)
client.loop_forever()
