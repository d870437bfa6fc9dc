"""How many connections there are, in all and from each address, and what devices had when they left."""

from __future__ import annotations

from collections import Counter, OrderedDict

from broker.mqtt.shell import Connection
from broker.settings import MqttLimits

# Devices of which we remember what they had no PUBACK for, and how much of each.
REMEMBERED, ENOUGH_IDS = 20_000, 1_000


class Crowd:
    """`strangers` are not let in yet."""

    def __init__(self, bounds: MqttLimits) -> None:
        self.all: dict[Connection, None] = {}
        self._bounds = bounds
        self._by_address: Counter[str] = Counter()
        self._strangers: Counter[str] = Counter()

    @property
    def strangers(self) -> int:
        return self._strangers.total()

    def add(self, connection: Connection) -> bool:
        """Counts it in any case; False: there is no room for it."""
        bounds, address = self._bounds, connection.address
        room = (
            len(self.all) < bounds.connections
            and self._by_address[address] < bounds.connections_per_address
            and self.strangers < bounds.strangers
            and self._strangers[address] < bounds.strangers_per_address
        )
        self.all[connection] = None
        self._by_address[address] += 1
        self._strangers[address] += 1
        return room

    def let_in(self, connection: Connection) -> None:
        _less(self._strangers, connection.address)

    def drop(self, connection: Connection) -> None:
        if connection in self.all:
            del self.all[connection]
            _less(self._by_address, connection.address)
            if connection.peer is None:
                _less(self._strangers, connection.address)


class Had:
    """Packet ids that devices had no PUBACK for when they left: what comes again under one was here before.

    None: that is not known, and every repeated message may have been.
    """

    def __init__(self) -> None:
        self._ids: OrderedDict[str, set[int] | None] = OrderedDict()

    def of(self, name: str) -> set[int] | None:
        return self._ids.get(name)

    def left(self, name: str, still: set[int] | None, unanswered: tuple[int, ...]) -> None:
        """`still`: what an earlier connection had, and this one did not send again."""
        had = (still or set()).union(unanswered)
        self._ids[name] = had if len(had) <= ENOUGH_IDS else None
        self._ids.move_to_end(name)
        if len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
