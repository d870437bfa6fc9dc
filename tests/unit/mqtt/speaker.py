"""The client's side of a session under test: writes packets, reads the answers, and moves the session's
clock."""

from __future__ import annotations

from typing import Any, TypeVar

from broker.mqtt import packets as p
from broker.mqtt.codec import Splitter, decode, encode
from broker.mqtt.packets import Packet
from broker.mqtt.session import Closed, Effect, Session, Taken
from broker.settings import MqttLimits

E = TypeVar("E")
LIMITS = MqttLimits(packets_per_sec=1e9, bytes_per_sec=1e12)


class Speaker:
    """`heard` holds the packets from the session, `effects` what the session reported to its owner."""

    def __init__(self, *, version: int = 5, limits: MqttLimits = LIMITS) -> None:
        self.version = version
        self.now = 1_000.0
        self.session = Session(limits, self.now)
        self.heard: list[Packet] = []
        self.effects: list[Effect] = []
        self._splitter = Splitter(1_000_000)

    def raw(self, data: bytes) -> None:
        self.session.receive(data, self.now)
        self.look()

    def say(self, *packets: Packet) -> None:
        self.raw(b"".join(encode(packet, self.version) for packet in packets))

    def look(self) -> None:
        """Collects the session's output and effects."""
        for data in self.session.out:
            self._splitter.put(data)
        self.session.out.clear()
        while (cut := self._splitter.next()) is not None:
            self.heard.append(decode(*cut, self.version))
        self.effects += self.session.effects
        self.session.effects.clear()

    def connected(self, **more: Any) -> Speaker:
        """Completes CONNECT and CONNACK and clears both lists."""
        settings: dict[str, Any] = {"client_id": "door", "version": self.version, "keepalive": 60} | more
        self.say(p.Connect(**settings))
        self.session.accept(self.now)
        self.look()
        self.heard.clear()
        self.effects.clear()
        return self

    def publish(self, payload: bytes = b"1", *, qos: int = 1, tag: Any = None, **more: Any) -> str:
        expires_at = more.pop("expires_at", None)
        message = p.Publish("iotee/dev/door/rls", payload, qos, **more)
        outcome = self.session.publish(message, tag, self.now, expires_at)
        self.look()
        return outcome

    def acknowledge(self, packet_id: int, reason: int = 0, text: str = "") -> None:
        self.session.acknowledge(packet_id, reason, text)
        self.session.work(self.now)
        self.look()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.session.tick(self.now)
        self.look()

    def told(self, kind: type[E]) -> list[E]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def sent(self, kind: type[E]) -> list[E]:
        return [packet for packet in self.heard if isinstance(packet, kind)]

    @property
    def closed(self) -> Closed | None:
        found = self.told(Closed)
        assert len(found) <= 1
        return found[0] if found else None

    @property
    def taken(self) -> list[tuple[Any, int | None]]:
        return [(taken.tag, taken.reason) for taken in self.told(Taken)]


def said(payload: bytes = b"ok", packet_id: int = 1, **more: Any) -> p.Publish:
    settings: dict[str, Any] = {"qos": 1, "packet_id": packet_id if more.get("qos", 1) else 0} | more
    return p.Publish("iotee/dev/door/ack", payload, **settings)
