"""The server side of one MQTT connection: bytes in, effects and bytes out. Pure.

It handles the protocol: versions, packet ids, both flow windows, keepalive, reason codes. Its owner decides
about authentication, topics, and when a message is durable. The session sends a PUBACK only when its owner
allows it, never sends more than the client's limits, and ends with exactly one `Closed`. `now` is in seconds
of a clock that never steps.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Any, Literal, NamedTuple

from broker.mqtt import packets as p
from broker.mqtt.codec import Splitter, decode, encode
from broker.mqtt.packets import BadPacket, Packet, Publish, Reason
from broker.settings import MqttLimits

# What MQTT 3.1.1 has instead of a reason code in a CONNACK.
_CONNACK_311 = {Reason.WRONG_VERSION: 1, Reason.WRONG_CLIENT_ID: 2, Reason.NOT_AUTHORIZED: 5}
_UNAVAILABLE_311 = 3
_KEEPALIVE_GRACE = 1.5  # MQTT-3.1.2-22, in MQTT 3.1.1 3.1.2-24
_FRAME = 1 / 8  # what a WebSocket frame costs, in packets: some clients cut one packet into several frames
_ANYTHING = 268_435_460  # the largest packet there can be


class Taken(NamedTuple):
    """The end of a message to the client: reason code and text of its PUBACK. None: no PUBACK will come."""

    tag: Any
    reason: int | None
    text: str = ""


class Closed(NamedTuple):
    """The connection ended. `will`: its will must be published. `by_us`: the server ended it, for `reason`.
    `unanswered`: packet ids of the client's messages without a PUBACK."""

    reason: int
    text: str
    will: bool
    by_us: bool
    unanswered: tuple[int, ...] = ()


Effect = p.Connect | Publish | p.Subscribe | p.Unsubscribe | Taken | Closed


