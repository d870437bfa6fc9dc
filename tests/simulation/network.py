"""A simulated MQTT server and the connections to it; each fault can be switched on and off.

QoS 1 in both directions, with the errors of an unreliable network. The server never calls a node's code
directly: each client gets its calls through an inbox. Messages on the wire outlive the process that sent
them.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from broker.seams import Message, Outgoing, Presence
from tests.simulation.history import History
from tests.simulation.loop import SimLoop

if TYPE_CHECKING:
    from tests.simulation.link import Client

_Call = tuple[Callable[..., object], tuple[Any, ...]]
NO_SUBSCRIBER = 0x10
LATEST_WILL_SEC = 40


class ServerKind(msgspec.Struct, frozen=True, kw_only=True):
    """The behaviour of one MQTT server product; the hazards in choices.md describe it."""

    name: str
    mqtt5: bool = False
    retains: bool = True
    keeps_sessions: bool = True
    redeliver_after_sec: float | None = None
    queue_limit: int = 100_000


EMBEDDED = ServerKind(name="embedded", retains=False, keeps_sessions=False)
MOSQUITTO = ServerKind(name="mosquitto", mqtt5=True)
OLD_MOSQUITTO = ServerKind(name="mosquitto with its defaults", queue_limit=1000)
NATS = ServerKind(name="nats", redeliver_after_sec=5)


class Faults(msgspec.Struct, kw_only=True):
    """Probabilities per message. The simulation changes them during a run. The default has no faults."""

    latency_sec: tuple[float, float] = (0.0005, 0.02)
    duplicate: float = 0.0
    late: float = 0.0
    late_sec: tuple[float, float] = (1.0, 120.0)
    lose_while_away: float = 0.0
    reorder_topics: bool = False


class Inbox:
    """Queues calls into one node, in order. Each call is a handle of that node, so a dead node receives
    none."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._context = contextvars.copy_context()
        self._calls: deque[_Call] = deque()

    def post(self, call: Callable[..., object], *args: Any) -> None:
        self._calls.append((call, args))
        self._loop.call_soon(self._take, context=self._context)

    def later(self, delay: float, call: Callable[..., object], *args: Any) -> None:
        self._loop.call_later(delay, call, *args, context=self._context)

    def _take(self) -> None:
        call, args = self._calls.popleft()
        call(*args)


class Pipe:
    """One direction of one connection. Messages arrive after a delay, in order; with `reorder_topics` in
    order per topic."""

    def __init__(self, server: SimMqttServer) -> None:
        self.slow = 1.0
        self.deaf = False
        self._server = server
        self._queues: dict[str, tuple[list[float], deque[_Call]]] = {}

    def send(self, topic: str, arrive: Callable[..., object], *args: Any) -> None:
        if self.deaf:
            return
        server, faults = self._server, self._server.faults
        delay = self.slow * server.random.uniform(*faults.latency_sec)
        may_be_late = topic and topic not in server.in_time and "/evt/" not in topic
        if may_be_late and faults.late and server.random.random() < faults.late:
            # Later messages overtake this one, as they overtake a copy that waited in a queue on the way.
            delay += server.random.uniform(*faults.late_sec)
            server.loop.call_later(delay, arrive, *args, context=server.world)
            return
        last, queue = self._queues.setdefault(topic if faults.reorder_topics else "", ([0.0], deque()))
        queue.append((arrive, args))
        last[0] = max(last[0], server.loop.time() + delay)
        server.loop.call_at(last[0], self._arrive, queue, context=server.world)

    def lose_what_is_under_way(self) -> None:
        for _, queue in self._queues.values():
            queue.clear()
        self._queues.clear()

    def _arrive(self, queue: deque[_Call]) -> None:
        # Take the oldest entry, whichever handle runs first: handles that are due at once run in random
        # order.
        if queue:
            arrive, args = queue.popleft()
            arrive(*args)


class Routed(Message, frozen=True, kw_only=True):
    """A message as the server passes it on. `origin`: the command id that its sender named; for the history
    only, because without MQTT 5 a bare message does not carry it."""

    origin: bytes | None = None


class _Waiting(msgspec.Struct):
    """A message on its way from the server to one client."""

    message: Message
    dies_at: float | None


class _Session:
    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.filters: tuple[str, ...] = ()
        self.queue: deque[_Waiting] = deque()
        self.in_flight: dict[int, _Waiting] = {}
        self.next_mid = 0
        self.connection: Connection | None = None


