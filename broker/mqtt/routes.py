"""Which connection each topic is delivered to. A device gets its own topics only, whatever its filters."""

from __future__ import annotations

from broker.mqtt.access import Peer, fits, is_filter
from broker.mqtt.packets import Filter, Properties, Publish, Reason
from broker.mqtt.shell import Connection
from broker.seams import Outgoing


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
        if not any(fits(topic, command) for command in peer.commands) and not (
            any(fits(each, topic) for each in peer.others)
        ):
            return Reason.NOT_AUTHORIZED
        if topic not in connection.filters and len(connection.filters) >= most:
            return Reason.QUOTA
        connection.filters[topic] = min(wanted.qos, 1)
        return connection.filters[topic]

    def renew(self, connection: Connection, commands: frozenset[str]) -> tuple[bool, bool]:
        """Routes the device's topics as its filters say now.

        Returns whether it had any topic before, and whether it has one more now.
        """
        before, connection.routes = connection.routes, {}
        filters = connection.filters
        for topic in commands:
            found = [qos for each, qos in filters.items() if fits(each, topic)]
            if found:
                connection.routes[topic] = max(found)
                self._to[topic] = connection
        for topic in before.keys() - connection.routes.keys():
            del self._to[topic]
        return bool(before), bool(connection.routes.keys() - before.keys())

    def drop(self, connection: Connection) -> bool:
        """Removes the routes of a connection that ended. Returns whether it had any."""
        heard, connection.routes = connection.routes, {}
        for topic in heard:
            del self._to[topic]
        return bool(heard)


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
