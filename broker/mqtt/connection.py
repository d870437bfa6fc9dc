"""One connection to the embedded MQTT server: its packets, its end, and when it is told that it was heard.

What a client sends goes through one queue, so that nothing overtakes. It must never acknowledge what a device
says before it is taken. Private parts of amqtt are used here and in `mqtt_server`, and nowhere else.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import structlog
from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter  # type: ignore[import-untyped]
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler  # type: ignore[import-untyped]
from amqtt.mqtt.puback import PubackPacket  # type: ignore[import-untyped]
from amqtt.mqtt.pubcomp import PubcompPacket  # type: ignore[import-untyped]
from amqtt.mqtt.publish import PublishPacket  # type: ignore[import-untyped]
from amqtt.mqtt.pubrec import PubrecPacket  # type: ignore[import-untyped]

from broker.mqtt.access import LINK_USER, Peer
from broker.mqtt.handover import Outbox, Said, Spoken

logger = structlog.get_logger()

CONNECT_WITHIN_SEC = 10
CLOSE_WITHIN_SEC = 1
# Messages of one device that our link has not taken; beyond it QoS 0 is lost, and QoS 1 not read.
UNREAD = 100
# Unacknowledged messages to one client. Our link gets more later; anybody else loses what is beyond it.
WINDOW = 1_000


class Packets(StreamReaderAdapter):  # type: ignore[misc]
    """Whole packets, each within `patience` and no longer than `longest`; after a failure, only the end."""

    def __init__(self, reader: asyncio.StreamReader, longest: int) -> None:
        super().__init__(reader)
        self.patience: float | None = CONNECT_WITHIN_SEC
        self.ready = asyncio.Event()
        self.ready.set()
        self._longest = longest
        self._packet = b""
        self._failed = False

    async def read(self, n: int = -1) -> bytes:
        if n == 0:
            return b""
        if not self._packet and not self._failed:
            # amqtt handles each packet in a task, and cancels those not begun when it reads the end.
            await asyncio.sleep(0)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.patience):
                    # Whoever may not be read for so long is cut off: it cannot be told alive from dead.
                    await self.ready.wait()
                    self._packet = await self._next()
        if self._failed or not 0 < n <= len(self._packet):
            self._failed = True
            raise ConnectionResetError  # which amqtt takes for the end of the stream
        wanted, self._packet = self._packet[:n], self._packet[n:]
        return wanted

    async def _next(self) -> bytes:
        packet = bytearray(await self._reader.readexactly(2))
        length = packet[1] & 0x7F
        while packet[-1] & 0x80 and len(packet) < 5:
            packet += await self._reader.readexactly(1)
            length |= (packet[-1] & 0x7F) << 7 * (len(packet) - 2)
        if length > self._longest or packet[-1] & 0x80:
            logger.warning("mqtt.embedded_too_large", size=length, limit=self._longest)
            return b""
        return bytes(packet + await self._reader.readexactly(length))


class Writer(StreamWriterAdapter):  # type: ignore[misc]
    """A writer whose closing does not wait for a client that has stopped reading."""

    is_closed: bool

    def write(self, data: bytes) -> None:
        if not self._writer.is_closing():  # where uvloop raises
            super().write(data)

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._writer.close()
            try:
                async with asyncio.timeout(CLOSE_WITHIN_SEC / 2):
                    await self._writer.wait_closed()
            except OSError:  # a time-out too
                self._writer.transport.abort()


class Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """One connection's protocol.

    amqtt's own queues forget what is in them, PUBACKed or not, as soon as the client says goodbye.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.peer: Peer
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.online = False
        self.denied = False
        self.dropped = 0
        self.gone = asyncio.Event()
        self.window = asyncio.Semaphore(WINDOW)
        self.spoken = Spoken(self._answer)
        self.outbox = Outbox(self._hand_over, WINDOW)

    def end(self) -> None:
        """As if the client had gone without a word."""
        self.inbox.put_nowait(None)

    async def next(self) -> Any:
        self._read_on()
        return await self.inbox.get()

    @property
    def unread(self) -> int:
        return self.inbox.qsize() + len(self.spoken.waiting)

    def _read_on(self) -> None:
        if self.unread < UNREAD:
            self.reader.ready.set()

    def _answer(self, said: Said) -> None:
        self._acknowledge(said.qos, said.packet_id)
        self._read_on()

    def _acknowledge(self, qos: int, packet_id: int) -> None:
        """With QoS 2 the PUBREC is what makes a message ours."""
        if qos:
            self._write((PubackPacket if qos == 1 else PubrecPacket).build(packet_id))

    def _hand_over(self, packet_id: int, said: Said) -> None:
        """To our link, without amqtt's five seconds, after which it would be lost."""
        self._write(PublishPacket.build(said.topic, said.data, packet_id, said.dup, 1, retain=False))

    def _write(self, packet: Any) -> None:
        if self.writer is not None:
            self.writer.write(packet.to_bytes())

    async def handle_publish(self, packet: Any) -> None:
        if packet.qos > 2:
            self.end()
            return
        if self.peer.kind != "device":
            # Our link is never made to wait: behind its messages are the PUBACKs that the devices wait for.
            self._acknowledge(packet.qos, packet.packet_id)
        elif packet.qos:
            if self.unread + 1 >= UNREAD:
                self.reader.ready.clear()
        elif self.unread >= UNREAD:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("mqtt.embedded_qos0_dropped", peer=self.peer.name, topic=packet.topic_name)
            return
        self.inbox.put_nowait(packet)

    async def handle_pubrel(self, packet: Any) -> None:
        self._write(PubcompPacket.build(packet.packet_id))

    async def handle_puback(self, packet: Any) -> None:
        if self.peer.kind == LINK_USER:
            self.outbox.acknowledged(packet.packet_id)
        else:
            await super().handle_puback(packet)

    async def handle_subscribe(self, packet: Any) -> None:
        self.inbox.put_nowait(packet)

    async def handle_unsubscribe(self, packet: Any) -> None:
        self.inbox.put_nowait(packet)

    async def handle_connect(self, packet: Any) -> None:
        self.end()

    async def handle_disconnect(self, packet: Any) -> None:
        self.inbox.put_nowait(packet)

    async def _send_packet(self, packet: Any) -> None:
        """amqtt's own raises in tasks that nobody looks at when a connection ends in the middle."""
        if self.writer is not None:
            with suppress(OSError):
                async with self._write_lock:
                    await packet.to_stream(self.writer)