class Connection:
    """One TCP connection, shared by the server and the client."""

    def __init__(self, server: SimMqttServer, client: Client, session: _Session) -> None:
        self.server = server
        self.client = client
        self.session = session
        self.to_server = Pipe(server)
        self.to_client = Pipe(server)
        self.open = True

    def close(self, why: str, *, graceful: bool = False) -> None:
        """Closes the connection for both sides at once. Data that the client sent may still arrive, without
        an answer."""
        if not self.open:
            return
        self.open = False
        if not graceful and self.server.random.random() < 0.5:
            self.to_server.lose_what_is_under_way()
        self.to_client.lose_what_is_under_way()
        self.to_server.deaf = self.to_client.deaf = True
        self.server.closed(self, graceful)
        self.client.inbox.post(self.client.lost, self, why)

    def hand_over(self, message: Message) -> None:
        if self.open:
            self.client.inbox.post(self.client.message, message)

    def go_half_open(self, noticed_after_sec: float) -> None:
        """Drops all data of both sides until the keepalive timeout closes the connection."""
        self.to_server.deaf = self.to_client.deaf = True
        loop = self.server.loop
        loop.call_later(noticed_after_sec, self.close, "keepalive", context=self.server.world)


class SimMqttServer:
    """Sessions, subscriptions, retained messages and wills, as a server of this kind handles them."""

    def __init__(
        self, loop: SimLoop, kind: ServerKind, *, history: History | None = None, faults: Faults | None = None
    ) -> None:
        self.loop = loop
        self.kind = kind
        self.history = history
        self.faults = faults or Faults()
        self.random = loop.rng(f"network/{kind.name}")
        self.world = contextvars.Context()  # data on the wire belongs to no node and outlives every node
        self.up = True
        self.refuse: Callable[[str, Outgoing], int | None] = lambda client_id, outgoing: None
        # Topics without late delivery: an answer without id that is minutes late looks like a new answer.
        self.in_time: set[str] = set()
        self.sessions: dict[str, _Session] = {}
        self.retained: dict[str, bytes] = {}
        self._presence: tuple[Presence, Inbox] | None = None

    def tell(self, presence: Presence) -> None:
        """Reports connects and disconnects of devices, like the embedded server. The report ends with the
        calling node."""
        self._presence = presence, Inbox(self.loop)

    def connection(self, client_id: str) -> Connection | None:
        """The open connection of a client. Faults use its `close` and `go_half_open`, and the `slow` of its
        pipes."""
        session = self.sessions.get(client_id)
        return session.connection if session else None

    def restart(self, sessions: Literal["kept", "emptied", "lost"], down_for_sec: float) -> None:
        """Restarts the server. `emptied`: sessions survive but lose their acknowledged messages (an old
        snapshot)."""
        self.up = False
        for session in list(self.sessions.values()):
            if session.connection:
                session.connection.close("the server went down")
        if sessions != "kept":
            self.retained.clear()
            for session in self.sessions.values():
                session.queue.clear()
                session.in_flight.clear()
        if sessions == "lost":
            self.sessions.clear()
        self.loop.call_later(down_for_sec, setattr, self, "up", True, context=self.world)

    def accept(self, client: Client) -> Connection | None:
        if not self.up:
            return None
        old = self.sessions.get(client.client_id)
        if old and old.connection:
            old.connection.close("taken over")
        session = self.sessions.get(client.client_id)
        if session is None or client.clean or not self.kind.keeps_sessions:
            session = self.sessions[client.client_id] = _Session(client.client_id)
        connection = session.connection = Connection(self, client, session)
        resent = [*session.in_flight.values(), *session.queue]
        first_again = len(session.in_flight)
        session.in_flight.clear()
        session.queue.clear()
        # the server may send queued messages before the SUBACK or after it
        early = self.random.random() < 0.5
        if early:
            self._resend(session, resent, first_again)
        connection.to_client.send("", client.inbox.post, client.connected, connection)
        if not early:
            self._resend(session, resent, first_again)
        if client.subscribes_at_once:
            self.subscribed(connection)
        return connection

    def subscribed(self, connection: Connection) -> None:
        """Handles a SUBSCRIBE to all topics of the client."""
        session, client = connection.session, connection.client
        if session.connection is not connection:
            return
        session.filters = client.subscriptions
        for topic, payload in self.retained.items():
            if any(_matches(filter_, topic) for filter_ in session.filters):
                self._deliver(session, _Waiting(Message(topic=topic, payload=payload, retain=True), None))
        self._tell_presence(client, online=True)

    def closed(self, connection: Connection, graceful: bool) -> None:
        session, client = connection.session, connection.client
        if session.connection is connection:
            session.connection = None
            if (client.clean or not self.kind.keeps_sessions) and self.sessions.get(
                client.client_id
            ) is session:
                del self.sessions[client.client_id]
        self._tell_presence(client, online=False)
        if client.will is not None and not graceful:
            will = Outgoing(topic=client.will[0], payload=client.will[1])
            # A server may notice a dead connection long after its device has come back. Only a will that
            # names its session can be told from a true one then.
            late = client.is_device and will.payload[:1] == b"{" and self.random.random() < 0.5
            delay = self.random.uniform(0, LATEST_WILL_SEC) if late else 0
            self.loop.call_later(delay, self._route, will, True, context=self.world)

    def received(self, connection: Connection, mid: int, outgoing: Outgoing, retain: bool) -> None:
        """Handles a PUBLISH. Its PUBACK may still be lost on the way to the sender."""
        if not self.up:
            return
        if self.history is not None and "/evt/" in outgoing.topic:
            self.history.told(outgoing.payload)
        reason = self.refuse(connection.client.client_id, outgoing) if self.kind.mqtt5 else None
        if reason is None:
            matched = self._route(outgoing, retain)
            reason = NO_SUBSCRIBER if self.kind.mqtt5 and not matched else 0
        connection.to_client.send("", connection.client.inbox.post, connection.client.receipt, mid, reason)

    def acknowledged(self, connection: Connection, mid: int) -> None:
        if connection.session.connection is connection:
            connection.session.in_flight.pop(mid, None)

    def _route(self, outgoing: Outgoing, retain: bool) -> int:
        if not self.up:
            return 0
        if retain and self.kind.retains:
            self.retained[outgoing.topic] = outgoing.payload
        correlation = outgoing.correlation if self.kind.mqtt5 else None
        message = Routed(
            topic=outgoing.topic,
            payload=outgoing.payload,
            correlation=correlation,
            origin=outgoing.correlation,
        )
        expiry = outgoing.expiry_sec if self.kind.mqtt5 else None
        dies_at = None if expiry is None else self.loop.time() + expiry
        matched = 0
        for session in list(self.sessions.values()):
            if any(_matches(filter_, outgoing.topic) for filter_ in session.filters):
                matched += 1
                self._deliver(session, _Waiting(message, dies_at))
        return matched

    def _deliver(self, session: _Session, waiting: _Waiting, *, again: bool = False) -> None:
        if session.connection is None:
            lost = self.faults.lose_while_away and self.random.random() < self.faults.lose_while_away
            if not lost and len(session.queue) < self.kind.queue_limit:
                session.queue.append(waiting)
            return
        if waiting.dies_at is not None and waiting.dies_at <= self.loop.time():
            return
        session.next_mid += 1
        mid = session.next_mid
        session.in_flight[mid] = waiting
        self._send(session.connection, mid, waiting, again)
        if self.faults.duplicate and self.random.random() < self.faults.duplicate:
            self._send(session.connection, mid, waiting, True)
        if self.kind.redeliver_after_sec is not None:
            self._redeliver_later(session.connection, mid)

    def _send(self, connection: Connection, mid: int, waiting: _Waiting, dup: bool) -> None:
        message = msgspec.structs.replace(waiting.message, dup=dup, token=(connection, mid))
        connection.to_client.send(message.topic, connection.hand_over, message)

    def _redeliver_later(self, connection: Connection, mid: int) -> None:
        delay = self.kind.redeliver_after_sec or 0.0
        self.loop.call_later(delay, self._redeliver, connection, mid, context=self.world)

    def _redeliver(self, connection: Connection, mid: int) -> None:
        waiting = connection.session.in_flight.get(mid)
        if connection.open and waiting is not None:
            self._send(connection, mid, waiting, True)
            self._redeliver_later(connection, mid)

    def _resend(self, session: _Session, messages: list[_Waiting], first_again: int) -> None:
        for index, waiting in enumerate(messages):
            self._deliver(session, waiting, again=index < first_again)

    def _tell_presence(self, client: Client, *, online: bool) -> None:
        if self._presence is not None and client.is_device:
            presence, inbox = self._presence
            inbox.post(presence.device_online if online else presence.device_offline, client.client_id)


def _matches(filter_: str, topic: str) -> bool:
    if filter_ == topic:
        return True
    wanted, found = filter_.split("/"), topic.split("/")
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(found) or part not in ("+", found[index]):
            return False
    return len(wanted) == len(found)
