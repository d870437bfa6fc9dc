"""Which connection each topic is delivered to. A device gets its own topics only, whatever its filters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from broker.mqtt.access import Peer, fits, is_filter
from broker.mqtt.matching import tree
from broker.mqtt.packets import Filter, Properties, Publish, Reason
from broker.mqtt.shell import Connection
from broker.seams import Outgoing, Presence

NO_TOPICS = frozenset[str]()


class Routes:
    """The topics of devices that a connection is subscribed to."""

    def __init__(self) -> None:
        self._to: dict[str, Connection] = {}

    def __contains__(self, topic: str) -> bool:
        return topic in self._to

    def get(self, topic: str) -> Connection | None:
        return self._to.get(topic)

    def grant(self, connection: Connection, peer: Peer, wanted: Filter, most: int) -> int:
        """The SUBACK code for one filter. It takes effect with `renew`."""
        topic = wanted.topic
        if topic.startswith("$share/"):
            return Reason.NO_SHARED
        if not is_filter(topic):
            return Reason.BAD_FILTER
        if next(tree(peer.commands).fitting(topic), None) is None and not (
            any(fits(each, topic) for each in peer.others)
        ):
            return Reason.NOT_AUTHORIZED
        if topic not in connection.filters and len(connection.filters) >= most:
            return Reason.QUOTA
        connection.filters[topic] = min(wanted.qos, 1)
        return connection.filters[topic]

    def renew(self, connection: Connection, peer: Peer, old: Peer) -> tuple[list[str], list[str]]:
        """Routes the topics of the peer's devices as its filters say now. `old`: the peer as it was before.

        Returns the devices that have one more topic than before, and those that have none any more.
        """
        before, connection.routes = connection.routes, {}
        topics = tree(peer.commands)
        for each, qos in sorted(connection.filters.items(), key=lambda item: item[1]):
            connection.routes.update(dict.fromkeys(topics.fitting(each), qos))
        self._to.update(dict.fromkeys(connection.routes, connection))
        for topic in before.keys() - connection.routes.keys():
            self._remove(topic, connection)
        came, left = list[str](), list[str]()
        for name in {**peer.devices, **old.devices}:
            own = peer.devices.get(name, NO_TOPICS) | old.devices.get(name, NO_TOPICS)
            had, has = own & before.keys(), own & connection.routes.keys()
            if has - had:
                came.append(name)
            elif had and not has:
                left.append(name)
        return came, left

    def drop(self, connection: Connection, peer: Peer) -> list[str]:
        """Removes the routes of a connection that ended.

        Returns the devices that are away now: those that had any, and all others that a gateway spoke for,
        because their status topic may have said that they are there.
        """
        heard, connection.routes = connection.routes, {}
        for topic in heard:
            self._remove(topic, connection)
        return [each for each, topics in peer.devices.items() if topics & heard.keys() or each != peer.name]

    def _remove(self, topic: str, connection: Connection) -> None:
        """A device that moved to another gateway may have its topic there already."""
        if self._to.get(topic) is connection:
            del self._to[topic]


class Subscriptions:
    """What devices subscribe to, and what follows from it: routes, and who is there.

    `peers`: the connections by name. `refused`: told of each filter that a device may not have.
    """

    def __init__(
        self,
        routes: Routes,
        events: Presence,
        most: int,
        peers: Mapping[str, Connection],
        refused: Callable[[Connection, str], None],
    ) -> None:
        self._routes, self._events, self._most = routes, events, most
        self._peers, self._refused = peers, refused
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Connection, None] = {}

    def subscribe(self, connection: Connection, peer: Peer, filters: Sequence[Filter]) -> list[int]:
        """The codes of the SUBACK."""
        before = dict(connection.filters)
        codes = [self._routes.grant(connection, peer, each, self._most) for each in filters]
        for each, code in zip(filters, codes, strict=True):
            if code == Reason.NOT_AUTHORIZED:
                self._refused(connection, each.topic)
        self._changed(connection, peer, before)
        return codes

    def unsubscribe(self, connection: Connection, peer: Peer, topics: Sequence[str]) -> list[int]:
        """The codes of the UNSUBACK."""
        before = dict(connection.filters)
        known = [connection.filters.pop(topic, None) is not None for topic in topics]
        self._changed(connection, peer, before)
        return [Reason.SUCCESS if each else Reason.NO_SUBSCRIPTION for each in known]

    def renew(self, connection: Connection, peer: Peer, old: Peer | None = None) -> None:
        """Routes the peer's topics as its filters say now, and tells which devices came or left."""
        came, left = self._routes.renew(connection, peer, old or peer)
        for name in left:
            self._events.device_offline(name)
        for name in came:
            self._events.device_online(name)

    def _changed(self, connection: Connection, peer: Peer, before: dict[str, int]) -> None:
        """A gateway has many topics: they are routed once for all its packets of this turn of the loop."""
        if connection.filters == before:
            return
        if len(peer.devices) <= 1:
            self.renew(connection, peer)
            return
        if not self._waiting:
            self._loop.call_soon(self._next)
        self._waiting[connection] = None

    def _next(self) -> None:
        """One gateway in each turn."""
        connection, _ = self._waiting.popitem()
        if self._waiting:
            self._loop.call_soon(self._next)
        peer = connection.peer
        if peer is not None and self._peers.get(peer.name) is connection:
            self.renew(connection, peer)


def message_of(outgoing: Outgoing, qos: int, version: int) -> Publish:
    """The PUBLISH for a device, with its properties in MQTT 5."""
    properties: Properties = {}
    if version != 5:
        return Publish(outgoing.topic, outgoing.payload, qos, properties=properties)
    if outgoing.expiry_sec is not None:
        properties["expiry"] = outgoing.expiry_sec
    if outgoing.response_topic is not None:
        properties["response_topic"] = outgoing.response_topic
    if outgoing.correlation is not None:
        properties["correlation"] = outgoing.correlation
    if outgoing.user_properties:
        properties["user"] = outgoing.user_properties
    return Publish(outgoing.topic, outgoing.payload, qos, properties=properties)
