"""The target of MQTT bytes: the codec alone, and a session whose owner answers what it is told."""

from __future__ import annotations

from broker.mqtt import packets as p
from broker.mqtt.codec import Splitter, decode, encode
from broker.mqtt.packets import BadPacket
from broker.mqtt.session import Closed, Session
from broker.settings import MqttLimits

LIMITS = MqttLimits(packets_per_sec=1e9, bytes_per_sec=1e12, queued=3, in_flight=3, unacknowledged=3)
FROM_SERVER = (
    p.CONNACK, p.PUBLISH, p.PUBACK, p.PUBREC, p.PUBCOMP, p.SUBACK, p.UNSUBACK, p.PINGRESP, p.DISCONNECT,
)  # fmt: skip


def kept(rule: bool, sentence: str) -> None:
    """Raises `AssertionError` with the sentence if a rule does not hold."""
    assert rule, sentence


def packets(data: bytes) -> None:
    """First byte: the version, how the owner behaves, and whether a good CONNECT comes first."""
    choice, stream = data[0] if data else 0, data[1:]
    version = 5 if choice & 1 else 4
    coded(stream, version)
    if choice & 2:
        stream = encode(p.Connect(client_id="door", version=version, keepalive=60), version) + stream
    Owner(choice).runs(stream)


def coded(stream: bytes, version: int) -> None:
    """What can be read is written so that it reads the same, however the stream was cut."""
    splitter, cut = Splitter(65_536), []
    for at in range(0, len(stream), 3):
        splitter.put(stream[at : at + 3])
        try:
            while (each := splitter.next()) is not None:
                cut.append(each)
        except BadPacket:
            break
    whole, at_once = Splitter(65_536), []
    whole.put(stream)
    try:
        while (each := whole.next()) is not None:
            at_once.append(each)
    except BadPacket:
        pass
    assert cut == at_once, "a stream that reads otherwise when it is cut"
    for first, body in at_once:
        try:
            packet = decode(first, body, version)
        except BadPacket as bad:
            kept(0x80 <= bad.reason <= 0xFF, "no reason code of MQTT 5")
            continue
        spoken = packet.version if isinstance(packet, p.Connect) else version
        again = Splitter(1_000_000)
        again.put(encode(packet, spoken))
        found = again.next()
        assert found is not None
        assert decode(*found, spoken) == packet, "a packet that reads otherwise when it is written again"


class Owner:
    """Accepts or refuses, acknowledges at once or later, and sends messages of its own."""

    def __init__(self, choice: int) -> None:
        self.choice, self.now = choice, 100.0
        self.session = Session(LIMITS, self.now)
        self.splitter = Splitter(1_000_000)
        self.waiting: list[int] = []
        self.closed = 0
        self.version = 4

    def runs(self, stream: bytes) -> None:
        step = (1, 7, 64, 4_096)[self.choice >> 2 & 3]
        for at in range(0, len(stream), step):
            self.session.receive(stream[at : at + step], self.now)
            self.looks()
            for _ in range(20):
                if self.session.resume_at is None or self.session.state == "closed":
                    break
                self.now = max(self.now, self.session.resume_at)
                self.session.work(self.now)
                self.looks()
        self.now += 1_000
        self.session.tick(self.now)
        self.looks()
        self.session.lost()
        self.looks()
        assert self.closed == 1, "a session ends once"
        assert self.session.in_flight == 0

    def looks(self) -> None:
        while self.session.effects:
            effects, self.session.effects = self.session.effects, []
            for effect in effects:
                assert not self.closed, "something came after the end"
                self.takes(effect)
        for data in self.session.out:
            self.splitter.put(data)
        self.session.out.clear()
        while (cut := self.splitter.next()) is not None:
            packet = decode(*cut, self.session.version)
            kind = cut[0] >> 4
            assert kind in FROM_SERVER, f"a server never sends {packet}"
            assert kind != p.DISCONNECT or self.session.version == 5
        assert len(self.waiting) <= max(LIMITS.unacknowledged, LIMITS.receive_maximum)

    def takes(self, effect: object) -> None:
        if isinstance(effect, Closed):
            self.closed += 1
            assert list(effect.unanswered) == self.waiting, "a message without its PUBACK is not named"
        elif isinstance(effect, p.Connect):
            if self.choice & 0x40:
                self.session.refuse(p.Reason.NOT_AUTHORIZED, "no")
            else:
                self.session.accept(self.now, shared=bool(self.choice & 0x80))
        elif isinstance(effect, p.Publish) and effect.qos:
            self.waiting.append(effect.packet_id)
            late = self.choice & 0x10 and len(self.waiting) < LIMITS.unacknowledged
            if self.session.state == "open" and not late:
                for mid in reversed(self.waiting):
                    self.session.acknowledge(mid)
                self.waiting.clear()
                self.session.work(self.now)
        elif isinstance(effect, p.Subscribe):
            self.session.granted(effect, [min(each.qos, 1) for each in effect.filters])
            if self.choice & 0x20 and self.session.state == "open":
                self.session.publish(p.Publish("iotee/dev/door/rls", b"1", 1), "tag", self.now, self.now + 5)
        elif isinstance(effect, p.Unsubscribe):
            self.session.granted(effect, [0] * len(effect.topics))