class Session:
    """`state`: new (no CONNECT yet), judged (the owner decides about the CONNECT), open, closed.

    After each call the owner takes `effects` and `out`. While `paused`, received packets wait. The owner must
    call `work` again: at `resume_at` if it is set, else after `accept` or `acknowledge`.
    """

    def __init__(self, limits: MqttLimits, now: float) -> None:
        self.state: Literal["new", "judged", "open", "closed"] = "new"
        self.version = 4
        self.will: p.Will | None = None
        self.keepalive = 0
        self.out: list[bytes] = []
        self.effects: list[Effect] = []
        self.paused = False
        self.resume_at: float | None = None
        self.heard_at = now  # when the last whole packet arrived
        self._limits = limits
        self._splitter = Splitter(limits.connect_bytes)
        self._heard: dict[int, Publish] = {}  # messages of the client without a PUBACK
        self._allowed: dict[int, tuple[int, str]] = {}  # of these, the ones that the owner has acknowledged
        self._most_heard: float = inf
        self._unreleased: set[int] = set()  # QoS 2: PUBREC sent, PUBREL not received
        self._in_flight: dict[int, tuple[Any, float]] = {}  # packet id -> tag, and when it was sent
        self._queue: deque[tuple[Publish, Any, float | None]] = deque()
        self._last_id = 0
        self._window = limits.in_flight
        self._largest = _ANYTHING
        self._wants_session = False
        self._tells_problems = True
        self._paid_until = now - limits.burst_sec

    @property
    def in_flight(self) -> int:
        return len(self._in_flight) + len(self._queue)

    @property
    def room(self) -> bool:
        """Whether a message would be sent at once."""
        return len(self._in_flight) < self._window

    # --- from the network ---

    def receive(self, data: bytes, now: float) -> None:
        if self.state == "closed":
            return
        self._splitter.put(data)
        self.work(now)
        most = self._limits.connect_bytes
        if self.state == "judged" and self._splitter.waiting > most:
            self.close(Reason.TOO_LARGE, f"more than {most} bytes before the CONNACK")

    def frame(self, now: float) -> None:
        """Counts a WebSocket frame, which costs time even if it is empty."""
        self._pay(_FRAME, 0, now)

    def work(self, now: float) -> None:
        """Handles the packets that have arrived, as many as windows, rate and one turn allow."""
        self.paused, self.resume_at = True, None
        left = self._limits.packets_at_once
        try:
            while left > 0 and self._paid_until <= now:
                if self.state == "closed" or len(self._heard) >= self._most_heard:
                    return
                if self.state == "judged":
                    self.paused = False  # what is read waits; a client that hangs up is noticed
                    return
                cut = self._splitter.next()
                if cut is None:
                    self.paused = False
                    return
                self.heard_at = now
                packet = decode(*cut, self.version)
                if type(packet) is p.Ack and packet.packet_id in self._in_flight:
                    left -= 1
                    self._acknowledged(packet, now)  # not charged: the server caused them
                else:
                    weight = p.weight(packet)
                    left -= weight
                    self._pay(weight, len(cut[1]), now)
                    self._handle(packet)
            self.resume_at = max(now, self._paid_until)
        except BadPacket as error:
            self.close(error.reason, str(error))

    def lost(self) -> None:
        """The connection ended without a DISCONNECT."""
        self._end(Reason.UNSPECIFIED, "the connection was lost", will=True, by_us=False)

    def tick(self, now: float, *, read: bool = True) -> None:
        """Ends a connection that has been silent for too long. `read`: its owner reads from it."""
        limits = self._limits
        if self.state == "new" and now >= self.heard_at + limits.connect_sec:
            self.close(Reason.UNSPECIFIED, f"no CONNECT within {limits.connect_sec:g} s")
        if self.state != "open":
            return
        if self.paused or not read:
            self.heard_at = now  # the client may have sent something that was not read
        elif self.keepalive and now >= self.heard_at + _KEEPALIVE_GRACE * self.keepalive:
            self.close(Reason.KEEPALIVE, f"no packet for 1.5 times the keepalive of {self.keepalive} s")
        elif not self.keepalive and self._in_flight:
            _, sent_at = next(iter(self._in_flight.values()))
            if now >= max(sent_at, self.heard_at) + limits.unanswered_sec:
                self.close(Reason.KEEPALIVE, f"no PUBACK within {limits.unanswered_sec:g} s")

    # --- decisions of the owner ---

    def accept(self, now: float, *, assigned_id: str | None = None, shared: bool = False) -> None:
        """Accepts the CONNECT. `shared`: shared subscriptions and subscription identifiers are available."""
        limits, asked = self._limits, self.keepalive
        self.state, self.heard_at = "open", now
        self._splitter.longest = limits.packet_bytes
        self._paid_until = now - limits.burst_sec
        told: p.Properties = {
            "maximum_qos": 1,
            "receive_maximum": limits.receive_maximum,
            "maximum_packet": limits.packet_bytes,
            "alias_maximum": 0,
            "session_expiry": 0,
        }
        if not shared:
            told |= {"shared_available": 0, "subscription_ids_available": 0}
        if self.version == 5:
            self.keepalive = min(asked, limits.keepalive_sec) or limits.keepalive_sec
        if self.keepalive != asked:
            told["server_keepalive"] = self.keepalive
        if assigned_id is not None:
            told["assigned_id"] = assigned_id
        if self._say(p.Connack(Reason.SUCCESS, properties=told)):
            self.work(now)
        else:
            self._end(Reason.TOO_LARGE, "its maximum packet size is too small", will=False, by_us=True)

    def refuse(self, reason: int, text: str) -> None:
        """Refuses the CONNECT. None of the client's packets has an effect, its will neither."""
        code = reason if self.version == 5 else _CONNACK_311.get(reason, _UNAVAILABLE_311)
        self._say(p.Connack(code, properties={"reason_string": text}))
        self._end(reason, text, will=False, by_us=True)

    def close(self, reason: int, text: str) -> None:
        """Ends the connection. MQTT 3.1.1 has no packet that tells the client why."""
        if self.state == "judged" or (self.state == "new" and reason == Reason.WRONG_VERSION):
            self.refuse(reason, text)
            return
        if self.state == "open" and self.version == 5:
            self._say(p.Goodbye(reason=reason, properties={"reason_string": text}))
        self._end(reason, text, will=True, by_us=True)

    def publish(
        self, publish: Publish, tag: Any, now: float, expires_at: float | None = None
    ) -> Literal["sent", "queued", "too large", "full"]:
        """Sends a message, or queues it until the client's window allows it. QoS 0 is sent at once and has no
        PUBACK; each other message that is sent or queued ends with one `Taken`, which has its `tag`."""
        assert self.state == "open"
        if not publish.qos or self.room:
            return "sent" if self._send(publish, tag, now) else "too large"
        if len(self._queue) >= self._limits.queued:
            return "full"
        self._queue.append((publish, tag, expires_at))
        return "queued"

    def acknowledge(self, packet_id: int, reason: int = Reason.SUCCESS, text: str = "") -> None:
        """Allows the PUBACK of a message. It is sent after the PUBACKs of all messages before it."""
        if packet_id in self._heard:  # it is empty once the session is closed
            self._allowed[packet_id] = reason, text
        while self._heard and (first := next(iter(self._heard))) in self._allowed:
            if self._heard.pop(first).qos == 1:
                self._answer(p.PUBACK, first, *self._allowed.pop(first))
            else:
                self._unreleased.add(first)
                self._answer(p.PUBREC, first, *self._allowed.pop(first))

    def granted(self, asked: p.Subscribe | p.Unsubscribe, reasons: list[int]) -> None:
        """Answers a SUBSCRIBE or an UNSUBSCRIBE."""
        kind = p.SUBACK if isinstance(asked, p.Subscribe) else p.UNSUBACK
        if self.version != 5:
            reasons = [min(reason, 0x80) for reason in reasons] if kind == p.SUBACK else []
        if self.state == "open":
            self._say(p.Granted(kind, asked.packet_id, reasons))

    # --- inside ---

    def _pay(self, packets: float, size: int, now: float) -> None:
        """Charges for what came. A client that has used up its burst is not read until it has waited."""
        limits = self._limits
        cost = max(packets / limits.packets_per_sec, size / limits.bytes_per_sec)
        self._paid_until = max(self._paid_until, now - limits.burst_sec) + cost

    def _handle(self, packet: Packet) -> None:
        match packet:
            case _ if self.state == "new":
                self._connect(packet)
            case Publish():
                self._published(packet)
            case p.Subscribe() | p.Unsubscribe():
                self.effects.append(packet)
            case p.Ping(p.PINGREQ):
                self.out.append(encode(p.Ping(p.PINGRESP), self.version))
            case p.Ack(p.PUBACK):
                pass  # the message is not in flight: such a PUBACK is harmless
            case p.Ack(p.PUBREL, packet_id):
                known = packet_id in self._unreleased
                self._unreleased.discard(packet_id)
                self._answer(p.PUBCOMP, packet_id, Reason.SUCCESS if known else Reason.UNKNOWN_ID)
            case p.Goodbye(p.DISCONNECT, reason, properties):
                if properties.get("session_expiry") and not self._wants_session:
                    raise BadPacket(
                        "a session expiry in DISCONNECT where CONNECT had 0", Reason.PROTOCOL_ERROR
                    )
                self._end(reason, "the client sent DISCONNECT", will=reason != 0, by_us=False)
            case _:
                raise BadPacket("a packet that a client may not send here", Reason.PROTOCOL_ERROR)

    def _connect(self, packet: Packet) -> None:
        if not isinstance(packet, p.Connect):
            raise BadPacket("the first packet is not CONNECT", Reason.PROTOCOL_ERROR)
        properties = packet.properties
        self.state, self.will = "judged", packet.will
        self.version, self.keepalive = packet.version, packet.keepalive
        if packet.version != 5:  # these clients know of no Receive Maximum, so they are not read for a while
            self._most_heard = self._limits.unacknowledged
        self._window = min(properties.get("receive_maximum", self._window), self._window)
        self._largest = properties.get("maximum_packet", _ANYTHING)
        self._wants_session = properties.get("session_expiry", 0) > 0
        self._tells_problems = properties.get("problem_info", 1) == 1
        if "auth_method" in properties:
            self.refuse(Reason.BAD_AUTH_METHOD, "only user name and password, or a client certificate")
        elif packet.will is not None and packet.version == 5 and packet.will.qos == 2:
            self.refuse(Reason.QOS, "a will may have QoS 0 or 1")
        elif packet.version == 4 and not packet.client_id and not packet.clean:  # MQTT-3.1.3-8
            self.refuse(Reason.WRONG_CLIENT_ID, "without a client id, the session must be a clean one")
        else:
            self.effects.append(packet)

    def _published(self, packet: Publish) -> None:
        properties, packet_id = packet.properties, packet.packet_id
        if self.version == 5:
            answer_to = properties.get("response_topic", "")
            if "alias" in properties:
                raise BadPacket("a topic alias; the maximum is 0", Reason.BAD_ALIAS)
            if packet.qos == 2:
                raise BadPacket("QoS 2; the maximum is 1", Reason.QOS)
            if "subscription_id" in properties or "+" in answer_to or "#" in answer_to:
                raise BadPacket("a property that a client may not set in a PUBLISH", Reason.PROTOCOL_ERROR)
        if packet.qos:
            known = self._heard.get(packet_id)
            if known is not None and (known.topic, known.payload) == (packet.topic, packet.payload):
                return  # a duplicate on the same connection
            if packet.qos == 2 and packet_id in self._unreleased:
                self._answer(p.PUBREC, packet_id)
                return
            if known is not None or packet_id in self._unreleased:
                raise BadPacket(f"packet id {packet_id} is in use", Reason.PROTOCOL_ERROR)
            if self.version == 5 and len(self._heard) >= self._limits.receive_maximum:
                raise BadPacket(f"more than {len(self._heard)} messages without PUBACK", Reason.TOO_MANY)
            if len(self._unreleased) > self._limits.unacknowledged:
                raise BadPacket("too many messages without PUBREL", Reason.TOO_MANY)
            self._heard[packet_id] = packet
        self.effects.append(packet)

    def _acknowledged(self, packet: p.Ack, now: float) -> None:
        if packet.kind != p.PUBACK:
            raise BadPacket("a message of QoS 1 is acknowledged with PUBACK", Reason.PROTOCOL_ERROR)
        tag, _ = self._in_flight.pop(packet.packet_id)
        self.effects.append(Taken(tag, packet.reason, packet.properties.get("reason_string", "")))
        while self._queue and self.room:
            publish, tag, expires_at = self._queue.popleft()
            left = None if expires_at is None else expires_at - now
            if left is not None:
                publish.properties["expiry"] = max(1, int(left))  # MQTT-3.3.2-6
            if (left is not None and left <= 0) or not self._send(publish, tag, now):
                self.effects.append(Taken(tag, None))

    def _send(self, publish: Publish, tag: Any, now: float) -> bool:
        publish.packet_id = self._next_id() if publish.qos else 0
        if not self._say(publish):
            return False
        if publish.qos:
            self._in_flight[publish.packet_id] = tag, now
        return True

    def _next_id(self) -> int:
        """An id that is not in flight. There are 65,535, and the window is smaller."""
        while True:
            self._last_id = self._last_id % 0xFFFF + 1
            if self._last_id not in self._in_flight:
                return self._last_id

    def _answer(self, kind: int, packet_id: int, reason: int = Reason.SUCCESS, text: str = "") -> None:
        if not reason or self.version != 5:
            self.out.append(bytes((kind << 4, 2)) + packet_id.to_bytes(2, "big"))
            return
        told = text and self._tells_problems
        self._say(p.Ack(kind, packet_id, reason, {"reason_string": text} if told else {}))

    def _say(self, packet: p.Connack | Publish | p.Ack | p.Granted | p.Goodbye) -> bool:
        """Sends it if the client allows its size, if need be without the reason string (MQTT-3.1.2-24)."""
        data = encode(packet, self.version)
        if len(data) > self._largest and packet.properties.pop("reason_string", None) is not None:
            data = encode(packet, self.version)
        if len(data) > self._largest:
            return False
        self.out.append(data)
        return True

    def _end(self, reason: int, text: str, *, will: bool, by_us: bool) -> None:
        if self.state == "closed":
            return
        due = will and self.state == "open" and self.will is not None
        self.state, self.paused, self.resume_at = "closed", True, None
        unknown = [*(tag for tag, _ in self._in_flight.values()), *(tag for _, tag, _ in self._queue)]
        unanswered = tuple(self._heard)
        for each in (self._in_flight, self._queue, self._heard):
            each.clear()
        self.effects += [*(Taken(tag, None) for tag in unknown), Closed(reason, text, due, by_us, unanswered)]
