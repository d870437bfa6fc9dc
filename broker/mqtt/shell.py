"""asyncio around one session: its transport, when it is read, when it is given up.

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
    """Whom the connections belong to. It never writes to a transport itself."""

    def came(self, connection: Connection) -> bool:
        """False: there is no room for it."""
        ...

    def tell(self, connection: Connection, effect: Effect) -> None: ...

    def gone(self, connection: Connection) -> None: ...

    def slowed(self) -> None:
        """A client is not read for a while, because it says too much."""
        ...


class Connection(asyncio.Protocol):
    """One client's connection. `peer` is who it is, once it is let in.

    `arrival` numbers the CONNECTs as they came; `filters` are what it subscribed to, with the granted QoS;
    `routes` which topics lead to it. `had` are packet ids that an earlier connection of the same device had
    no PUBACK for; None: not known. `identify` says whom a client certificate names. `waiting_0` counts its
    QoS 0 messages that were not taken in yet.
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

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
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

    # --- what its owner calls ---

    def work(self) -> None:
        """Goes on with what came and could not be handled yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.held:
            self.session.work(self._loop.time())
        self.flush()

    def flush(self) -> None:
        """Tells what happened, sends what is to be said, and hangs up after the last of it."""
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
        else:
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
