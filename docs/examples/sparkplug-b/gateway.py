"""A gateway between Ordain and the edge nodes of Sparkplug B, over one MQTT connection.

Each node is a device of the type `sparkplug_node` with this gateway. A command becomes an NCMD; what the node
then reports (NDATA, NBIRTH) is the evidence that it did it. A command without a valid grant for that node is
refused. An id that was seen is not executed again: its last answer is sent again.
"""

import asyncio
import json
import os
import time
import urllib.request
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
from node import REBIRTH, Node, same

from devices.grant import GrantRefused, GrantVerifier, keys_from_jwks
from devices.mqtt_url import parse_url

GATEWAY = os.environ.get("GATEWAY", "sparkplug-gw")
MQTT_URL = os.environ.get("MQTT_URL", "mqtt://127.0.0.1:1883")
ORDAIN_URL = os.environ.get("ORDAIN_URL", "http://127.0.0.1:8080")
PREFIX = os.environ.get("PREFIX", "iotee")
# hardware_id=group/node, separated by commas
NODES = dict(each.split("=") for each in os.environ.get("NODES", "press-1=plant/press-1").split(","))
REMEMBERED = 10_000


@dataclass
class Child:
    """One edge node. `open`: the commands that its next reports may end. `answers`: the last one to each id."""

    hardware_id: str
    path: str
    node: Node = field(default_factory=Node)
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)

    def topic(self, kind: str) -> str:
        group, node = self.path.split("/")
        return f"spBv1.0/{group}/{kind}/{node}"


class Gateway:
    def __init__(self, client: aiomqtt.Client, jwks: dict[str, Any]) -> None:
        self.client = client
        self.children = [Child(hardware_id, path) for hardware_id, path in NODES.items()]
        keys = keys_from_jwks(jwks)
        self.grants = {each: GrantVerifier(keys, "ordain", each, time.time) for each in NODES}

    async def run(self) -> None:
        for child in self.children:
            for kind in ("NBIRTH", "NDATA", "NDEATH"):
                await self.client.subscribe(child.topic(kind), qos=1)
            await self.client.subscribe(self.own(child, "rls"), qos=1)
            await self.send(child, REBIRTH, True)  # nothing is known of the node yet
        await self.client.publish(f"{PREFIX}/dev/{GATEWAY}/status", "online", qos=1, retain=True)
        async for message in self.client.messages:
            await self.take(message.topic.value, bytes(message.payload))

    async def take(self, topic: str, payload: bytes) -> None:
        for child in self.children:
            if topic == self.own(child, "rls"):
                await self.order(child, json.loads(payload))
            elif topic == child.topic("NBIRTH"):
                await self.present(child, "online")
                await self.reported(child, child.node.born(payload), born=True)
            elif topic == child.topic("NDATA"):
                await self.reported(child, child.node.said(payload))
            elif topic == child.topic("NDEATH") and child.node.died(payload):
                await self.present(child, "offline")

    async def order(self, child: Child, order: dict[str, Any]) -> None:
        """Takes a command of Ordain."""
        if (known := child.answers.get(order["id"])) is not None:
            await self.say(child, known)
            return
        fits = {"command_id": order["id"], "command": order["type"], "params": order["params"]}
        try:
            self.grants[child.hardware_id].verify(order.get("grant"), **fits)
        except GrantRefused as error:
            # Not remembered: the genuine command with this id may still come.
            refused = {"code": f"grant_{error.code}", "message": str(error)}
            await self.say(child, {"id": order["id"], "status": "failed", "error": refused})
            return
        metric, value = REBIRTH, True
        if order["type"] == "write":
            metric, value = order["params"]["metric"], order["params"]["value"]
        try:
            child.node.command(metric, value, 0)
        except ValueError as error:
            await self.answer(
                child, order["id"], "failed", error={"code": "not_written", "message": str(error)}
            )
            return
        await self.answer(child, order["id"], "acknowledged")
        child.open[order["id"]] = order
        await self.send(child, metric, value)
        if metric in child.node.last and same(value, child.node.last[metric], child.node.kinds[metric]):
            await self.send(
                child, REBIRTH, True
            )  # nothing changes, so the node need not say anything: ask it

    async def reported(self, child: Child, values: dict[str, Any], *, born: bool = False) -> None:
        """Ends the commands whose effect a report shows."""
        for command_id, order in list(child.open.items()):
            if order["type"] == "rebirth":
                done = born
            else:
                metric, value = order["params"]["metric"], order["params"]["value"]
                done = metric in values and same(value, values[metric], child.node.kinds[metric])
            if done:
                del child.open[command_id]
                await self.answer(child, command_id, "executed", result=values)

    async def send(self, child: Child, metric: str, value: Any) -> None:
        payload = child.node.command(metric, value, int(time.time() * 1_000))
        await self.client.publish(child.topic("NCMD"), payload, qos=0)

    async def answer(self, child: Child, command_id: str, status: str, **more: Any) -> None:
        child.answers[command_id] = {"id": command_id, "status": status, **more}
        if len(child.answers) > REMEMBERED:
            child.answers.popitem(last=False)
        await self.say(child, child.answers[command_id])

    async def say(self, child: Child, answer: dict[str, Any]) -> None:
        await self.client.publish(self.own(child, "ack"), json.dumps(answer), qos=1)
        print(child.hardware_id, answer["status"], answer["id"], flush=True)

    async def present(self, child: Child, word: str) -> None:
        await self.client.publish(self.own(child, "status"), word, qos=1, retain=True)

    def own(self, child: Child, suffix: str) -> str:
        return f"{PREFIX}/dev/{child.hardware_id}/{suffix}"


async def main(jwks: dict[str, Any]) -> None:
    server = parse_url(MQTT_URL)
    will = aiomqtt.Will(f"{PREFIX}/dev/{GATEWAY}/status", "offline", qos=1, retain=True)
    login = {"username": GATEWAY, "password": os.environ["TOKEN"]}
    async with aiomqtt.Client(server.host, server.port, identifier=GATEWAY, will=will, **login) as client:
        await Gateway(client, jwks).run()


with urllib.request.urlopen(f"{ORDAIN_URL}/.well-known/jwks.json") as found:
    asyncio.run(main(json.load(found)))
