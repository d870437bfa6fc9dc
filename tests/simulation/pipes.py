"""The real listener on simulated pipes: bytes cut anywhere and delayed, half-open connections, real tokens.

A pipe looks at the bytes that pass it, on both sides, tells the history what was said, and notes what no
server may do: `found` holds that as sentences that begin with M1 to M5.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

from broker.core import Core
from broker.mqtt import packets as p
from broker.mqtt.access import Access
from broker.mqtt.codec import Splitter, decode, encode
from broker.mqtt.listener import Listener
from broker.mqtt.packets import Packet, Publish
from broker.mqtt.services import Services
from broker.mqtt.shell import Connection as Shell
from broker.seams import Message, Outgoing, Receipt
from broker.settings import MqttLimits
from tests.simulation.history import History
from tests.simulation.link import Client, Done, SimDevicePort
from tests.simulation.loop import EPOCH_MS, SimLoop
from tests.simulation.network import Connection, Inbox, ServerKind, SimMqttServer

LISTENER = ServerKind(name="listener", mqtt5=True, retains=False, keeps_sessions=False)
BOUNDS = MqttLimits(tick_sec=2.0, packets_per_sec=10_000)
# With the shorter one the listener is the first to notice a dead connection, with the longer one the device.
KEEPALIVES_SEC = (40, 240)
# How late after 1.5 keepalives that may be: two ticks, and what was on its way.
LATE_SEC = 5.0
ENDS_WITHIN_MS = 5_000
WINDOWS = (1, 2, 20)
LONGEST = 1 << 20


class Observed:
    """What passes in one direction, as packets."""

    def __init__(self, version: Callable[[], int]) -> None:
        self._splitter = Splitter(LONGEST)
        self._version = version

    def packets(self, data: bytes) -> list[Packet]:
        self._splitter.put(data)
        found = []
        while (cut := self._splitter.next()) is not None:
            found.append(decode(*cut, self._version()))
        return found


class Flow:
    """One direction of one connection: bytes in order, in pieces, each after a delay."""

    def __init__(self, net: PipeNet, arrive: Callable[[bytes | None], None]) -> None:
        self.slow = 1.0
        self.deaf = False
        self._net = net
        self._arrive = arrive
        self._last = 0.0
        self._under_way: deque[bytes | None] = deque()

    def send(self, data: bytes | None) -> None:
        """None is the end of the stream."""
        net, draw = self._net, self._net.random
        cuts: list[int] = []
        if data:
            cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.choice((0, 0, 1, 2))))
        pieces = [data] if data is None else _cut(data, cuts)
        for piece in pieces:
            delay = self.slow * draw.uniform(*net.faults.latency_sec)
            self._last = max(self._last, net.loop.time() + delay)
            self._under_way.append(piece)
            net.loop.call_at(self._last, self._pass, self._under_way, context=net.world)

    def lose_what_is_under_way(self) -> None:
        self._under_way = deque()

    def _pass(self, under_way: deque[bytes | None]) -> None:
        # The first handle of one instant takes the oldest piece: such handles may run in any order.
        piece = under_way.popleft()
        if not self.deaf and under_way is self._under_way:
            self._arrive(piece)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


class Wire(Connection):
    """One TCP connection between a port and the listener, with the names that the nemesis knows."""

    client: PipePort

    def __init__(self, net: PipeNet, client: PipePort) -> None:
        self.net, self.server, self.client = net, net, client
        self.to_server: Any = Flow(net, self._at_server)
        self.to_client: Any = Flow(net, self._at_client)
        self.open = True
        self.deaf_since: float | None = None
        self.sent: dict[int, Outgoing] = {}  # to the client, without its PUBACK, as the server knows
        self.token = client.password()
        self.admitted = 0  # which CONNACK of this name it had
        self.transport = Transport(self)
        self._said = Observed(lambda: client.version)
        self._told = Observed(lambda: client.version)
        net.inbox.post(self._begin)

    def _begin(self) -> None:
        self.shell: Shell = self.net.listener.connection("10.0.0.1")
        self.shell.connection_made(self.transport)

    # --- the client's end

    def close(self, why: str, *, graceful: bool = False) -> None:
        """The client's end is gone. What it sent may still arrive, or not."""
        if not self.open:
            return
        self.open = False
        if not graceful and self.net.random.random() < 0.5:
            self.to_server.lose_what_is_under_way()
        self.to_client.lose_what_is_under_way()
        self.to_server.send(None)
        self.client.inbox.post(self.client.lost, self, why)

    def go_half_open(self, noticed_after_sec: float) -> None:
        """Nothing passes any more, and neither side is told; each has its own keepalive."""
        if self.deaf_since is not None:
            return
        self.to_server.deaf = self.to_client.deaf = True
        loop = self.net.loop
        self.deaf_since = loop.time()
        self.net.half_open.append(self)
        # Up to two minutes, so that either side may be the first to notice.
        loop.call_later(3 * noticed_after_sec, self.close, "keepalive", context=self.net.world)

    def _at_client(self, data: bytes | None) -> None:
        if not self.open:
            return
        if data is None:
            self.open = False
            self.client.inbox.post(self.client.lost, self, "the server closed")
        else:
            self.client.inbox.post(self.client.heard, self, data)

    # --- the server's end

    def _at_server(self, data: bytes | None) -> None:
        if self.net.listening:
            self.net.inbox.post(self.transport.arrived, data)

    def observe_said(self, data: bytes) -> None:
        """What reached the server."""
        for packet in self._said.packets(data):
            if self.admitted:  # what comes before its CONNACK is refused with it
                self._judge_token()
            if isinstance(packet, Publish):
                self.net.record("delivery", Outgoing(topic=packet.topic, payload=packet.payload))
            elif isinstance(packet, p.Ack) and packet.kind == p.PUBACK:
                done = self.sent.pop(packet.packet_id, None)
                if done is not None:
                    self.net.record("accepted", done)

    def _judge_token(self) -> None:
        """C2: the token of an open connection may have ended."""
        history, net = self.net.history, self.net
        for each in history.secrets if history is not None else ():
            if each.value == self.token and each.ended is not None and history is not None:
                since = history.now_ms() - each.ended
                if since > ENDS_WITHIN_MS:
                    net.found.append(f"C2: {self.client.client_id} is heard {since} ms after its token ended")

    def observe_told(self, data: bytes) -> None:
        """What the server sends."""
        net, client = self.net, self.client
        for packet in self._told.packets(data):
            if isinstance(packet, p.Connack) and packet.reason == 0:
                self.admitted = net.admitted[client.client_id] = net.admitted.get(client.client_id, 0) + 1
            elif isinstance(packet, Publish):
                outgoing = net.of(packet)
                net.record("publish", outgoing, retain=packet.retain)
                if net.core is not None and net.core.dispatch.outstanding:
                    net.found.append("M5: a send slot is held by a message that is written")
                if packet.packet_id in self.sent:
                    net.found.append(f"M1: packet id {packet.packet_id} is used twice to {client.client_id}")
                self.sent[packet.packet_id] = outgoing
                if len(self.sent) > client.window and client.version == 5:
                    count = f"{len(self.sent)} of {client.window}"
                    net.found.append(f"M2: in flight to {client.client_id}: {count}")
                if self.admitted != net.admitted.get(client.client_id):
                    net.found.append(f"M3: {client.client_id} is sent to where it was before")
            elif isinstance(packet, p.Ack) and packet.kind == p.PUBACK:
                answered = client.pending.get(packet.packet_id)
                if answered is not None:
                    net.record_puback(*answered[:2])


