"""The server side of one MQTT connection: bytes in, effects and bytes out. Pure.

It handles the protocol: versions, packet ids, both flow windows, keepalive, reason codes. Its owner decides
about authentication, topics, and when a message is durable. The session sends a PUBACK only when its owner
allows it, never sends more than the client's limits, and ends with exactly one `Closed`. `now` is in seconds
of a clock that never steps.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from broker.mqtt import packets as p
from broker.mqtt.codec import Splitter, decode, encode
from broker.mqtt.packets import BadPacket, Packet, Publish, Reason
from broker.settings import MqttLimits

# What MQTT 3.1.1 has instead of a reason code in a CONNACK.
_CONNACK_311 = {Reason.WRONG_VERSION: 1, Reason.WRONG_CLIENT_ID: 2, Reason.NOT_AUTHORIZED: 5}
_UNAVAILABLE_311 = 3
_SUCCESS = {p.PUBACK: b"\x40\x02", p.PUBREC: b"\x50\x02"}
_KEEPALIVE_GRACE = 1.5  # MQTT-3.1.2-24
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


class _Heard:
    """A message of the client without a PUBACK. `answer`: (reason, text), once the owner allowed it."""

    __slots__ = ("answer", "publish")

    def __init__(self, publish: Publish) -> None:
        self.publish = publish
        self.answer: tuple[int, str] | None = None


class _Queued(NamedTuple):
    publish: Publish
    tag: Any
    expires_at: float | None


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
        self.duplicates = 0
        self.heard_at = now  # when the last whole packet arrived
        self._limits = limits
        self._splitter = Splitter(limits.connect_bytes)
        self._heard: dict[int, _Heard] = {}
        self._unreleased: dict[int, None] = {}  # QoS 2: PUBREC sent, PUBREL not received
        self._in_flight: dict[int, tuple[Any, float]] = {}
        self._queue: list[_Queued] = []
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
        if self.state != "closed":
            self._splitter.put(data)
            self.work(now)
        most = self._limits.connect_bytes
        if self.state == "judged" and self._splitter.waiting > most:
            self.close(Reason.TOO_LARGE, f"more than {most} bytes before the CONNACK")

    def frame(self, now: float) -> None:
        """Counts a WebSocket frame, which costs time even if it is empty."""
        self._pay(_FRAME / self._limits.packets_per_sec, now)

    def work(self, now: float) -> None:
        """Handles the packets that have arrived, as many as windows, rate and one turn allow."""
        self.resume_at = None
        limits, left = self._limits, self._limits.packets_at_once
        try:
            while left > 0:
                if not self._may_read(now):
                    return
                cut = self._splitter.next()
                if cut is None:
                    self.paused = False
                    return
                self.heard_at = now
                first, body = cut
                packet = decode(first, body, self.version)
                if type(packet) is p.Ack and packet.packet_id in self._in_flight:
                    left -= 1
                    self._acknowledged(packet, now)  # not charged: the server caused them
                else:
                    weight = p.weight(packet)
                    left -= weight
                    self._pay(max(weight / limits.packets_per_sec, len(body) / limits.bytes_per_sec), now)
                    self._handle(packet, now)
            self.paused, self.resume_at = True, now
        except BadPacket as error:
            self.close(error.reason, str(error))

    def lost(self) -> None:
        """The connection ended without a DISCONNECT."""
        self._end(Reason.UNSPECIFIED, "the connection was lost", will=True, by_us=False)

    def tick(self, now: float, *, read: bool = True) -> None:
        """Ends a connection that has been silent for too long. `read`: its owner reads from it."""
        if self.state == "new" and now >= self.heard_at + self._limits.connect_sec:
            self.close(Reason.UNSPECIFIED, f"no CONNECT within {self._limits.connect_sec:g} s")
        if self.state != "open":
            return
        if self.paused or not read:
            self.heard_at = now  # the client may have sent something that was not read
        elif self.keepalive and now >= self.heard_at + _KEEPALIVE_GRACE * self.keepalive:
            self.close(Reason.KEEPALIVE, f"no packet for 1.5 times the keepalive of {self.keepalive} s")
        elif not self.keepalive and self._in_flight:
            _, sent_at = next(iter(self._in_flight.values()))
            if now >= max(sent_at, self.heard_at) + self._limits.unanswered_sec:
                self.close(Reason.KEEPALIVE, f"no PUBACK within {self._limits.unanswered_sec:g} s")

    # --- decisions of the owner ---

    def accept(self, now: float, *, assigned_id: str | None = None, shared: bool = False) -> None:
        """Accepts the CONNECT. `shared`: shared subscriptions and subscription identifiers are available."""
        self.state, self.heard_at = "open", now
        self._splitter.longest = self._limits.packet_bytes
        self._paid_until = now - self._limits.burst_sec
        connack = p.Connack(Reason.SUCCESS)
        if self.version == 5:
            asked, longest = self.keepalive, self._limits.keepalive_sec
            self.keepalive = min(asked, longest) or longest
            connack.properties = {
                "maximum_qos": 1,
                "receive_maximum": self._limits.receive_maximum,
                "maximum_packet": self._limits.packet_bytes,
                "alias_maximum": 0,
                "session_expiry": 0,
            }
            if not shared:
                connack.properties |= {"shared_available": 0, "subscription_ids_available": 0}
            if self.keepalive != asked:
                connack.properties["server_keepalive"] = self.keepalive
            if assigned_id is not None:
                connack.properties["assigned_id"] = assigned_id
        if self._say(connack):
            self.work(now)
        else:
            self._end(Reason.TOO_LARGE, "its maximum packet size is too small", will=False, by_us=True)

    def refuse(self, reason: int, text: str) -> None:
        """Refuses the CONNECT. None of the client's packets has an effect, its will neither."""
        if self.version == 5:
            self._say(p.Connack(reason, properties={"reason_string": text}))
        else:
            self._say(p.Connack(_CONNACK_311.get(reason, _UNAVAILABLE_311)))
        self._end(reason, text, will=False, by_us=True)

    def close(self, reason: int, text: str) -> None:
        """Ends the connection. MQTT 3.1.1 has no packet that tells the client why."""
        if self.state == "judged" or (self.state == "new" and reason == Reason.WRONG_VERSION):
            self.refuse(reason, text)
        elif self.state in ("new", "open"):
            if self.state == "open" and self.version == 5:
                self._say(p.Goodbye(reason=reason, properties={"reason_string": text}))
            self._end(reason, text, will=True, by_us=True)

    def publish(
        self, publish: Publish, tag: Any, now: float, expires_at: float | None = None
    ) -> Literal["sent", "queued", "too large", "full"]:
        """Sends a message, or queues it until the client's window allows it. QoS 0 is sent at once and has no
        PUBACK; each other message that is sent or queued ends with one `Taken`, which has its `tag`."""
        assert self.state == "open"
        if publish.qos and len(self._in_flight) >= self._window:
            if len(self._queue) >= self._limits.queued:
                return "full"
            self._queue.append(_Queued(publish, tag, expires_at))
            return "queued"
        return "sent" if self._send(publish, tag, now) else "too large"

    def acknowledge(self, packet_id: int, reason: int = Reason.SUCCESS, text: str = "") -> None:
        """Allows the PUBACK of a message. It is sent after the PUBACKs of all messages before it."""
        heard = self._heard.get(packet_id)
        if heard is None or self.state != "open":
            return
        heard.answer = reason, text
        while self._heard:
            first = next(iter(self._heard))
            answer = self._heard[first].answer
            if answer is None:
                return
            qos = self._heard.pop(first).publish.qos
            if qos == 2:
                self._unreleased[first] = None
            self._answer(p.PUBACK if qos == 1 else p.PUBREC, first, *answer)

    def granted(self, packet_id: int, reasons: list[int]) -> None:
        """Answers a SUBSCRIBE."""
        if self.version != 5:
            reasons = [min(reason, 0x80) for reason in reasons]
        if self.state == "open":
            self._say(p.Granted(p.SUBACK, packet_id, reasons))

    def released(self, packet_id: int, reasons: list[int]) -> None:
        """Answers an UNSUBSCRIBE."""
        if self.state == "open":
            self._say(p.Granted(p.UNSUBACK, packet_id, reasons if self.version == 5 else []))

    # --- inside ---

    def _may_read(self, now: float) -> bool:
        if self.state in ("judged", "closed"):
            self.paused = True
        elif self._paid_until > now:
            self.paused, self.resume_at = True, self._paid_until
        elif self.version != 5 and len(self._heard) >= self._limits.unacknowledged:
            self.paused = True
        else:
            return True
        return False

    def _pay(self, cost: float, now: float) -> None:
        """`cost` in seconds. A client that has used up its burst is not read until it has waited so long."""
        self._paid_until = max(self._paid_until, now - self._limits.burst_sec) + cost

    def _handle(self, packet: Packet, now: float) -> None:
        if self.state == "new":
            self._connect(packet)
        elif type(packet) is Publish:
            self._published(packet)
        elif isinstance(packet, p.Ping) and packet.kind == p.PINGREQ:
            self.out.append(b"\xd0\x00")
        elif isinstance(packet, p.Subscribe | p.Unsubscribe):
            self.effects.append(packet)
        elif isinstance(packet, p.Ack) and packet.kind == p.PUBREL:
            known = packet.packet_id in self._unreleased
            self._unreleased.pop(packet.packet_id, None)
            self._answer(p.PUBCOMP, packet.packet_id, 0 if known else Reason.UNKNOWN_ID, "")
        elif isinstance(packet, p.Ack) and packet.kind == p.PUBACK:
            return  # the message is not in flight: such a PUBACK is harmless
        elif isinstance(packet, p.Goodbye) and packet.kind == p.DISCONNECT:
            if packet.properties.get("session_expiry") and not self._wants_session:
                raise BadPacket("a session expiry in DISCONNECT where CONNECT had 0", Reason.PROTOCOL_ERROR)
            self._end(packet.reason, "the client sent DISCONNECT", will=packet.reason != 0, by_us=False)
        else:
            raise BadPacket("a packet that a client may not send here", Reason.PROTOCOL_ERROR)

    def _connect(self, packet: Packet) -> None:
        if not isinstance(packet, p.Connect):
            raise BadPacket("the first packet is not CONNECT", Reason.PROTOCOL_ERROR)
        properties = packet.properties
        self.state, self.will = "judged", packet.will
        self.version, self.keepalive = packet.version, packet.keepalive
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
        properties, mid = packet.properties, packet.packet_id
        if self.version == 5:
            if "alias" in properties:
                raise BadPacket("a topic alias; the maximum is 0", Reason.BAD_ALIAS)
            if packet.qos == 2:
                raise BadPacket("QoS 2; the maximum is 1", Reason.QOS)
            answer_to = properties.get("response_topic", "")
            if "subscription_id" in properties or "+" in answer_to or "#" in answer_to:
                raise BadPacket("a property that a client may not set in a PUBLISH", Reason.PROTOCOL_ERROR)
        if packet.qos:
            if (known := self._heard.get(mid)) is not None:
                if (known.publish.topic, known.publish.payload) != (packet.topic, packet.payload):
                    raise BadPacket(f"packet id {mid} is in use", Reason.PROTOCOL_ERROR)
                self.duplicates += 1
                return
            if mid in self._unreleased:
                if packet.qos != 2:
                    raise BadPacket(f"packet id {mid} is in use", Reason.PROTOCOL_ERROR)
                self._answer(p.PUBREC, mid, 0, "")
                return
            if self.version == 5 and len(self._heard) >= self._limits.receive_maximum:
                raise BadPacket(f"more than {len(self._heard)} messages without PUBACK", Reason.TOO_MANY)
            if len(self._unreleased) > self._limits.unacknowledged:
                raise BadPacket("too many messages without PUBREL", Reason.TOO_MANY)
            self._heard[mid] = _Heard(packet)
        self.effects.append(packet)

    def _acknowledged(self, packet: p.Ack, now: float) -> None:
        if packet.kind != p.PUBACK:
            raise BadPacket("a message of QoS 1 is acknowledged with PUBACK", Reason.PROTOCOL_ERROR)
        tag, _ = self._in_flight.pop(packet.packet_id)
        self.effects.append(Taken(tag, packet.reason, packet.properties.get("reason_string", "")))
        while self._queue and len(self._in_flight) < self._window:
            waiting = self._queue.pop(0)
            left = None if waiting.expires_at is None else waiting.expires_at - now
            if left is not None:
                waiting.publish.properties["expiry"] = max(1, int(left))  # MQTT-3.3.2-6
            if (left is not None and left <= 0) or not self._send(waiting.publish, waiting.tag, now):
                self.effects.append(Taken(waiting.tag, None))

    def _send(self, publish: Publish, tag: Any, now: float) -> bool:
        if publish.qos:
            publish.packet_id = self._next_id()
        data = encode(publish, self.version)
        if len(data) > self._largest:
            return False
        if publish.qos:
            self._in_flight[publish.packet_id] = tag, now
        self.out.append(data)
        return True

    def _next_id(self) -> int:
        """An id that is not in flight. There are 65,535, and the window is smaller."""
        while True:
            self._last_id = self._last_id % 0xFFFF + 1
            if self._last_id not in self._in_flight:
                return self._last_id

    def _answer(self, kind: int, packet_id: int, reason: int, text: str) -> None:
        if (not reason or self.version != 5) and kind in _SUCCESS:
            self.out.append(_SUCCESS[kind] + packet_id.to_bytes(2, "big"))
            return
        told = text and self._tells_problems
        self._say(p.Ack(kind, packet_id, reason, {"reason_string": text} if told else {}))

    def _say(self, packet: p.Connack | p.Ack | p.Granted | p.Goodbye) -> bool:
        """Sends it, if it is not larger than the client allows, else without its text (MQTT-3.1.2-24)."""
        data = encode(packet, self.version)
        if len(data) > self._largest:
            packet.properties.pop("reason_string", None)
            data = encode(packet, self.version)
        if len(data) > self._largest:
            return False
        self.out.append(data)
        return True

    def _end(self, reason: int, text: str, *, will: bool, by_us: bool) -> None:
        if self.state == "closed":
            return
        admitted, self.state = self.state == "open", "closed"
        self.paused, self.resume_at = True, None
        unknown = [*(tag for tag, _ in self._in_flight.values()), *(each.tag for each in self._queue)]
        self._in_flight.clear()
        self._queue.clear()
        unanswered = tuple(self._heard)
        self._heard.clear()
        self.effects += [Taken(tag, None) for tag in unknown]
        due = will and admitted and self.will is not None
        self.effects.append(Closed(reason, text, due, by_us, unanswered))
