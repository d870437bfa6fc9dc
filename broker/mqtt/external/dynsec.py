"""Keeps the users of Mosquitto's dynamic-security plugin in step with the devices, over the broker's link.

Each device is a client of the plugin with its own role: it reads its command topics, writes its answer
topics, and must use its hardware id as client id. The plugin makes its own digests, so it needs each token as
it was issued. A token that was issued while the server could not be told, and before a restart of the broker,
is lost to it: such devices are counted in `missing`, and need a new token.

Source: mosquitto.org/documentation/dynamic-security; the plugin of Mosquitto 2.0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import msgspec
import structlog

from broker.domain.fleet import DeviceState
from broker.domain.mqtt_rules import MqttRules
from broker.often import shown
from broker.seams import Link, LinkEvents, Message, Outgoing, Receipt

logger = structlog.get_logger()

CONTROL = "$CONTROL/dynamic-security/v1"
RESPONSE = f"{CONTROL}/response"
OURS = "ordain-device-"  # begins the name of each device's role
BROKER_ROLE = "ordain-broker"
AT_ONCE = 100  # devices in one message to the plugin
# What the plugin says when there is nothing to do.
HARMLESS = frozenset({"Client not found", "Role not found", "Role already exists", "Client already exists"})
DENIED = ("publishClientSend", "subscribe")
LAST = ("createClient", "deleteRole", "modifyRole")  # of the commands that change one device


class Topics(NamedTuple):
    """The topics that a device may subscribe to, and those where it may publish."""

    reads: Collection[str]
    writes: Collection[str]


class Entry(NamedTuple):
    """What the plugin must know of a device."""

    token: str | None  # None: only its topics changed
    reads: Collection[str]
    writes: Collection[str]


class _Response(msgspec.Struct):
    command: str
    error: str = ""
    data: dict[str, Any] = {}
    correlationData: str = ""  # the plugin's name


class _Responses(msgspec.Struct):
    responses: list[_Response] = []


class Dynsec:
    """`user`: the broker's own at the server. `sends`: where it publishes. `devices`: all of them.

    Fills `fault` and `missing` of `rules`.
    """

    def __init__(
        self,
        user: str,
        *,
        sends: Collection[str],
        topics: Callable[[DeviceState], Topics],
        devices: Iterable[DeviceState],
        rules: MqttRules,
    ) -> None:
        self._user = user
        self._sends, self._topics = sorted(sends), topics
        self._names = {each.hardware_id for each in devices if each.deleted_at is None and not each.gateway}
        self._rules = rules
        rules.fault = "the dynamic-security plugin has not answered yet"
        self.link: Link | None = None
        self._wanted: dict[str, Entry | None] = {}  # by hardware id; None: it was deleted
        self._sent: dict[str, Entry | None] = {}

    # --- called by the registry ---

    def issued(self, device: DeviceState, token: str) -> None:
        if device.gateway is None:
            self._names.add(device.hardware_id)
            self._want(device.hardware_id, Entry(token, *self._topics(device)))

    def entitled(self, device: DeviceState) -> None:
        """A device that was deleted, or for which a gateway speaks, must not connect. Others may have other
        topics now: their type or name changed."""
        if device.deleted_at is not None or device.gateway is not None:
            self._names.discard(device.hardware_id)
            self._want(device.hardware_id, None)
        elif device.hardware_id in self._names:
            self.regrouped(device)

    def regrouped(self, device: DeviceState) -> None:
        """A device has other topics now, or other devices that it speaks for."""
        name = device.hardware_id
        # A token that is sent already may have to be sent again, if the link is lost before the answer.
        waiting = self._wanted.get(name) or self._sent.get(name)
        token = None if waiting is None else waiting.token
        self._want(name, Entry(token, *self._topics(device)))

    def _want(self, hardware_id: str, entry: Entry | None) -> None:
        self._wanted[hardware_id] = entry
        self._work()

    # --- called by the link ---

    def link_up(self) -> None:
        self._wanted = {**self._sent, **self._wanted}
        self._sent.clear()
        access = [{"acltype": kind, "allow": False} for kind in DENIED]
        access.append({"acltype": "publishClientReceive", "allow": True})
        mine = [_allow("publishClientSend", topic) for topic in self._sends]
        self._tell(
            [
                {"command": "setDefaultACLAccess", "acls": access},
                {"command": "createRole", "rolename": BROKER_ROLE, "acls": mine},
                {"command": "getClient", "username": self._user},
                {"command": "listClients", "verbose": False, "count": -1, "offset": 0},
            ]
        )

    def message(self, message: Message) -> None:
        try:
            found = msgspec.json.decode(message.payload, type=_Responses)
        except (msgspec.DecodeError, UnicodeDecodeError):
            logger.warning("dynsec.unread", payload=shown(message.payload))
            return
        for each in found.responses:
            if each.error and each.error not in HARMLESS and "already" not in each.error:
                self._rules.fault = f"{each.command}: {shown(each.error)}"
                logger.warning("dynsec.refused", command=shown(each.command), why=shown(each.error))
            elif each.command == "getClient":
                self._take_role(str(each.data))
            elif each.command == "listClients":
                self._rules.fault = None
                self._compare({str(name) for name in each.data.get("clients", ())})
            if each.correlationData in self._sent and each.command in LAST:
                del self._sent[each.correlationData]
        self._work()

    def _take_role(self, client: str) -> None:
        """Gives the broker's own user its role. The plugin disconnects a client whose roles change, so this
        is done only once; the link comes up again."""
        if repr(BROKER_ROLE) not in client:
            self._tell([{"command": "addClientRole", "username": self._user, "rolename": BROKER_ROLE}])

    def _compare(self, there: set[str]) -> None:
        """Counts the devices that the plugin does not know and whose tokens nobody knows any more."""
        self._rules.missing = len(self._names - there - self._wanted.keys() - self._sent.keys())
        if self._rules.missing:
            do = "ordain devices token, for each"
            logger.warning("dynsec.devices_missing", devices=self._rules.missing, do=do)

    def _work(self) -> None:
        """Sends the next changes, unless earlier ones are not answered yet."""
        if self.link is None or not self.link.up or self._sent or not self._wanted or self._rules.fault:
            return
        commands: list[dict[str, Any]] = []
        for hardware_id in list(self._wanted)[:AT_ONCE]:
            entry = self._sent[hardware_id] = self._wanted.pop(hardware_id)
            commands += self._changes(hardware_id, entry)
        self._tell(commands)

    def _changes(self, hardware_id: str, entry: Entry | None) -> list[dict[str, Any]]:
        role = OURS + hardware_id
        # A client that is deleted is disconnected, so an old token ends its connection at once.
        gone: list[dict[str, Any]] = [
            {"command": "deleteClient", "username": hardware_id},
            {"command": "deleteRole", "rolename": role},
        ]
        if entry is None:
            gone[-1]["correlationData"] = hardware_id
            return gone
        acls = [_allow("subscribeLiteral", topic) for topic in sorted(entry.reads)]
        acls += [_allow("publishClientSend", topic) for topic in sorted(entry.writes)]
        # A subscription outlives the right to make it, so each message is judged too.
        acls += [_allow("publishClientReceive", topic) for topic in sorted(entry.reads)]
        acls.append({"acltype": "publishClientReceive", "topic": "#", "priority": -1, "allow": False})
        if entry.token is None:
            change = {"command": "modifyRole", "rolename": role, "acls": acls, "correlationData": hardware_id}
            return [change]
        client = {
            "command": "createClient",
            "username": hardware_id,
            "password": entry.token,
            "clientid": hardware_id,
            "roles": [{"rolename": role, "priority": 0}],
            "correlationData": hardware_id,
        }
        return [*gone, {"command": "createRole", "rolename": role, "acls": acls}, client]

    def _tell(self, commands: list[dict[str, Any]]) -> None:
        if self.link is None:
            return

        def taken(receipt: Receipt) -> None:
            if receipt.reason not in (0, None):
                self._rules.fault = f"the server refuses {CONTROL}: is the plugin loaded?"

        self.link.publish(Outgoing(topic=CONTROL, payload=msgspec.json.encode({"commands": commands})), taken)


class Shared:
    """Passes what the link tells to the intake, and answers of the plugin to `Dynsec`."""

    def __init__(self, intake: LinkEvents, dynsec: Dynsec) -> None:
        self._intake, self._dynsec = intake, dynsec

    def serve(self, link: Link) -> None:
        self._dynsec.link = link

    def link_up(self) -> None:
        self._intake.link_up()
        self._dynsec.link_up()

    def link_down(self, why: str) -> None:
        self._intake.link_down(why)

    def message(self, message: Message) -> None:
        if message.topic != RESPONSE:
            self._intake.message(message)
        elif (link := self._dynsec.link) is not None:
            link.puback(message)
            self._dynsec.message(message)


def _allow(kind: str, topic: str) -> dict[str, Any]:
    return {"acltype": kind, "topic": topic, "priority": 0, "allow": True}
