"""Who may say and hear what on the listener: names, passwords, certificates, topics. Pure but for its checks.

It only judges. Until it has said yes, nothing may happen to what belongs to the client id that was claimed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple

from broker.domain.fleet import DeviceSet
from broker.mqtt.packets import Connect, Reason
from devices.names import is_name

SERVICE_USER = "service"
# One text, so that it cannot be told apart what is wrong.
NOT_LET_IN = "unknown user or wrong password"
LONGEST_SHOWN = 64


class Scope(NamedTuple):
    """What a service may see: one project, or with None all; and of it only `devices`, if that is set.
    `valid` says whether its key still works."""

    project: str | None
    valid: Callable[[], bool]
    devices: DeviceSet | None = None

    def sees(self, project: str, device_id: str, hardware_id: str) -> bool:
        return self.project in (None, project) and (
            self.devices is None or self.devices.covers(device_id, hardware_id)
        )


# (hardware id, token; None: a client certificate has shown who it is) -> None, or for the log why it may not
# come in.
CheckDevice = Callable[[str, str | None], Awaitable[str | None]]
# An API key -> what it may see; None: no such key, or not for events.
CheckService = Callable[[str], Awaitable[Scope | None]]


class Peer(NamedTuple):
    """Who is at the other end, and what they may do. `name` is their place among the connections.

    A device's is its hardware id. A service's holds a colon, which no hardware id can.
    `commands`: the topics a device may hear; `answers`: those it may say something on.
    """

    name: str
    commands: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()
    scope: Scope | None = None


class Refused(NamedTuple):
    """Why somebody is not let in: an MQTT 5 reason code and a text for whoever builds the device. `exact`:
    for the log, where the text must not tell a stranger all."""

    reason: int
    text: str
    exact: str = ""


class Access(NamedTuple):
    """The rules, for one prefix. `check_service` None: no services."""

    prefix: str
    check_device: CheckDevice
    check_service: CheckService | None = None
    command_suffixes: Collection[str] = ("rls", "rbt")
    answer_suffixes: Collection[str] = ("ack",)
    status: str = "status"

    async def judge(self, connect: Connect, certified: str | None, number: int) -> Peer | Refused:
        """Who this is, or why they are not let in. `certified`: whom a client certificate names.

        `number` makes a name for a service that has none. What is refused before the password is looked at
        depends on nothing but the CONNECT itself, so that it tells strangers nothing.
        """
        if connect.user == SERVICE_USER and certified is None:
            return await self._service(connect, number)
        return await self._device(connect, certified)

    def topics(self, hardware_id: str, suffixes: Collection[str]) -> frozenset[str]:
        return frozenset(f"{self.prefix}/dev/{hardware_id}/{suffix}" for suffix in suffixes)

    @property
    def events(self) -> str:
        """What the topics of events begin with."""
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
        # By its key as well, so that no project's service takes over another's.
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
        if connect.will is not None and connect.will.topic not in status:
            return Refused(Reason.BAD_TOPIC, "the will may be on the device's own status topic only")
        token = _text(connect.password)
        if connect.password is not None and token is None:
            return Refused(Reason.NOT_AUTHORIZED, NOT_LET_IN, "the password is not a text")
        exact = await self.check_device(user, token) if is_name(user) else "the user is not a hardware id"
        if exact is not None:
            return Refused(Reason.NOT_AUTHORIZED, NOT_LET_IN, exact)
        commands = self.topics(user, self.command_suffixes)
        return Peer(user, commands, self.topics(user, self.answer_suffixes) | status)


def _text(password: bytes | None) -> str | None:
    """A password as a text; None if it is none. A NUL would be cut off by what compares in C."""
    if password is None or b"\0" in password:
        return None
    try:
        return password.decode()
    except UnicodeDecodeError:
        return None


def fits(topic_filter: str, topic: str) -> bool:
    """Does a filter cover a topic? Source: MQTT 5.0, section 4.7. No topic here begins with $."""
    if topic_filter == topic:
        return True
    wanted, found = topic_filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(found) or level not in ("+", found[index]):
            return False
    return len(wanted) == len(found)


def is_filter(text: str) -> bool:
    """Wildcards stand alone in their level, and # only at the end."""
    levels = text.split("/")
    return text != "" and all(
        level == "+" or (level == "#" and index == len(levels) - 1) or not {"+", "#"} & set(level)
        for index, level in enumerate(levels)
    )


def shown(name: object) -> str:
    """A name that a stranger chose, for a log line: short, and without anything that could forge one."""
    text = str(name)
    return ascii(text[:LONGEST_SHOWN])[1:-1] + ("…" if len(text) > LONGEST_SHOWN else "")
