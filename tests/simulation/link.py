"""The broker's link to the simulated MQTT server, and a device's port.

Both only carry messages and record them in the history at the moment they cross the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from broker.seams import LinkEvents, Message, Outgoing, Receipt
from tests.simulation.loop import current_node
from tests.simulation.network import Connection, Inbox, Routed, SimMqttServer

Done = Callable[[Receipt], None]
SUBSCRIBES_LATE_SEC = 0.05


class Client:
    """The common part of the broker's link and a device's port. It belongs to the node that creates it."""

    is_device = False

    def __init__(self, server: SimMqttServer, client_id: str, subscriptions: tuple[str, ...]) -> None:
        self.server = server
        self.client_id = client_id
        self.subscriptions = subscriptions
        self.clean = True
        self.subscribes_at_once = True
        self.will: tuple[str, bytes] | None = None
        self.dials: Callable[[], object] = lambda: None
        self.inbox = Inbox(server.loop)
        self._wanted = False
        self._connection: Connection | None = None
        self._up = False
        self._mid = 0
        self._pending: dict[int, Done] = {}
        node = current_node()
        if node is not None:
            node.on_kill.append(self._die)

    @property
    def up(self) -> bool:
        return self._up

    def connected(self, connection: Connection) -> None:
        if connection is self._connection:
            self._up = True
            self.came_up()

    def lost(self, connection: Connection, why: str) -> None:
        if connection is not self._connection:
            return
        self._connection, self._up = None, False
        pending, self._pending = self._pending, {}
        for done in pending.values():
            done(Receipt(written=True, reason=None))
        self.went_down(why)
        if self._wanted:
            self.inbox.later(self.server.random.uniform(0.1, 5.0), self._dial)

    def receipt(self, mid: int, reason: int) -> None:
        done = self._pending.pop(mid, None)
        if done is not None:
            done(Receipt(written=True, reason=reason))

    def came_up(self) -> None: ...

    def went_down(self, why: str) -> None: ...

    def message(self, message: Message) -> None: ...

    def _dial(self) -> None:
        if self._wanted and self._connection is None:
            self.dials()
            self._connection = self.server.accept(self)
            if self._connection is None:
                self.inbox.later(self.server.random.uniform(0.1, 5.0), self._dial)

    def _write(self, outgoing: Outgoing, retain: bool, done: Done) -> bool:
        connection = self._connection
        if connection is None or not self._up:
            return False
        self._mid += 1
        self._pending[self._mid] = done
        arrive, server = self.server.received, self.server
        connection.to_server.send(outgoing.topic, arrive, connection, self._mid, outgoing, retain)
        if server.faults.duplicate and server.random.random() < server.faults.duplicate:
            connection.to_server.send(outgoing.topic, arrive, connection, self._mid, outgoing, retain)
        return True

    def _acknowledge(self, message: Message) -> None:
        connection, mid = message.token
        mine = self._connection
        if mine is not None and connection is mine:
            mine.to_server.send("", self.server.acknowledged, mine, mid)

    def _record(self, what: Literal["delivery", "puback", "reached"], message: Message) -> None:
        history = self.server.history
        if history is not None:
            named = message.correlation
            if what == "reached" and isinstance(message, Routed):
                named = message.origin
            history.on_wire(what, message.topic, message.payload, named, message.retain)

    def _hang_up(self) -> None:
        self._wanted = False
        if self._connection is not None:
            self._connection.close("closed by us", graceful=True)

    def _die(self) -> None:
        self._wanted = False
        if self._connection is not None:
            self._connection.close("its process died")


class SimLink(Client):
    """`broker.seams.Link`: records every publish, delivery and PUBACK of the broker in the history."""

    direct = False

    def __init__(
        self,
        server: SimMqttServer,
        events: LinkEvents,
        subscriptions: tuple[str, ...],
        *,
        client_id: str = "ordain",
    ) -> None:
        super().__init__(server, client_id, subscriptions)
        self.clean = not server.kind.keeps_sessions
        self.unanswered, self.most = 0, 100  # commands without their PUBACK
        self._events = events
        self._closed = asyncio.Event()
        self._linked(False)

    async def run(self) -> None:
        """Holds the connection until closed or cancelled."""
        self._wanted = True
        self.inbox.later(self.server.random.uniform(0.001, 0.05), self._dial)
        try:
            await self._closed.wait()
        finally:
            self._hang_up()

    def close(self) -> None:
        self._closed.set()

    def publish(self, outgoing: Outgoing, done: Done) -> bool:
        def heard(receipt: Receipt) -> None:
            if outgoing.correlation is not None:
                self.unanswered -= 1
                if receipt.reason == 0:
                    self._tell("accepted", outgoing)
            done(receipt)

        if not self._write(outgoing, False, heard):
            return False
        if outgoing.correlation is None:  # an event, for whom it may concern
            return True
        self._tell("publish", outgoing)
        self.unanswered += 1
        if self.server.history is not None:
            self.server.history.bound("send slots", self.unanswered, self.most)
        return True

    def _tell(self, what: Literal["publish", "accepted"], outgoing: Outgoing) -> None:
        attempt = next((int(value) for key, value in outgoing.user_properties if key == "attempt"), None)
        if self.server.history is not None:
            self.server.history.on_wire(
                what, outgoing.topic, outgoing.payload, outgoing.correlation, attempt=attempt
            )

    def _linked(self, up: bool) -> None:
        if self.server.history is not None:
            self.server.history.linked(up)

    def listens(self, topic: str) -> bool:
        return True

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        if message.token[0] is self._connection:  # otherwise nothing is sent
            self._record("puback", message)
        self._acknowledge(message)

    def came_up(self) -> None:
        self._linked(True)
        self._events.link_up()

    def went_down(self, why: str) -> None:
        self._linked(False)
        self._events.link_down(why)

    def message(self, message: Message) -> None:
        self._record("delivery", message)
        self._events.message(message)


class SimDevicePort(Client):
    """A device's connection to the MQTT server. It reconnects by itself until `disconnect` is called."""

    is_device = True

    def __init__(self, server: SimMqttServer, hardware_id: str, subscriptions: tuple[str, ...]) -> None:
        super().__init__(server, hardware_id, subscriptions)
        self._on_message: Callable[[Message], object] = lambda message: None
        self._on_up: Callable[[], object] = lambda: None
        self._on_down: Callable[[str], object] = lambda why: None

    def connect(
        self,
        on_message: Callable[[Message], object],
        *,
        on_up: Callable[[], object] = lambda: None,
        on_down: Callable[[str], object] = lambda why: None,
        will: tuple[str, bytes] | None = None,
        clean: bool = True,
    ) -> None:
        """Connects. The port sends a PUBACK for each message when `on_message` has returned."""
        self._on_message, self._on_up, self._on_down = on_message, on_up, on_down
        self.will, self.clean, self._wanted = will, clean, True
        self.inbox.later(self.server.random.uniform(0.001, 0.05), self._dial)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, done: Done = lambda receipt: None
    ) -> bool:
        return self._write(Outgoing(topic=topic, payload=payload), retain, done)

    def drop(self) -> None:
        """Breaks the connection. The port connects again by itself."""
        if self._connection is not None:
            self._connection.close("the device dropped it")

    def disconnect(self) -> None:
        """Disconnects cleanly, so that no will is sent. For broken connections see
        `SimMqttServer.connection`."""
        self._hang_up()

    def came_up(self) -> None:
        self._on_up()
        if not self.subscribes_at_once:
            self.inbox.later(SUBSCRIBES_LATE_SEC, self.subscribe, self._connection)

    def subscribe(self, connection: Connection | None) -> None:
        if connection is not None and connection is self._connection:
            connection.to_server.send("", self.server.subscribed, connection)

    def went_down(self, why: str) -> None:
        self._on_down(why)

    def message(self, message: Message) -> None:
        self._record("reached", message)
        self._on_message(message)
        self._acknowledge(message)
