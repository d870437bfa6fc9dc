"""Which connection each topic is delivered to. A device gets its own topics only, whatever its filters."""

from __future__ import annotations

from broker.mqtt.access import Peer, fits, is_filter
from broker.mqtt.matching import tree
from broker.mqtt.packets import Filter, Properties, Publish, Reason
from broker.mqtt.shell import Connection
from broker.seams import Outgoing

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