class Transport(asyncio.Transport):
    """The server's end of a wire, as asyncio gives one."""

    def __init__(self, wire: Wire) -> None:
        super().__init__({"peername": ("10.0.0.1", 1)})
        self._wire = wire
        self._closing = False
        self._paused = False
        self._waiting: list[bytes | None] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self._wire.observe_told(bytes(data))
            self._wire.to_client.send(bytes(data))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            wire = self._wire
            wire.net.noticed(wire)
            wire.net.forget(wire.client.subscriptions)
            wire.to_client.send(None)
            wire.net.loop.call_soon(wire.shell.connection_lost, None)

    def abort(self) -> None:
        if not self._closing:
            self._wire.to_client.lose_what_is_under_way()
        self.close()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self.arrived(data)

    def arrived(self, data: bytes | None) -> None:
        if self._closing:
            return
        if self._paused:
            self._waiting.append(data)
        elif data is None:
            self.close()
        else:
            self._wire.observe_said(data)
            self._wire.shell.data_received(data)


class PipePort(SimDevicePort):
    """A device's MQTT client, of either version. `pending`: its messages without PUBACK, by packet id."""

    password: Callable[[], str]
    refused: Callable[[], None]

    def __init__(self, server: PipeNet, hardware_id: str, subscriptions: tuple[str, ...]) -> None:
        super().__init__(server, hardware_id, subscriptions)
        self.version = server.random.choice((4, 5))
        self.window = server.random.choice(WINDOWS)
        self.keepalive = server.random.choice(KEEPALIVES_SEC)
        self.pending: dict[int, tuple[Outgoing, bool, Done]] = {}
        self._observed = Observed(lambda: self.version)
        self._late: list[tuple[Outgoing, bool, Done]] = []

    def _dial(self) -> None:
        before = self._connection
        super()._dial()
        if self._connection is None or self._connection is before:
            return
        self._observed = Observed(lambda: self.version)
        will = None
        if self.will is not None:
            will = p.Will(topic=self.will[0], payload=self.will[1], qos=1, retain=True)
        properties = {"receive_maximum": self.window} if self.version == 5 else {}
        self._say(
            p.Connect(
                client_id=self.client_id,
                user=self.client_id,
                password=self.password().encode(),
                version=self.version,
                clean=self.clean or self.version == 5,
                keepalive=self.keepalive,
                will=will,
                properties=properties,
            )
        )

    def _say(self, packet: Packet) -> None:
        if self._connection is not None and self._connection.open:
            cast(Wire, self._connection).to_server.send(encode(packet, self.version))

    def heard(self, wire: Wire, data: bytes) -> None:
        if wire is not self._connection:
            return
        for packet in self._observed.packets(data):
            if wire is self._connection:
                self._take(packet)

    def _take(self, packet: Packet) -> None:
        if isinstance(packet, p.Connack):
            if packet.reason:
                if packet.reason in (5, 0x87):
                    self.refused()
            elif self.subscribes_at_once:
                self.subscribe(self._connection)
            else:
                self._begin()
        elif isinstance(packet, p.Granted):
            if self.subscribes_at_once:
                self._begin()
        elif isinstance(packet, Publish):
            token = (self._connection, packet.packet_id)
            correlation = packet.properties.get("correlation")
            self.message(
                Message(topic=packet.topic, payload=packet.payload, correlation=correlation, token=token)
            )
        elif isinstance(packet, p.Ack) and packet.packet_id in self.pending:
            _, _, done = self.pending.pop(packet.packet_id)
            done(Receipt(written=True, reason=packet.reason))
            if self._late:
                self._publish(*self._late.pop(0))

    def _begin(self) -> None:
        self._up = True
        self.inbox.later(self.keepalive / 2, self._ping, self._connection)
        self.came_up()

    def subscribe(self, connection: Connection | None) -> None:
        if connection is self._connection:
            self._say(p.Subscribe(1, [p.Filter(each, 1) for each in self.subscriptions]))

    def _ping(self, connection: Connection | None) -> None:
        if connection is not None and connection is self._connection:
            self._say(p.Ping())
            self.inbox.later(self.keepalive / 2, self._ping, connection)

    def lost(self, connection: Connection, why: str) -> None:
        if connection is self._connection:
            unknown = [*(each[2] for each in self.pending.values()), *(each[2] for each in self._late)]
            self.pending.clear()
            self._late.clear()
            for done in unknown:
                done(Receipt(written=True, reason=None))
        super().lost(connection, why)

    def _write(self, outgoing: Outgoing, retain: bool, done: Done) -> bool:
        if self._connection is None or not self._up:
            return False
        if len(self.pending) >= BOUNDS.receive_maximum:
            self._late.append((outgoing, retain, done))  # as every client that keeps to the window
        else:
            self._publish(outgoing, retain, done)
        return True

    def _publish(self, outgoing: Outgoing, retain: bool, done: Done) -> None:
        self._mid = self._mid % 0xFFFF + 1
        self.pending[self._mid] = outgoing, retain, done
        self._say(Publish(outgoing.topic, outgoing.payload, 1, self._mid, retain=retain))

    def _acknowledge(self, message: Message) -> None:
        connection, mid = message.token
        if connection is self._connection:
            self._say(p.Ack(p.PUBACK, mid))

    def _hang_up(self) -> None:
        self._say(p.Goodbye())
        super()._hang_up()


