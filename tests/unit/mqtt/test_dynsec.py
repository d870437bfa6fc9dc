"""What Mosquitto's dynamic-security plugin is told, and when."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.domain.fleet import DeviceState
from broker.domain.mqtt_rules import MqttRules
from broker.mqtt.external.dynsec import RESPONSE, Dynsec, Topics
from broker.seams import Message

GATEWAY = DeviceState(
    id="dev_1",
    project="demo",
    hardware_id="gw",
    device_type="gateway",
    token_digest="",
    version=1,
    created_at=0,
    updated_at=0,
)


class Told:
    """A link that keeps what it is given."""

    up = True

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []

    def publish(self, outgoing: Any, done: Any) -> bool:
        self.commands += msgspec.json.decode(outgoing.payload)["commands"]
        return True

    def named(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self.commands if each["command"] == name]


def in_step(topics: list[str]) -> tuple[Dynsec, Any]:
    dynsec = Dynsec(
        "ordain",
        sends=[],
        topics=lambda device: Topics(list(topics), []),
        devices=[],
        rules=MqttRules(users="dynsec"),
    )
    link: Any = Told()
    dynsec.link = link
    answers(dynsec, "listClients")
    return dynsec, link


def answers(dynsec: Dynsec, command: str, about: str = "") -> None:
    said = {"responses": [{"command": command, "data": {}, "correlationData": about}]}
    dynsec.message(Message(topic=RESPONSE, payload=msgspec.json.encode(said)))


def read(role: dict[str, Any]) -> list[str]:
    return [acl["topic"] for acl in role["acls"] if acl["acltype"] == "subscribeLiteral"]


def test_a_token_whose_answer_is_lost_with_the_link_is_sent_again_with_the_newest_topics() -> None:
    topics = ["gw/in"]
    dynsec, link = in_step(topics)
    dynsec.issued(GATEWAY, "dtok_secret")
    topics.append("lamp/in")
    dynsec.regrouped(GATEWAY)  # the plugin has not answered yet
    link.commands.clear()

    dynsec.link_up()
    answers(dynsec, "listClients")

    assert [each["password"] for each in link.named("createClient")] == ["dtok_secret"]
    assert read(link.named("createRole")[-1]) == ["gw/in", "lamp/in"]


def test_a_device_with_another_name_or_type_has_only_its_new_topics() -> None:
    topics = ["old/in"]
    dynsec, link = in_step(topics)
    dynsec.issued(GATEWAY, "dtok_secret")
    answers(dynsec, "createClient", "gw")
    topics[:] = ["new/in"]

    dynsec.entitled(GATEWAY)

    changed = link.named("modifyRole")
    assert [each["rolename"] for each in changed] == ["ordain-device-gw"]
    assert read(changed[0]) == ["new/in"]
