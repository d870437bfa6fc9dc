"""What Mosquitto's dynamic-security plugin is told, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from broker.domain.fleet import DeviceState
from broker.domain.mqtt_rules import MqttRules
from broker.mqtt.external.dynsec import OURS, PAGE, RESPONSE, Dynsec, Topics, _acls, _mark
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


async def nothing(hardware_id: str) -> DeviceState | None:
    raise AssertionError("nothing is compared here")


def in_step(
    topics: list[str],
    known: Callable[[str], Awaitable[DeviceState | None]] = nothing,
    rules: MqttRules | None = None,
) -> tuple[Dynsec, Any]:
    dynsec = Dynsec(
        "ordain",
        sends=[],
        topics=lambda device: Topics(list(topics), []),
        known=known,
        devices=[] if known is nothing else [GATEWAY],
        rules=rules or MqttRules(users="dynsec"),
    )
    link: Any = Told()
    dynsec.link = link
    answers(dynsec, "listClients")
    return dynsec, link


def answers(dynsec: Dynsec, command: str, about: str = "", **data: Any) -> None:
    said = {"responses": [{"command": command, "data": data, "correlationData": about}]}
    dynsec.message(Message(topic=RESPONSE, payload=msgspec.json.encode(said)))


class Comparing:
    """The plugin has the client `gw` with its first token. Its role is compared when `compared` is called."""

    def __init__(self) -> None:
        self.now = self.there = GATEWAY  # in the log; when its client was made
        self.rules = MqttRules(users="dynsec")
        self.topics = ["gw/in"]
        self.dynsec, self.link = in_step(self.topics, self.known, self.rules)
        self.end = asyncio.Event()
        self.starts()

    async def known(self, name: str) -> DeviceState | None:
        if name == "end":
            self.end.set()
        return self.now if name == "gw" else None

    def starts(self) -> None:
        """The link comes up."""
        self.dynsec.link_up()
        answers(self.dynsec, "listClients", clients=["gw"])

    def lists(self) -> None:
        """The plugin tells its role of `gw`, and one of nobody."""
        acls = _acls(["gw/in"], [])
        role = {"rolename": f"{OURS}gw", "textdescription": _mark(self.there), "acls": acls}
        answers(self.dynsec, "listRoles", "0", roles=[role, {"rolename": f"{OURS}end"}])

    def rotates(self) -> None:
        """The device has a new token, which the broker has not told yet."""
        self.now = msgspec.structs.replace(GATEWAY, token_digest="new")

    async def compared(self) -> list[str]:
        """Compares what was listed; the commands to the plugin since then."""
        self.end.clear()
        self.link.commands.clear()
        run = asyncio.create_task(self.dynsec.run())
        await self.end.wait()
        run.cancel()
        return [each["command"] for each in self.link.commands]


def read(role: dict[str, Any]) -> list[str]:
    received = (acl for acl in role["acls"] if acl["acltype"] == "publishClientReceive" and acl["allow"])
    return [acl["topic"] for acl in received]


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


def test_a_token_that_is_sent_keeps_its_own_mark_when_topics_change_after_the_next_one_was_made() -> None:
    dynsec, link = in_step(["gw/in"])
    dynsec.issued(GATEWAY, "dtok_first")
    dynsec.regrouped(msgspec.structs.replace(GATEWAY, token_digest="new"))
    link.commands.clear()

    answers(dynsec, "createClient", "gw")

    assert [each["textdescription"] for each in link.named("createRole")] == [_mark(GATEWAY)]
    assert [each["password"] for each in link.named("createClient")] == ["dtok_first"]


async def test_a_token_that_was_never_told_is_removed() -> None:
    plugin = Comparing()
    plugin.rotates()
    plugin.lists()

    assert await plugin.compared() == ["deleteClient", "deleteRole"]
    assert plugin.rules.missing == 1


@pytest.mark.parametrize("link_is_lost", [False, True])
async def test_a_new_token_is_kept_when_a_list_of_roles_from_before_it_is_compared(
    link_is_lost: bool,
) -> None:
    plugin = Comparing()
    plugin.lists()
    plugin.rotates()
    plugin.dynsec.issued(plugin.now, "dtok_new")
    answers(plugin.dynsec, "createClient", "gw")
    plugin.there = plugin.now
    if link_is_lost:
        plugin.starts()
        plugin.lists()

    assert await plugin.compared() == []
    assert plugin.rules.missing == 0


@pytest.mark.parametrize("sent", [False, True])
async def test_a_removal_is_not_replaced_by_a_change_of_topics(sent: bool) -> None:
    plugin = Comparing()
    plugin.rotates()
    if not sent:
        other = msgspec.structs.replace(GATEWAY, id="dev_2", hardware_id="busy")
        plugin.dynsec.issued(other, "dtok_busy")  # the plugin has not answered yet
    plugin.lists()
    removed = await plugin.compared()
    assert removed == (["deleteClient", "deleteRole"] if sent else [])

    plugin.link.commands.clear()

    plugin.dynsec.entitled(plugin.now)
    answers(plugin.dynsec, "createClient", "busy")
    if sent:
        plugin.starts()  # before the plugin's answer, so it is sent again
    assert [each["username"] for each in plugin.link.named("deleteClient")] == ["gw"]

    plugin.dynsec.issued(plugin.now, "dtok_new")  # it makes the client again
    plugin.dynsec.regrouped(plugin.now)
    answers(plugin.dynsec, "deleteRole", "gw")
    assert [each["password"] for each in plugin.link.named("createClient")] == ["dtok_new"]


async def test_an_old_token_is_removed_also_if_topics_of_its_device_wait() -> None:
    plugin = Comparing()
    plugin.rotates()
    plugin.topics.append("lamp/in")
    plugin.dynsec.regrouped(plugin.now)
    plugin.lists()
    await plugin.compared()

    answers(plugin.dynsec, "modifyRole", "gw")

    assert [each["command"] for each in plugin.link.commands] == ["deleteClient", "deleteRole"]
    assert plugin.rules.missing == 1


async def test_a_device_whose_removal_waits_for_its_answer_is_missing_after_the_link_was_lost() -> None:
    plugin = Comparing()
    plugin.rotates()
    plugin.lists()
    await plugin.compared()

    plugin.dynsec.link_up()
    answers(plugin.dynsec, "listClients", clients=[])  # it was removed, and the answer is lost

    assert plugin.rules.missing == 1


async def test_roles_are_listed_again_when_one_was_deleted_meanwhile() -> None:
    """The plugin numbers those after it anew, so some may have been skipped."""
    plugin = Comparing()

    def asked_from() -> list[int]:
        return [each["offset"] for each in plugin.link.named("listRoles")]

    answers(plugin.dynsec, "listRoles", "0", roles=[{"rolename": f"{OURS}{n}"} for n in range(PAGE)])
    answers(plugin.dynsec, "deleteRole", "0")
    answers(plugin.dynsec, "listRoles", str(PAGE), roles=[])
    assert asked_from() == [0, PAGE, 0]
    answers(plugin.dynsec, "listRoles", "0", roles=[])
    assert asked_from() == [0, PAGE, 0]