class _Telling(Listener):
    """The listener as it is; it only lets its network know what it is about to write."""

    def __init__(self, net: PipeNet, *parts: Any) -> None:
        super().__init__(*parts)
        self._net = net

    def publish(self, outgoing: Outgoing, done: Done) -> bool:
        net, routed = self._net, self.listens(outgoing.topic)
        net.handing = outgoing
        handed = super().publish(outgoing, done)
        if net.handing is not None and routed:
            net.queued.setdefault(outgoing.topic, []).append(outgoing)
            net.record("queued", outgoing)
        net.handing = None
        return handed


class PipeNet(SimMqttServer):
    """The network in front of the listener, which lives and dies with the broker's process."""

    def __init__(self, loop: SimLoop, *, history: History) -> None:
        super().__init__(loop, LISTENER, history=history)
        self.listener: Listener
        self.listening = False
        self.inbox: Inbox
        self.core: Core | None = None
        self.found: list[str] = []
        self.half_open: list[Wire] = []
        self.admitted: dict[str, int] = {}
        self.handing: Outgoing | None = None  # while the listener writes it
        self.queued: dict[str, list[Outgoing]] = {}  # by topic: behind the client's window
        self._wires: list[Wire] = []

    def listen(self, core: Core, prefix: str) -> Listener:
        """Makes the listener of a broker's process; call it there."""

        async def check(hardware_id: str, token: str | None) -> str | None:
            device = await core.registry.authenticate(hardware_id, token or "")
            right = device is not None and device.hardware_id == hardware_id
            return None if right else "wrong token"

        access = Access(prefix=prefix, check_device=check)
        services = Services(core.feed, access.events, lambda: core.log_id, lambda name: None)
        self.core, self.inbox = core, Inbox(self.loop)
        self.listener = _Telling(self, access, core.intake, services, BOUNDS)
        return self.listener

    def open(self) -> None:
        self.listening = self.up = True

    def accept(self, client: Client) -> Connection | None:
        if not self.listening:
            return None
        assert isinstance(client, PipePort)
        wire = Wire(self, client)
        self._wires = [each for each in self._wires if each.open] + [wire]
        return wire

    def connection(self, client_id: str) -> Connection | None:
        return next(
            (each for each in reversed(self._wires) if each.open and each.client.client_id == client_id), None
        )

    def restart(self, sessions: Any, down_for_sec: float) -> None:
        """The broker's process is gone, and every connection with it."""
        self.listening = self.up = False
        self.core = None
        self.half_open.clear()
        self.queued.clear()
        wires, self._wires = self._wires, []
        for wire in wires:
            wire.close("the server went down")
            wire.to_server.deaf = wire.to_client.deaf = True

    def noticed(self, wire: Wire) -> None:
        """The listener ended a connection: in time, if it was dead?"""
        if wire in self.half_open:
            self.half_open.remove(wire)
            self._judge(wire)

    def still_half_open(self) -> list[str]:
        for wire in self.half_open:
            self._judge(wire)
        return self.found

    def _judge(self, wire: Wire) -> None:
        since = wire.deaf_since or 0.0
        late = self.loop.time() - since - self._stood_still(since)
        if late > 1.5 * wire.client.keepalive + LATE_SEC:
            self.found.append(f"M4: {wire.client.client_id} was gone for {late:.0f} s before it was noticed")

    def _stood_still(self, since: float) -> float:
        """For how long the broker's process was stopped from then on, s: it notices nothing meanwhile."""
        assert self.history is not None
        start = EPOCH_MS + 1_000 * since
        stops = self.history.stops()
        return sum(end.t - max(paused, start) for paused, end in stops if end.t > start) / 1_000

    def of(self, packet: Publish) -> Outgoing:
        """What the broker handed over as this packet, which on MQTT 3.1.1 does not name its command."""
        handing = self.handing
        if handing is not None and (handing.topic, handing.payload) == (packet.topic, packet.payload):
            self.handing = None
            return handing
        queued = self.queued[packet.topic]
        while queued[0].payload != packet.payload:
            queued.pop(0)  # its time was up
        return queued.pop(0)

    def forget(self, topics: tuple[str, ...]) -> None:
        for topic in topics:
            self.queued.pop(topic, None)

    def record(self, what: Any, outgoing: Outgoing, *, retain: bool = False) -> None:
        attempt = next((int(value) for key, value in outgoing.user_properties if key == "attempt"), None)
        if self.history is not None:
            self.history.on_wire(
                what, outgoing.topic, outgoing.payload, outgoing.correlation, retain, attempt
            )

    def record_puback(self, outgoing: Outgoing, retain: bool) -> None:
        if self.history is not None:
            self.history.on_wire("puback", outgoing.topic, outgoing.payload, None, False)
