"""The metrics of the listener: every bound has one here."""

from __future__ import annotations

from collections.abc import Callable

from broker.mqtt.listener import Listener

Figures = dict[str, tuple[str, Callable[[], float]]]
COUNTED = {
    "let_in": "Clients let in",
    "turned_away": "Connections closed at once because there were too many",
    "not_begun": "Connections closed during the TLS handshake or the PROXY header",
    "taken_over": "Connections closed because their client id came again",
    "sent": "Messages sent to devices, or put in their queue",
    "refused_by_device": "Messages that a device answered with a PUBACK of 0x80 or more",
    "denied": "Publishes and subscriptions on topics that are not the client's",
    "discarded": "Messages of services, which may only subscribe",
    "dropped_qos_0": "Messages of QoS 0 lost because too many waited",
    "held": "Times a client was not read because too many bytes waited for the log",
    "slowed": "Times a client was not read because it was over its rate",
}


def figures(listener: Listener) -> Figures:
    """Name -> (description, how to read it). Names that end in `_total` only grow."""
    counts = listener.counts

    def count(name: str) -> Callable[[], float]:
        return lambda: counts[name]

    return {
        "connections": ("Connections of all kinds, those not let in yet too", lambda: listener.connections),
        "connections_limit": ("How many there may be", lambda: listener.bounds.connections),
        "devices_connected": ("Devices that are connected", lambda: listener.connected),
        "strangers": ("Connections that are not let in yet", lambda: listener.crowd.strangers),
        "in_flight": (
            "Messages to clients without their PUBACK",
            lambda: sum(each.session.in_flight for each in listener.peers.values()),
        ),
        "unacknowledged_bytes": ("Bytes from clients without our PUBACK", lambda: listener.unacknowledged),
        "events_told_total": ("Events sent to services", lambda: listener.services.told),
        "damped_total": ("Waits because two clients use one name", lambda: listener.admission.damped),
        **{f"{name}_total": (what, count(name)) for name, what in COUNTED.items()},
    }
