"""Counts connections, in all and by address, watches them, and remembers the unanswered packet ids of
devices that left."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable

from broker.mqtt.packets import Reason
from broker.mqtt.shell import Connection
from broker.settings import MqttLimits

LOOKED_AT_ONCE = 1_000  # connections that are checked in one turn of the loop
REMEMBERED, ENOUGH_IDS = 20_000, 1_000  # devices in `Had`, and packet ids of each


class Crowd:
    """`strangers`: connections that are not authenticated yet, also those in a TLS handshake."""

    def __init__(self, bounds: MqttLimits) -> None:
        self.all: dict[Connection, None] = {}
        self._bounds = bounds
        self._by_address: Counter[str] = Counter()
        self._strangers: Counter[str] = Counter()

    @property
    def strangers(self) -> int:
        return self._strangers.total()

    def knocks(self, address: str, *, many: bool) -> bool:
        """Counts a new connection until `answered`. False, and not counted, if there is no room.

        `many`: the address is a proxy, which has no bound of its own.
        """
        room = self._room(address, many=many)
        self._strangers[address] += room
        return room

    def answered(self, address: str) -> None:
        """The TLS handshake and the PROXY header of a connection are done, or failed."""
        _less(self._strangers, address)

    def add(self, connection: Connection) -> bool:
        """Counts a connection in any case. Returns False if there is no room for it."""
        room = self._room(connection.address)
        self.all[connection] = None
        self._by_address[connection.address] += 1
        self._strangers[connection.address] += 1
        return room

    def _room(self, address: str, *, many: bool = False) -> bool:
        bounds = self._bounds
        if len(self.all) >= bounds.connections or self.strangers >= bounds.strangers:
            return False
        return many or (
            self._by_address.get(address, 0) < bounds.connections_per_address
            and self._strangers.get(address, 0) < bounds.strangers_per_address
        )

    def let_in(self, connection: Connection) -> None:
        _less(self._strangers, connection.address)

    def drop(self, connection: Connection) -> None:
        if connection in self.all:
            del self.all[connection]
            _less(self._by_address, connection.address)
            if connection.peer is None:
                _less(self._strangers, connection.address)


class Watch:
    """Once a tick: closes silent and stalled connections, and those of services whose key was revoked."""

    def __init__(self, crowd: Crowd, bounds: MqttLimits, each_tick: Callable[[], None]) -> None:
        self._crowd = crowd
        self._bounds = bounds
        self._each_tick = each_tick
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Handle | None = None

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()

    def tick(self) -> None:
        self._each_tick()
        self._look(list(self._crowd.all))

    def _look(self, connections: list[Connection]) -> None:
        """Checks some connections now, and the rest in later turns of the loop."""
        now = self._loop.time()
        for connection in connections[-LOOKED_AT_ONCE:]:
            self._check(connection, now)
        del connections[-LOOKED_AT_ONCE:]
        if connections:
            self._next = self._loop.call_soon(self._look, connections)
        else:
            self._next = self._loop.call_later(self._bounds.tick_sec, self.tick)

    def _check(self, connection: Connection, now: float) -> None:
        session, peer = connection.session, connection.peer
        if session.state == "closed":
            connection.transport.abort()  # it had a tick of time to receive the last bytes
            return
        session.tick(now, read=connection.reading)
        if connection.stalled_at is not None and now >= connection.stalled_at + self._bounds.stalled_sec:
            session.close(Reason.QUOTA, "it does not read what it is sent")
        if peer is not None and peer.scope is not None and not peer.scope.valid():
            session.close(Reason.ADMINISTRATIVE, "its key was revoked")
        if session.effects or session.out:
            connection.flush()


class Had:
    """Packet ids without a PUBACK of devices that left. A message with one of them may be a duplicate.

    None instead of ids: they are not known, and every message with DUP may be a duplicate.
    """

    def __init__(self) -> None:
        self._ids: OrderedDict[str, set[int] | None] = OrderedDict()

    def of(self, name: str) -> set[int] | None:
        return self._ids.get(name)

    def left(self, name: str, still: set[int] | None, unanswered: tuple[int, ...]) -> None:
        """`still`: ids from earlier connections that this one did not send again."""
        had = (still or set()).union(unanswered)
        self._ids[name] = had if len(had) <= ENOUGH_IDS else None
        self._ids.move_to_end(name)
        if len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
