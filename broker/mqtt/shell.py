"""The asyncio protocol around one session: it reads, pauses, writes and closes its transport.

It passes bytes and effects on and decides nothing. The transport may be TCP, TLS, a WebSocket, or a
simulated pipe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

from broker.mqtt.access import Peer
from broker.mqtt.session import Effect, Session
from broker.settings import MqttLimits


class Owner(Protocol):
    """The owner of the connections. It never writes to a transport itself."""

    def came(self, connection: Connection) -> bool:
        """Returns False if there is no room for it."""
        ...

    def tell(self, connection: Connection, effect: Effect) -> None: ...

    def gone(self, connection: Connection) -> None: ...

    def slowed(self) -> None:
        """A client is not read for a while, because it is over its rate."""
        ...


class Connection(asyncio.Protocol):
    """The connection of one client. `peer`: the client, once it is authenticated.

    `arrival`: the number of its CONNECT. `filters`: its subscriptions, with the granted QoS. `routes`: the
    topics that are delivered to it. `had`: packet ids without a PUBACK from earlier connections of the
    device; None if not known. `identify` returns the name in a client certificate. `waiting_0`: the number
    of its QoS 0 messages that the intake has not taken. `held`: not read, because too many bytes of all
    clients wait for the log. `dropped`: the number of its QoS 0 messages that were dropped.
    """

    __slots__ = (
        "_loop", "_owner", "_reading", "_timer", "address", "arrival", "barred", "certified", "denied",
        "dropped", "filters", "had", "held", "identify", "peer", "routes", "session", "stalled_at",
        "transport", "waiting_0",
    )  # fmt: skip

    def __init__(
        self, owner: Owner, limits: MqttLimits, *, address: str | None = None, certified: str | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._reading = True
        self._timer: asyncio.TimerHandle | None = None
        self.address = address or ""
        self.certified = certified
        self.identify: Callable[[dict[str, Any]], str | None] = lambda certificate: None
        self.session = Session(limits, self._loop.time())
        self.transport: asyncio.Transport
        self.peer: Peer | None = None
        self.arrival = 0
        self.barred = False
        self.denied = False
        self.held = False
        self.dropped = 0
        self.waiting_0 = 0
        self.stalled_at: float | None = None
        self.filters: dict[str, int] = {}
        self.routes: dict[str, int] = {}
        self.had: set[int] | None = None

    @property
    def reading(self) -> bool:
        """Whether the transport is read."""
        return self._reading

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's classes do not inherit from asyncio's
        if not self.address:
            peer = transport.get_extra_info("peername")
            self.address = str(peer[0]) if isinstance(peer, tuple) else "local"
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.certified = self.identify(certificate)
        if not self._owner.came(self):
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.session.receive(data, self._loop.time())
        self.flush()

    def pause_writing(self) -> None:
        self.stalled_at = self._loop.time()
        self._pace()

    def resume_writing(self) -> None:
        self.stalled_at = None
        self._pace()

    def connection_lost(self, error: Exception | None) -> None:
        self.session.lost()
        self.flush()
        self._owner.gone(self)

    # --- called by its owner ---

    def work(self) -> None:
        """Handles received packets that had to wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.held:
            self.session.work(self._loop.time())
        self.flush()

    def flush(self) -> None:
        """Reports the effects, writes the output, and closes the transport if the session is closed."""
        session = self.session
        while session.effects:
            effects, session.effects = session.effects, []
            for effect in effects:
                self._owner.tell(self, effect)
        if session.out:
            data = b"".join(session.out)
            session.out.clear()
            if not self.transport.is_closing():
                self.transport.write(data)
        if session.state == "closed":
            self.transport.close()
        elif session.paused or self.held or not self._reading:
            self._pace()

    def _pace(self) -> None:
        session = self.session
        reading = not session.paused and self.stalled_at is None and not self.held
        if reading is not self._reading and not self.transport.is_closing():
            self._reading = reading
            if reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()
        if session.resume_at is not None and self._timer is None and not self.held:
            self._owner.slowed()
            self._timer = self._loop.call_at(session.resume_at, self._resume)

    def _resume(self) -> None:
        self._timer = None
        if self.session.state != "closed":
            self.work()
