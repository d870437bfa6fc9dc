"""The MQTT server for devices: connections, routing, presence, and the PUBACKs to devices.

It is a `Link` without another server behind it. A PUBACK to a device means that its message is durable.
Nothing is stored for clients that are not connected. It must never send a PUBACK before `puback` was called,
and never touch the state of a client id before its password was checked.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Literal, Protocol

import structlog

from broker.mqtt import packets as p
from broker.mqtt.access import Access, Peer, Refused, fits
from broker.mqtt.admission import Admission
from broker.mqtt.crowd import Crowd, Had, Watch
from broker.mqtt.packets import Publish, Reason
from broker.mqtt.routes import Routes, Subscriptions, message_of
from broker.mqtt.services import Services
from broker.mqtt.session import Closed, Effect, Taken
from broker.mqtt.shell import Connection
from broker.often import Often, shown
from broker.seams import LinkEvents, Message, Outgoing, Presence, Receipt
from broker.settings import MqttLimits

logger = structlog.get_logger()

Done = Callable[[Receipt], None]
MESSAGE_COST = 1_000  # bytes of memory that a waiting message takes beside its topic and payload


class Events(LinkEvents, Presence, Protocol):
    """The receiver of messages and of presence."""


class Listener:
    """`counts`: metrics by name. `unacknowledged`: bytes of memory of messages without our PUBACK."""

    up = False
    direct = True

    def __init__(self, access: Access, events: Events, services: Services, bounds: MqttLimits) -> None:
        self.bounds = bounds
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[int] = Counter()  # by reason code
        self.unacknowledged = 0
        self._events = events
        self.services = services
        self._loop = asyncio.get_running_loop()
        self._often = Often(self._loop.time)
        self.crowd = Crowd(bounds)
        self._had = Had()
        self.peers: dict[str, Connection] = {}
        self._routes = Routes()
        self._subscriptions = Subscriptions(self._routes, events, bounds.filters, self.peers, self._refused)
        self.admission = Admission(access, bounds)
        self._held, self._answered = dict[Connection, None](), dict[Connection, None]()
        self._arrivals = 0
        self._watch = Watch(self.crowd, bounds, self.admission.forget)

    # --- called by its owner ---

    @property
    def connected(self) -> int:  # devices
        return sum(":" not in name for name in self.peers)

    @property
    def connections(self) -> int:
        return len(self.crowd.all)

    def connection(self, address: str | None = None, certified: str | None = None) -> Connection:
        """The protocol for a new connection."""
        return Connection(self, self.bounds, address=address, certified=certified)

    def start(self) -> None:
        self.up = True
        self._watch.tick()
        self._events.link_up()

    async def close(self) -> None:
        """Disconnects all clients. No event is reported any more."""
        self.up = False
        self._watch.stop()
        await self.admission.close()
        await self.services.close()
        for connection in list(self.crowd.all):
            connection.session.close(Reason.SHUTTING_DOWN, "the server is shutting down")
            connection.flush()
        deadline = self._loop.time() + self.bounds.close_within_sec
        while self.crowd.all and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for connection in list(self.crowd.all):
            connection.transport.abort()
        await asyncio.sleep(0)  # asyncio calls connection_lost in the next turn

    def disconnect(self, hardware_id: str, why: str = "its token is not valid any more") -> None:
        """Ends a device's connection, and refuses one whose token was checked before it became invalid."""
        self.admission.bar(hardware_id)
        connection = self.peers.get(hardware_id)
        if connection is not None:
            self._end(connection, Reason.ADMINISTRATIVE, why)

    def regrouped(self, hardware_id: str) -> None:
        """A gateway has other topics now. If it is just being let in, it is refused, and comes again."""
        self.admission.bar(hardware_id)
        connection = self.peers.get(hardware_id)
        if connection is not None and connection.peer is not None:
            old, connection.peer = connection.peer, self.admission.peer(hardware_id)
            self._subscriptions.renew(connection, connection.peer, old)

    # --- the link ---

    def listens(self, topic: str) -> bool:
        """Whether a device is subscribed to this topic."""
        return topic in self._routes

    def publish(self, outgoing: Outgoing, done: Done) -> bool:
        if not self.up:
            return False
        topic = outgoing.topic
        connection = self._routes.get(topic)
        if connection is None or connection.session.state != "open":
            heard = self.services.pass_on(outgoing)
            self._loop.call_soon(done, Receipt(written=heard, reason=0 if heard else Reason.NO_SUBSCRIBER))
            return True
        message = message_of(outgoing, connection.routes[topic], connection.session.version)
        now = self._loop.time()
        expires_at = None if outgoing.expiry_sec is None else now + outgoing.expiry_sec
        outcome = connection.session.publish(message, done, now, expires_at)
        if outcome == "too large":
            self._loop.call_soon(done, Receipt(written=False, reason=Reason.TOO_LARGE))
        elif outcome == "full":
            self._loop.call_soon(done, Receipt(written=False, reason=Reason.QUOTA))
        else:
            self.counts["sent"] += 1
            if not message.qos:
                self._loop.call_soon(done, Receipt(written=True, reason=None))
            connection.flush()
        return True

    def puback(self, message: Message, reason: int = Reason.SUCCESS, text: str = "") -> None:
        if message.token is None:
            return
        connection, packet_id, size = message.token
        self.unacknowledged -= size
        if packet_id:
            connection.session.acknowledge(packet_id, reason, text)
            if not self._answered:
                self._loop.call_soon(self._send_answers)
            self._answered[connection] = None
        else:
            connection.waiting_0 -= 1
        if self._held and self.unacknowledged < self.bounds.unacknowledged_bytes // 2:
            held, self._held = list(self._held), {}
            for each in held:
                each.held = False
                self._loop.call_soon(each.work)

    def _send_answers(self) -> None:
        """Sends the PUBACKs of one commit: one write, and one system call, for each connection."""
        answered, self._answered = self._answered, {}
        for connection in answered:
            if connection.session.paused:
                connection.work()
            else:
                connection.flush()

    # --- called by the sockets and connections ---

    def knocks(self, address: str, *, many: bool) -> bool:
        """Whether there is room for a new connection, before its TLS handshake. See `Crowd.knocks`."""
        return self.crowd.knocks(address, many=many) or self._turn_away(address)

    def came(self, connection: Connection) -> bool:
        return (self.crowd.add(connection) and self.up) or self._turn_away(connection.address)

    def _turn_away(self, address: str) -> Literal[False]:
        self.counts["turned_away"] += 1
        self._log("mqtt.turned_away", address=address, connections=self.connections)
        return False

    def gone(self, connection: Connection) -> None:
        self.crowd.drop(connection)
        self.admission.left(connection)
        self._held.pop(connection, None)

    def slowed(self) -> None:
        self.counts["slowed"] += 1

    def tell(self, connection: Connection, effect: Effect) -> None:
        if isinstance(effect, Publish):
            self._said(connection, effect)
        elif isinstance(effect, Taken):
            self._taken(connection, effect)
        elif isinstance(effect, p.Subscribe):
            connection.session.granted(effect, self._subscribe(connection, effect))
        elif isinstance(effect, p.Unsubscribe):
            connection.session.granted(effect, self._unsubscribe(connection, effect))
        elif isinstance(effect, p.Connect):
            self._arrivals += 1
            connection.arrival = self._arrivals
            self.admission.begin(connection, effect, self.peers, self._judged)
        else:
            self._closed(connection, effect)

    # --- CONNECT ---

    def _judged(self, connection: Connection, connect: p.Connect, verdict: Peer | Refused) -> None:
        if connection.session.state != "judged":
            return
        if connection.barred:
            why = "its token or its topics have changed; connect again"
            verdict = Refused(Reason.ADMINISTRATIVE, why)
        if isinstance(verdict, Refused):
            self._refuse(connection, connect, verdict)
        else:
            self._let_in(connection, connect, verdict)

    def _refuse(self, connection: Connection, connect: p.Connect, verdict: Refused) -> None:
        self._log(
            "mqtt.refused",
            why=verdict.exact or verdict.text,
            reason=f"0x{verdict.reason:02x}",
            client_id=shown(connect.client_id),
            user=shown(connect.user),
            address=connection.address,
        )
        connection.session.refuse(verdict.reason, verdict.text)
        connection.flush()

    def _let_in(self, connection: Connection, connect: p.Connect, peer: Peer) -> None:
        old = self.peers.get(peer.name)
        if old is not None and old.arrival > connection.arrival:
            self._refuse(connection, connect, Refused(Reason.TAKEN_OVER, "a later connection has this name"))
            return
        if old is not None:
            self.counts["taken_over"] += 1
            self._end(old, Reason.TAKEN_OVER, "another connection came with this client id")
        connection.peer = peer
        self.peers[peer.name] = connection
        self.crowd.let_in(connection)
        service = peer.scope is not None
        assigned = None if connect.client_id else peer.name.rpartition(":")[2]
        if not service:
            connection.had = self._had.of(peer.name)
        self.counts["let_in"] += 1
        connection.session.accept(self._loop.time(), assigned_id=assigned, shared=service)
        connection.flush()

    # --- messages ---

    def _said(self, connection: Connection, publish: Publish) -> None:
        peer = connection.peer
        assert peer is not None
        if peer.scope is not None:
            self.counts["discarded"] += 1  # a service may only subscribe
            connection.session.acknowledge(publish.packet_id)
            return
        if publish.topic not in peer.answers and any(fits(each, publish.topic) for each in peer.others):
            self.counts["discarded"] += 1  # its own topic, which nobody reads
            connection.session.acknowledge(publish.packet_id)
            return
        had, packet_id, dup = connection.had, publish.packet_id, publish.dup
        if dup and had is not None:
            dup = packet_id in had
        if had and packet_id in had:
            had.discard(packet_id)
        if not packet_id:
            full = self.unacknowledged > self.bounds.unacknowledged_bytes
            if full or connection.waiting_0 >= self.bounds.unacknowledged:
                self._drop(connection, publish)
                return
            connection.waiting_0 += 1
        size = len(publish.payload) + len(publish.topic) + MESSAGE_COST
        self.unacknowledged += size
        foreign = None if publish.topic in peer.answers else peer.name
        if foreign is not None:
            self.counts["denied"] += 1
            self._deny(connection, "publish", publish.topic)
        self._events.message(
            Message(
                topic=publish.topic,
                payload=publish.payload,
                qos=publish.qos,
                dup=dup,
                correlation=publish.properties.get("correlation") if publish.properties else None,
                token=(connection, packet_id, size),
                foreign=foreign,
            )
        )
        if self.unacknowledged > self.bounds.unacknowledged_bytes and not connection.held:
            self.counts["held"] += 1
            connection.held = True
            self._held[connection] = None

    def _drop(self, connection: Connection, publish: Publish) -> None:
        self.counts["dropped_qos_0"] += 1
        connection.dropped += 1
        if connection.dropped == 1:
            self._log("mqtt.qos0_dropped", peer=self._name(connection), topic=shown(publish.topic))

    def _deny(self, connection: Connection, action: str, topic: str) -> None:
        """Logs one line per connection, because a client can cause it often."""
        if not connection.denied:
            connection.denied = True
            peer, where = self._name(connection), connection.address
            self._log("mqtt.denied", peer=peer, action=action, topic=shown(topic), address=where)

    def _taken(self, connection: Connection, taken: Taken) -> None:
        reason = taken.reason
        if reason is not None and reason >= Reason.UNSPECIFIED:
            # The device refused the message, not the MQTT server.
            self.counts["refused_by_device"] += 1
            why = f"0x{reason:02x} {shown(taken.text)}".strip()
            self._log("mqtt.device_refused", peer=self._name(connection), why=why)
            reason = Reason.UNSPECIFIED
        elif reason is not None:
            reason = Reason.SUCCESS
        try:
            taken.tag(Receipt(written=True, reason=reason))
        except Exception:
            logger.exception("mqtt.receipt_failed", peer=self._name(connection))

    # --- subscriptions ---

    def _subscribe(self, connection: Connection, packet: p.Subscribe) -> list[int]:
        peer = connection.peer
        assert peer is not None
        if peer.scope is not None:
            return self.services.subscribe(connection, packet, self._log)
        if "subscription_id" in packet.properties:
            connection.session.close(Reason.NO_SUBSCRIPTION_IDS, "there are no subscription identifiers")
            return []
        return self._subscriptions.subscribe(connection, peer, packet.filters)

    def _refused(self, connection: Connection, topic: str) -> None:
        self.counts["denied"] += 1
        self._deny(connection, "subscribe", topic)

    def _unsubscribe(self, connection: Connection, packet: p.Unsubscribe) -> list[int]:
        peer = connection.peer
        assert peer is not None
        if peer.scope is not None:
            return self.services.unsubscribe(connection, packet.topics)
        return self._subscriptions.unsubscribe(connection, peer, packet.topics)

    # --- the end ---

    def _end(self, connection: Connection, reason: int, why: str) -> None:
        connection.session.close(reason, why)
        connection.flush()

    def _closed(self, connection: Connection, closed: Closed) -> None:
        if closed.by_us:
            self.refusals[closed.reason] += 1
        peer = connection.peer
        if peer is None:
            if closed.by_us and not connection.arrival:
                self._log("mqtt.not_mqtt", address=connection.address, why=closed.text)
            return
        if closed.by_us and self.up:
            code = f"0x{closed.reason:02x}"
            self._log("mqtt.closed", peer=self._name(connection), reason=code, why=closed.text)
        if self.peers.get(peer.name) is connection:
            del self.peers[peer.name]
        if peer.scope is not None:
            self.services.left(connection)
            return
        self._had.left(peer.name, connection.had, closed.unanswered)
        if connection.dropped:
            self._log("mqtt.qos0_lost", peer=self._name(connection), messages=connection.dropped)
        left, will = self._routes.drop(connection, peer), connection.session.will
        if not self.up:
            return
        for name in left:
            self._events.device_offline(name)
        if closed.will and will is not None:
            self._events.message(Message(topic=will.topic, payload=will.payload, qos=will.qos, token=None))

    def _name(self, connection: Connection) -> str:
        return connection.peer.name if connection.peer is not None else connection.address

    def _log(self, event: str, **fields: object) -> None:
        self._often.warn(event, fields)
