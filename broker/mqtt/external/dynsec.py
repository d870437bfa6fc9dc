"""Keeps the users of Mosquitto's dynamic-security plugin in step with the devices, over the broker's link.

Each device is a client of the plugin with its own role: it reads its command topics, writes its answer
topics, and must use its hardware id as client id. The plugin makes its own digests, so it needs each token as
it was issued. A token that was issued while the server could not be told, and before a restart of the broker,
is lost to it: such devices are counted in `missing`, and need a new token.

A broker may end before it has told a change. So after each start of the link it compares the plugin's roles
with the devices: who was deleted is removed, also who has a new token, and changed topics are told again.
Roles of devices that are not in the log are not touched.

Source: mosquitto.org/documentation/dynamic-security; the plugin of Mosquitto 2.0.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import structlog

from broker.domain.fleet import DeviceState
from broker.domain.mqtt_rules import MqttRules
from broker.often import shown
from broker.seams import UNREADABLE, Link, LinkEvents, Message, Outgoing, Receipt

logger = structlog.get_logger()

CONTROL = "$CONTROL/dynamic-security/v1"
RESPONSE = f"{CONTROL}/response"
OURS = "ordain-device-"  # begins the name of each device's role
BROKER_ROLE = "ordain-broker"
AT_ONCE = 100  # devices in one message to the plugin
PAGE = 20  # roles in one message of the plugin: one of a gateway may have thousands of topics
AGAIN_SEC = 1.0  # after devices could not be read
# What the plugin says when there is nothing to do.
HARMLESS = frozenset(
    {
        "Client not found",
        "Role not found",
        "Role does not exist",
        "Role already exists",
        "Client already exists",
    }
)
DENIED = ("publishClientSend", "subscribe")
EVERYTHING = ("#", "$SYS/#", "$CONTROL/#")  # `#` does not cover topics that begin with $
LAST = ("createClient", "deleteRole", "modifyRole")  # of the commands that change one device


class Topics(NamedTuple):
    """The topics of which a device gets the messages, and those where it may publish."""

    reads: Collection[str]
    writes: Collection[str]


class Entry(NamedTuple):
    """What the plugin must know of a device."""

    token: str | None  # None: only its topics changed
    mark: str  # see `_mark`; stored with a token only
    reads: Collection[str]
    writes: Collection[str]


class _Response(msgspec.Struct):
    command: str
    error: str = ""
    data: dict[str, Any] = {}
    correlationData: str = ""  # the plugin's name


class _Role(msgspec.Struct):
    rolename: str
    textdescription: str = ""
    acls: list[dict[str, Any]] = []

    @property
    def device(self) -> str:
        return self.rolename.removeprefix(OURS)


class _Responses(msgspec.Struct):
    responses: list[_Response] = []


class Dynsec:
    """`user`: the broker's own at the server. `sends`: where it publishes. `devices`: all of them.

    `known(hardware_id)` reads a device, also a deleted one, and those that it speaks for into memory.
    `run` must run. Fills `fault` and `missing` of `rules`.
    """

    def __init__(
        self,
        user: str,
        *,
        sends: Collection[str],
        topics: Callable[[DeviceState], Topics],
        known: Callable[[str], Awaitable[DeviceState | None]],
        devices: Iterable[DeviceState],
        rules: MqttRules,
    ) -> None:
        self._user = user
        self._sends, self._topics, self._known = sorted(sends), topics, known
        self._names = {each.hardware_id for each in devices if each.deleted_at is None and not each.gateway}
        self._rules = rules
        rules.fault = "the dynamic-security plugin has not answered yet"
        self.link: Link | None = None
        self._wanted: dict[str, Entry | None] = {}  # by hardware id; None: it must not connect
        self._sent: dict[str, Entry | None] = {}
        self._missing = set[str]()  # devices that the plugin does not know, and nobody knows their tokens
        self._renewed = set[str]()  # devices whose tokens are told since the link came up
        self._roles = asyncio.Queue[tuple[set[str], list[_Role]]]()  # to be compared; with `_renewed` of then
        self._renumbered = False  # the roles of the plugin, since it began to list them

    # --- called by the registry ---

    def issued(self, device: DeviceState, token: str) -> None:
        if device.gateway is None:
            self._names.add(device.hardware_id)
            self._miss(self._missing - {device.hardware_id})
            self._renewed.add(device.hardware_id)
            self._want(device.hardware_id, Entry(token, _mark(device), *self._topics(device)))

    def entitled(self, device: DeviceState) -> None:
        """A device that was deleted, or for which a gateway speaks, must not connect. Others may have other
        topics now: their type or name changed."""
        if device.deleted_at is not None or device.gateway is not None:
            self._names.discard(device.hardware_id)
            self._miss(self._missing - {device.hardware_id})
            self._want(device.hardware_id, None)
        elif device.hardware_id in self._names:
            self.regrouped(device)

    def regrouped(self, device: DeviceState) -> None:
        """A device has other topics now, or other devices that it speaks for."""
        name, topics = device.hardware_id, self._topics(device)
        # A token that is sent already may have to be sent again, if the link is lost before the answer.
        waiting = self._wanted.get(name, self._sent.get(name, Entry(None, "", *topics)))
        if waiting is not None:  # else it must not connect
            self._want(name, waiting._replace(reads=topics.reads, writes=topics.writes))

    def _want(self, hardware_id: str, entry: Entry | None) -> None:
        self._wanted[hardware_id] = entry
        self._work()

    def _miss(self, names: set[str]) -> None:
        self._missing = names
        self._rules.missing = len(names)

    # --- comparing ---

    async def run(self) -> None:
        """Compares the roles of the plugin with the devices, for ever."""
        while True:
            strange = list[str]()
            renewed, roles = await self._roles.get()
            for role in roles:
                device = await self._read(role.device)
                if renewed is not self._renewed:
                    break  # the link came up again, and all roles with it
                if device is None:
                    strange.append(role.device)
                else:
                    self._compare(role, device)
                await asyncio.sleep(0)  # a gateway may have thousands of topics
            if strange:
                logger.warning("dynsec.not_in_the_log", devices=shown(", ".join(strange)))

    async def _read(self, name: str) -> DeviceState | None:
        while True:
            try:
                return await self._known(name)
            except UNREADABLE as error:
                logger.warning("dynsec.not_compared", why=str(error))
                await asyncio.sleep(AGAIN_SEC)

    def _compare(self, role: _Role, device: DeviceState) -> None:
        """The role may be older than changes that were told meanwhile. To tell topics or a removal again does
        no harm."""
        name = device.hardware_id
        if device.deleted_at is not None or device.gateway is not None:
            self._want(name, None)
        elif name in self._renewed:
            return
        elif role.textdescription not in ("", _mark(device)):  # "": made by an older release
            self._miss(self._missing | {name})
            self._want(name, None)
            logger.warning("dynsec.old_token_removed", device=name, do="ordain devices token")
        elif _rights(_acls(*self._topics(device))) != _rights(role.acls):
            self.regrouped(device)

    # --- called by the link ---

    def link_up(self) -> None:
        self._wanted = {**self._sent, **self._wanted}
        self._sent.clear()
        self._renewed = {name for name, entry in self._wanted.items() if entry and entry.token is not None}
        self._renumbered = False
        access = [{"acltype": kind, "allow": False} for kind in DENIED]
        access.append({"acltype": "publishClientReceive", "allow": True})
        mine = [_acl("publishClientSend", topic) for topic in self._sends]
        self._tell(
            [
                {"command": "setDefaultACLAccess", "acls": access},
                {"command": "createRole", "rolename": BROKER_ROLE, "acls": mine},
                {"command": "getClient", "username": self._user},
                {"command": "listClients", "verbose": False, "count": -1, "offset": 0},
                _page(0),
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
                self._count({str(name) for name in each.data.get("clients", ())})
            elif each.command == "listRoles":
                self._take_page(each)
            elif each.command == "deleteRole":
                self._renumbered = True
            if each.correlationData in self._sent and each.command in LAST:
                del self._sent[each.correlationData]
        self._work()

    def _take_role(self, client: str) -> None:
        """Gives the broker's own user its role. The plugin disconnects a client whose roles change, so this
        is done only once; the link comes up again."""
        if repr(BROKER_ROLE) not in client:
            self._tell([{"command": "addClientRole", "username": self._user, "rolename": BROKER_ROLE}])

    def _count(self, there: set[str]) -> None:
        """Counts the devices that the plugin does not know and whose tokens nobody knows any more."""
        self._miss(self._names - there - self._renewed)
        if self._missing:
            do = "ordain devices token, for each"
            logger.warning("dynsec.devices_missing", devices=len(self._missing), do=do)

    def _take_page(self, page: _Response) -> None:
        """Takes some roles, in the order of their names, and asks for the next ones. After the last ones it
        asks for all again if one was deleted meanwhile: the later ones have other numbers then."""
        roles = msgspec.convert(page.data.get("roles", []), list[_Role])
        self._roles.put_nowait((self._renewed, [role for role in roles if role.rolename.startswith(OURS)]))
        if len(roles) == PAGE and page.correlationData.isdecimal():
            self._tell([_page(int(page.correlationData) + PAGE)])
        elif self._renumbered:
            self._renumbered = False
            self._tell([_page(0)])

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
        acls = _acls(entry.reads, entry.writes)
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
        made = {"command": "createRole", "rolename": role, "textdescription": entry.mark, "acls": acls}
        return [*gone, made, client]

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


def _mark(device: DeviceState) -> str:
    """Says which token of a device the plugin has. It is stored with the device's role."""
    return hashlib.sha256(device.token_digest.encode()).hexdigest()[:16]


def _page(offset: int) -> dict[str, Any]:
    listing = {"verbose": True, "count": PAGE, "offset": offset, "correlationData": str(offset)}
    return {"command": "listRoles", **listing}


def _acls(reads: Collection[str], writes: Collection[str]) -> list[dict[str, Any]]:
    # Devices subscribe with wildcards, and a subscription outlives the right to make it: each message is
    # judged instead.
    acls = [_acl("subscribePattern", "#")]
    acls += [_acl("publishClientSend", topic) for topic in sorted(writes)]
    acls += [_acl("publishClientReceive", topic) for topic in sorted(reads)]
    return acls + [_acl("publishClientReceive", topic, priority=-1, allow=False) for topic in EVERYTHING]


def _rights(acls: Iterable[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(acl.get(part) for part in ("acltype", "topic", "priority", "allow")) for acl in acls}


def _acl(kind: str, topic: str, *, priority: int = 0, allow: bool = True) -> dict[str, Any]:
    return {"acltype": kind, "topic": topic, "priority": priority, "allow": allow}
