"""Authentication and topic rules of the listener: names, passwords, certificates. Pure but for its checks.

It only judges. Before it has accepted a CONNECT, the state of the claimed client id must not be touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import NamedTuple

from broker.domain.fleet import DeviceSet
from broker.mqtt.packets import Connect, Reason
from devices.names import is_name

SERVICE_USER = "service"
# One text for all reasons: a stranger must not learn whether the user exists.
NOT_LET_IN = "unknown user or wrong password"


class Scope(NamedTuple):
    """What a service may see: one project, or all with None; with `devices`, only events of these devices.

    `valid` says whether its key is still valid.
    """

    project: str | None
    valid: Callable[[], bool]
    devices: DeviceSet | None = None

    def sees(self, project: str, device_id: str, hardware_id: str) -> bool:
        return self.project in (None, project) and (
            self.devices is None or self.devices.covers(device_id, hardware_id)
        )


# (hardware id, token) -> None if the device is accepted, else the reason, for the log. Token None: the device
# has shown a client certificate.
CheckDevice = Callable[[str, str | None], Awaitable[str | None]]
# API key -> what it may see; None: the key is unknown or has no scope for events.
CheckService = Callable[[str], Awaitable[Scope | None]]


class Peer(NamedTuple):
    """An authenticated client. `name`: its key among the connections.

    The name of a device is its hardware id. The name of a service contains a colon; a hardware id cannot.
    `commands`: the topics that a device receives. `answers`: the topics that it may publish on. `others`:
    filters of what it publishes too and nobody reads; it may subscribe to them and gets nothing. `devices`:
    the devices that it speaks for, itself first, by hardware id, each with the topics that it receives.
    """

    name: str
    commands: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()
    scope: Scope | None = None
    others: tuple[str, ...] = ()
    devices: Mapping[str, frozenset[str]] = {}


class Refused(NamedTuple):
    """A refused CONNECT: an MQTT 5 reason code and a text for the developer of the device.

    `exact`: the reason for the log, if a stranger must not learn it.
    """

    reason: int
    text: str
    exact: str = ""


class Own(NamedTuple):
    """The topics of one device that its type describes. `will`: where its last will may be. `devices`: those
    of the devices that it speaks for, if it is a gateway."""

    commands: frozenset[str]
    answers: frozenset[str]
    others: tuple[str, ...]
    will: str
    devices: Mapping[str, Own] = {}


class Access(NamedTuple):
    """The rules for one prefix. `check_service` None: services are not accepted. `own`: the topics of a known
    device, if its type has topics of its own."""

    prefix: str
    check_device: CheckDevice
    check_service: CheckService | None = None
    command_suffixes: Collection[str] = ("rls", "rbt")
    answer_suffixes: Collection[str] = ("ack",)
    status: str = "status"
    own: Callable[[str], Own | None] = lambda hardware_id: None

    async def judge(self, connect: Connect, certified: str | None, number: int) -> Peer | Refused:
        """Judges a CONNECT. `certified`: the hardware id in the client certificate.

        `number` makes a name for a service without a client id. A refusal before the password check depends
        only on the CONNECT itself, so it tells a stranger nothing about devices.
        """
        if connect.user == SERVICE_USER and certified is None:
            return await self._service(connect, number)
        return await self._device(connect, certified)

    def topics(self, hardware_id: str, suffixes: Collection[str]) -> frozenset[str]:
        return frozenset(f"{self.prefix}/dev/{hardware_id}/{suffix}" for suffix in suffixes)

    @property
    def events(self) -> str:
        """The start of all event topics."""
        return f"{self.prefix}/evt/"

    async def _service(self, connect: Connect, number: int) -> Peer | Refused:
        password = _text(connect.password)
        if password is None or self.check_service is None:
            exact = "a service needs a password" if password is None else "mqtt_events is off: no services"
            return Refused(Reason.NOT_AUTHORIZED, NOT_LET_IN, exact)
        scope = await self.check_service(password)
        if scope is None:
            exact = "the password of a service must be a valid API key with events:read"
            return Refused(Reason.NOT_AUTHORIZED, NOT_LET_IN, exact)
        # The key is part of the name, so that a service cannot take over one of another project.
        key = hashlib.sha256(password.encode()).hexdigest()[:16]
        client_id = connect.client_id or f"{SERVICE_USER}-{number}"
        return Peer(f"{SERVICE_USER}:{key}:{client_id}", scope=scope)

    async def _device(self, connect: Connect, certified: str | None) -> Peer | Refused:
        user = connect.user if connect.user is not None else certified
        if certified is not None and user != certified:
            return Refused(Reason.NOT_AUTHORIZED, "the user name is not the one in the client certificate")
        if user is None or (connect.password is None and certified is None):
            return Refused(Reason.NOT_AUTHORIZED, "user name and password are needed")
        if connect.client_id != user:
            return Refused(
                Reason.WRONG_CLIENT_ID, "client id and user name must both be the device's hardware id"
            )
        status = self.topics(user, [self.status])
        token = _text(connect.password)
        if connect.password is not None and token is None:
            return Refused(Reason.NOT_AUTHORIZED, NOT_LET_IN, "the password is not a text")
        exact = await self.check_device(user, token) if is_name(user) else "the user is not a hardware id"
        if exact is not None:
            return Refused(Reason.NOT_AUTHORIZED, NOT_LET_IN, exact)
        own = self.own(user)
        if connect.will is not None and connect.will.topic not in (status if own is None else {own.will}):
            return Refused(Reason.BAD_TOPIC, "the will may be on the device's own status topic only")
        return self.peer(user, own)

    def peer(self, hardware_id: str, own: Own | None) -> Peer:
        """A device with all that it may say and hear, also for the devices that it speaks for."""
        found = {hardware_id: own, **({} if own is None else own.devices)}
        devices, answers, others = dict[str, frozenset[str]](), set[str](), list[str]()
        for name, each in found.items():
            devices[name] = self.topics(name, self.command_suffixes)
            answers |= self.topics(name, {*self.answer_suffixes, self.status})
            if each is not None:
                devices[name] |= each.commands
                answers |= each.answers
                others += each.others
        commands = frozenset[str]().union(*devices.values()) if len(devices) > 1 else devices[hardware_id]
        return Peer(hardware_id, commands, frozenset(answers), others=tuple(others), devices=devices)


def _text(password: bytes | None) -> str | None:
    """A password as text; None if it is not text. A password with NUL is refused: C code would cut it off."""
    if password is None or b"\0" in password:
        return None
    try:
        return password.decode()
    except UnicodeDecodeError:
        return None


def fits(topic_filter: str, topic: str) -> bool:
    """Whether a filter covers a topic. Source: MQTT 5.0, section 4.7. Topics here never begin with $."""
    if topic_filter == topic:
        return True
    found = topic.split("/")
    wanted = topic_filter.split("/", len(found) + 1)  # a filter may have thousands of levels
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(found) or level not in ("+", found[index]):
            return False
    return len(wanted) == len(found)


def is_filter(text: str) -> bool:
    """Whether this is a valid filter. A wildcard must be alone in its level, and # must be the last one.

    It may have 65,535 characters, so no step here is a loop over them in Python.
    """
    levels = f"/{text.replace('/', '//')}/"  # now each level has slashes of its own
    hashes = text.count("#")
    return text != "" and text.count("+") == levels.count("/+/") and hashes == levels.endswith("/#/")
