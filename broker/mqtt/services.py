"""Services on the listener: each gets the events of its project, in order and at least once while connected.

Every service, and every group with a shared subscription, has its own position in the log. Nothing is stored
for a service that is not connected: it reads the missing events over HTTP. A slow service delays only itself.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import structlog

from broker.domain.cloudevents import Entry, Wanted, encoded
from broker.domain.fleet import DeviceSet
from broker.mqtt import packets as p
from broker.mqtt.access import Scope, fits, is_filter
from broker.mqtt.packets import Publish, Reason
from broker.mqtt.shell import Connection
from broker.often import shown
from broker.seams import Outgoing, Receipt
from broker.subscriptions.feed import Feed, Subscription

logger = structlog.get_logger()

IDLE_SEC = 0.5
PINNED = 10_000
Log = Callable[..., None]
Group = tuple[str | None, DeviceSet | None, str, str]  # project, devices, name, filter


class Grant:
    """A granted filter: its QoS and its subscription identifiers."""

    __slots__ = ("numbers", "qos")

    def __init__(self, qos: int, numbers: list[int]) -> None:
        self.qos = qos
        self.numbers = numbers


class Cursor:
    """One position in the log, and the connections that get the events from there: one service, or a group.

    An event is sent to one member. All events of a command are sent to the same member while it is connected.
    Events that a member did not acknowledge before it left are sent to another one, before newer events.
    """

    def __init__(self, owner: Services, scope: Scope) -> None:
        self.scope = scope
        self.filters: dict[str, Grant] = {}
        self.members: list[Connection] = []
        self.task: asyncio.Task[None] | None = None
        self._owner = owner
        self._news = asyncio.Event()
        self._again: list[Entry] = []
        self._pins: OrderedDict[str, Connection] = OrderedDict()

    def changed(self) -> None:
        self._news.set()

    def grant_of(self, topic: str) -> Grant | None:
        """The highest QoS and all subscription identifiers of the filters that cover a topic."""
        found = [grant for each, grant in self.filters.items() if fits(each, topic)]
        if not found:
            return None
        return Grant(max(grant.qos for grant in found), [n for grant in found for n in grant.numbers])

    async def run(self) -> None:
        feed = self._owner.feed
        with feed.subscribed(
            Wanted(project=self.scope.project, within=self.scope.devices), feed.head
        ) as subscription:
            while True:
                if self._again:
                    self._again.sort(key=lambda entry: entry.position)
                    await self._tell(self._again.pop(0), subscription)
                    continue
                for entry in await subscription.next(IDLE_SEC) or ():
                    while self._again:
                        self._again.sort(key=lambda entry: entry.position)
                        await self._tell(self._again.pop(0), subscription)
                    if not await self._tell(entry, subscription):
                        subscription.give_back(entry.position - 1)
                        break

    async def _tell(self, entry: Entry, subscription: Subscription) -> bool:
        """Returns False if the entry must be read again, because it may have been erased meanwhile."""
        if entry.command_id is None:
            return True
        topic = f"{self._owner.events}{entry.hardware_id}/{entry.command_id}"
        if self.grant_of(topic) is None:
            return True
        waited, member = await self._room(entry.command_id)
        grant = self.grant_of(topic)
        if waited and subscription.stale:
            return False
        if grant is None:
            return True
        payload = encoded(self._owner.log_id(), entry)
        self._owner.send(member, topic, payload, grant, partial(self._taken, entry))
        return True

    async def _room(self, command_id: str) -> tuple[bool, Connection]:
        """Waits for a member that can take a message of a command: (whether it had to wait, the member)."""
        loop = asyncio.get_running_loop()
        since, waited = loop.time(), False
        while True:
            member = self._pick(command_id)
            if member is not None:
                session, peer = member.session, member.peer
                if peer is not None and peer.scope is not None and not peer.scope.valid():
                    session.close(Reason.ADMINISTRATIVE, "its key was revoked")
                    member.flush()
                    await asyncio.sleep(0)
                    continue
                if session.room and member.stalled_at is None:
                    return waited, member
                if loop.time() >= since + self._owner.stalled_sec:
                    session.close(Reason.QUOTA, "it does not acknowledge what it is sent")
                    member.flush()
                    since = loop.time()
                    continue
            waited = True
            self._news.clear()
            try:
                async with asyncio.timeout(IDLE_SEC):
                    await self._news.wait()
            except TimeoutError:
                continue

    def _pick(self, command_id: str) -> Connection | None:
        pinned = self._pins.get(command_id)
        if pinned in self.members:
            return pinned
        if not self.members:
            return None
        member = max(self.members, key=lambda each: zlib.crc32(f"{each.arrival}/{command_id}".encode()))
        self._pins[command_id] = member
        if len(self._pins) > PINNED:
            self._pins.popitem(last=False)
        return member

    def _taken(self, entry: Entry, receipt: Receipt) -> None:
        if receipt.reason is None:
            self._again.append(entry)
        self._news.set()


class Services:
    """The services of one listener. `events`: the start of all event topics. `told` counts sent events.

    `device_of` returns project, id and hardware id of the device with a hardware id, if it is known.
    """

    def __init__(
        self,
        feed: Feed,
        events: str,
        log_id: Callable[[], str],
        device_of: Callable[[str], tuple[str, str, str] | None],
        *,
        stalled_sec: float = 30.0,
        filters: int = 100,
    ) -> None:
        self.feed = feed
        self.events = events
        self.log_id = log_id
        self.stalled_sec = stalled_sec
        self.told = 0
        self._device_of = device_of
        self._most_filters = filters
        self._own: dict[Connection, Cursor] = {}
        self._groups: dict[Group, Cursor] = {}

    def subscribe(self, connection: Connection, packet: p.Subscribe, log: Log) -> list[int]:
        numbers = packet.properties.get("subscription_id", [])
        return [self._grant(connection, each, numbers, log) for each in packet.filters]

    def _grant(self, connection: Connection, wanted: p.Filter, numbers: list[int], log: Log) -> int:
        peer = connection.peer
        assert peer is not None
        assert peer.scope is not None
        group, topic = _shared(wanted.topic)
        if not is_filter(topic) or group == "" or (group and (wanted.no_local or {"+", "#"} & set(group))):
            return Reason.BAD_FILTER
        if not topic.startswith(self.events):
            if not connection.denied:
                connection.denied = True
                where = connection.address
                log("mqtt.denied", peer=peer.name, action="subscribe", topic=shown(topic), address=where)
            return Reason.NOT_AUTHORIZED
        if wanted.topic not in connection.filters and len(connection.filters) >= self._most_filters:
            return Reason.QUOTA
        qos = min(wanted.qos, 1)
        connection.filters[wanted.topic] = qos
        if group is None:
            cursor = self._own.get(connection) or self._begin(peer.scope)
            self._own[connection] = cursor
        else:
            key = peer.scope.project, peer.scope.devices, group, topic
            cursor = self._groups.get(key) or self._begin(peer.scope)
            self._groups[key] = cursor
        cursor.filters[topic] = Grant(qos, numbers)
        if connection not in cursor.members:
            cursor.members.append(connection)
        cursor.changed()
        return qos

    def _begin(self, scope: Scope) -> Cursor:
        cursor = Cursor(self, scope)
        cursor.task = asyncio.create_task(self._run(cursor))
        return cursor

    async def _run(self, cursor: Cursor) -> None:
        try:
            await cursor.run()
        except Exception:
            # Its members lose their connection and reconnect. Other services are not affected.
            logger.exception("mqtt.events_failed")
            for member in list(cursor.members):
                member.session.close(Reason.UNSPECIFIED, "events cannot be read now")
                member.flush()

    def unsubscribe(self, connection: Connection, topics: list[str]) -> list[int]:
        return [self._leave(connection, topic) for topic in topics]

    def _leave(self, connection: Connection, text: str) -> int:
        if connection.filters.pop(text, None) is None:
            return Reason.NO_SUBSCRIPTION
        group, topic = _shared(text)
        if group is None:
            self._own[connection].filters.pop(topic, None)
        else:
            self._leave_groups(connection, lambda key: key[2:] == (group, topic))
        return Reason.SUCCESS

    def left(self, connection: Connection) -> None:
        """A service has disconnected. Its groups got its unacknowledged events back already."""
        own = self._own.pop(connection, None)
        if own is not None and own.task is not None:
            own.task.cancel()
        self._leave_groups(connection, lambda key: True)

    def _leave_groups(self, connection: Connection, where: Callable[[Group], bool]) -> None:
        for key, cursor in list(self._groups.items()):
            if where(key) and connection in cursor.members:
                cursor.members.remove(connection)
                cursor.changed()
                if not cursor.members:
                    del self._groups[key]
                    if cursor.task is not None:
                        cursor.task.cancel()

    def send(
        self, member: Connection, topic: str, payload: bytes, grant: Grant, taken: Callable[[Receipt], None]
    ) -> bool:
        """Returns False if the event cannot be sent. `taken` gets the receipt, except for QoS 0."""
        properties: p.Properties = {"format": 1, "content_type": "application/cloudevents+json"}
        if grant.numbers:
            properties["subscription_id"] = grant.numbers
        message = Publish(topic, payload, grant.qos, properties=properties)
        outcome = member.session.publish(message, taken, asyncio.get_running_loop().time())
        if outcome == "too large":
            logger.warning("mqtt.event_too_large", topic=topic, bytes=len(payload))
        if outcome not in ("sent", "queued"):
            return False
        self.told += 1
        member.flush()
        return True

    def pass_on(self, outgoing: Outgoing) -> bool:
        """Sends one message to every service that may see it, outside of the order of the log.

        Returns whether it was sent to any of them.
        """
        if not outgoing.topic.startswith(self.events):
            return False
        device = self._device_of(outgoing.topic[len(self.events) :].split("/")[0])
        heard = False
        for cursor in (*self._own.values(), *self._groups.values()):
            grant = cursor.grant_of(outgoing.topic)
            if grant is not None and cursor.members and device is not None and cursor.scope.sees(*device):
                member = cursor.members[0]
                heard |= self.send(member, outgoing.topic, outgoing.payload, grant, lambda receipt: None)
        return heard

    async def close(self) -> None:
        tasks = [c.task for c in (*self._own.values(), *self._groups.values()) if c.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _shared(text: str) -> tuple[str | None, str]:
    """(group, filter) of `$share/<group>/<filter>`; without a group (None, filter)."""
    if not text.startswith("$share/"):
        return None, text
    _, group, topic = (*text.split("/", 2), "")[:3]
    return group, topic
