"""Who may do what on the embedded MQTT server: names, passwords, topics. Pure but for the checks it is given.

It only judges. Until it has said yes, nothing may happen to what belongs to the client id that was claimed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple

from devices.names import is_name

CheckDevice = Callable[[str, str], Awaitable[bool]]
# An API key -> whose events it may see, by hardware id; None: no such key.
CheckService = Callable[[str], Awaitable[Callable[[str], bool] | None]]

LINK_USER = "ordain"
SERVICE_USER = "service"


class Claim(NamedTuple):
    """What a client says of itself. `will_topic` is None if it leaves no will."""

    client_id: str
    user: str
    password: str
    will_topic: str | None


class Peer(NamedTuple):
    """Who is at the other end, and what they may do. `name` is their place among the sessions.

    A device's is its hardware id; the others' hold a colon, which no hardware id can, so that no
    client id of theirs takes over a device.
    """

    name: str
    kind: str
    subscribe: Callable[[str], bool]
    publish: Callable[[str], bool]
    receive: Callable[[str], bool]


class Access(NamedTuple):
    """The rules, for one prefix. `check_service` None: no services."""

    prefix: str
    link_password: str
    check_device: CheckDevice
    check_service: CheckService | None = None
    command_suffixes: Collection[str] = ("rls", "rbt")
    answer_suffixes: Collection[str] = ("ack",)
    status: str = "status"

    async def admit(self, claim: Claim) -> Peer | None:
        """Who this is, or None if they are not who they say."""
        if claim.user == LINK_USER:
            return self._admit_link(claim)
        if claim.user == SERVICE_USER:
            return await self._admit_service(claim)
        return await self._admit_device(claim)

    def topics(self, hardware_id: str, suffixes: Collection[str]) -> frozenset[str]:
        return frozenset(f"{self.prefix}/dev/{hardware_id}/{suffix}" for suffix in suffixes)

    def _admit_link(self, claim: Claim) -> Peer | None:
        if not hmac.compare_digest(claim.password.encode(), self.link_password.encode()):
            return None
        start = f"{self.prefix}/"

        def ours(topic: str) -> bool:
            return topic.startswith(start)

        return Peer(f"{LINK_USER}:{claim.client_id}", LINK_USER, ours, ours, ours)

    async def _admit_service(self, claim: Claim) -> Peer | None:
        sees = None if self.check_service is None else await self.check_service(claim.password)
        if sees is None or claim.will_topic is not None:
            return None
        start = f"{self.prefix}/evt/"

        def events(topic: str) -> bool:
            return topic.startswith(start)

        def own_events(topic: str) -> bool:
            return events(topic) and sees(topic[len(start) :].split("/")[0])

        # By its key as well, so that no project's service takes over another's.
        key = hashlib.sha256(claim.password.encode()).hexdigest()[:16]
        name = f"{SERVICE_USER}:{key}:{claim.client_id}"
        return Peer(name, SERVICE_USER, events, lambda _: False, own_events)

    async def _admit_device(self, claim: Claim) -> Peer | None:
        hardware_id = claim.user
        status = self.topics(hardware_id, [self.status])
        # amqtt sends a will without asking anybody: it would reach another device's command topic.
        foreign_will = claim.will_topic is not None and claim.will_topic not in status
        if claim.client_id != hardware_id or not is_name(hardware_id) or foreign_will:
            return None
        if not await self.check_device(hardware_id, claim.password):
            return None
        commands = self.topics(hardware_id, self.command_suffixes)
        answers = self.topics(hardware_id, self.answer_suffixes) | status
        subscribe = commands.__contains__
        return Peer(hardware_id, "device", subscribe, answers.__contains__, subscribe)
