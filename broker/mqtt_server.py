"""The embedded MQTT server: amqtt in our loop, for trying out and small sites.

It lets a device in by its token and to its own topics only, keeps nothing for anybody who is away, and tells
who is there. It must never touch what belongs to a client id before the password is right.
Private parts of amqtt are used here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import structlog
from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter  # type: ignore[import-untyped]
from amqtt.broker import Broker  # type: ignore[import-untyped]
from amqtt.contexts import Action, BrokerConfig, ListenerConfig  # type: ignore[import-untyped]
from amqtt.errors import (  # type: ignore[import-untyped]
    AMQTTError,
    BrokerError,
    NoDataError,
    ProtocolHandlerError,
)
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler  # type: ignore[import-untyped]
from amqtt.mqtt.subscribe import SubscribePacket  # type: ignore[import-untyped]
from amqtt.mqtt.unsubscribe import UnsubscribePacket  # type: ignore[import-untyped]
from amqtt.session import ApplicationMessage, Session  # type: ignore[import-untyped]

from broker.mqtt_access import LINK_USER, Access, Claim, Peer
from broker.seams import Presence

logger = structlog.get_logger()

CONNECT_WITHIN_SEC = 10
CLOSE_WITHIN_SEC = 1
# MQTT allows a client one and a half times its keep-alive.
KEEPALIVE_GRACE = 1.5
# Packets of one device that wait to be dealt with; beyond it we stop reading from it.
UNREAD = 100
# Unacknowledged messages to one client. Our link is waited for; anybody else loses what is beyond it.
WINDOW = 1_000
# amqtt needs 52 kB a connection, and 45 s to let 7,000 in.
CROWDED = 500
REFUSED = 0x80


class _Packets(StreamReaderAdapter):  # type: ignore[misc]
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
            await self.ready.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.patience):
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


class _Writer(StreamWriterAdapter):  # type: ignore[misc]
    """A writer whose closing does not wait for a client that has stopped reading."""

    is_closed: bool

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._writer.close()
            try:
                async with asyncio.timeout(CLOSE_WITHIN_SEC / 2):
                    await self._writer.wait_closed()
            except OSError:  # a time-out too
                self._writer.transport.abort()


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """One connection's protocol. What the client sends goes through one queue, so that nothing overtakes.

    amqtt's own queues forget what is in them, PUBACKed or not, as soon as the client says goodbye.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.peer: Peer
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.online = False
        self.denied = False
        self.gone = asyncio.Event()
        self.window = asyncio.Semaphore(WINDOW)

    def end(self) -> None:
        """As if the client had gone without a word."""
        self.inbox.put_nowait(None)

    async def next(self) -> Any:
        item = await self.inbox.get()
        if self.inbox.qsize() < UNREAD:
            self.reader.ready.set()
        return item

    async def handle_publish(self, packet: Any) -> None:
        if packet.qos > 2:
            self.end()
            return
        await super().handle_publish(packet)
        # Our link is never made to wait: behind its messages are the PUBACKs that the devices wait for.
        if self.peer.kind == "device" and self.inbox.qsize() >= UNREAD:
            self.reader.ready.clear()

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


class _Broker(Broker):  # type: ignore[misc]
    """amqtt's broker with its own way in and its own routing, and nothing kept."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__(BrokerConfig(listeners={"default": ListenerConfig()}, plugins={}))
        self.closing = False
        # Every connection's task; with the client id it claims until it is let in.
        self.tasks: dict[asyncio.Task[Any], str | None] = {}
        self.deliveries: set[asyncio.Task[None]] = set()
        self._server = server
        self._wildcards: set[str] = set()

    async def _create_server_instance(self, *_: Any) -> asyncio.Server:
        return await asyncio.start_server(self._accept, self._server.host, self._server.port)

    async def _broadcast_loop(self) -> None:
        """Nothing to do: messages are routed as they come."""

    async def _session_monitor(self) -> None:
        """Nothing to do: a session ends with its connection."""

    async def _accept(self, stream: asyncio.StreamReader, stream_writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks[task] = None
        writer = _Writer(stream_writer)
        try:
            await self._serve(task, _Packets(stream, self._server.max_packet_bytes), writer)
        except asyncio.CancelledError:
            logger.debug("mqtt.embedded_cut_off", address=writer.get_peer_info())
        except Exception as error:  # whatever a stranger's bytes make amqtt stumble over
            log = logger.debug if isinstance(error, NoDataError) else logger.info
            log("mqtt.embedded_failed", address=writer.get_peer_info(), why=str(error))
        finally:
            del self.tasks[task]
            await writer.close()

    async def _serve(self, task: asyncio.Task[Any], packets: _Packets, writer: _Writer) -> None:
        handler, session = await _Handler.init_from_connect(packets, writer, self.plugins_manager)
        self.tasks[task] = session.client_id
        packets.patience = session.keep_alive * KEEPALIVE_GRACE or None
        session.keep_alive = 0  # `patience` watches instead, a packet's whole length
        session.delivered_message_queue = handler.inbox
        peer = await self._admit(session)
        handler.attach(session, packets, writer)
        if peer is None:
            logger.warning("mqtt.embedded_refused", client_id=session.client_id, user=session.username)
            await handler.mqtt_connack_authorize(False)
            return
        handler.peer, session.client_id, session.clean_session = peer, peer.name, True
        while (old := self._sessions.get(peer.name)) is not None:
            old[1].end()
            await old[1].gone.wait()
        self._sessions[peer.name] = (session, handler)
        try:
            await handler.mqtt_connack_authorize(True)
            await handler.start()
            self.tasks[task] = None
            self._server.arrived()
            await self._converse(session, handler)
        finally:
            try:
                await self._forget(session, handler)
            finally:
                handler.gone.set()

    async def _admit(self, session: Session) -> Peer | None:
        if not session.username or not session.password:
            return None
        will_topic = session.will_topic if session.will_flag else None
        claim = Claim(session.client_id, session.username, session.password, will_topic)
        return await self._server.access.admit(claim)

    async def _forget(self, session: Session, handler: _Handler) -> None:
        self._sessions.pop(session.client_id, None)
        await self._del_all_subscriptions(session)
        self._wildcards &= self._subscriptions.keys()
        self._server.noticed(handler, online=False)
        # amqtt waits for ever for a reader that was stopped before it began.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WITHIN_SEC):
                await handler.stop()

    async def _converse(self, session: Session, handler: _Handler) -> None:
        """Deals with what the client sends, in order, until it leaves."""
        while True:
            item = await handler.next()
            if isinstance(item, ApplicationMessage):
                await self._published(handler, item.topic, item.data)
            elif isinstance(item, SubscribePacket):
                codes = [await self._subscribe(session, topic, qos) for topic, qos in item.payload.topics]
                await handler.mqtt_acknowledge_subscription(item.variable_header.packet_id, codes)
                self._server.noticed(handler, online=self._listens(session))
            elif isinstance(item, UnsubscribePacket):
                for topic in item.payload.topics:
                    if self._del_subscription(topic, session) and not self._subscriptions[topic]:
                        del self._subscriptions[topic]
                await handler.mqtt_acknowledge_unsubscription(item.variable_header.packet_id)
                self._server.noticed(handler, online=self._listens(session))
            else:
                if item is None and session.will_flag and not self.closing:
                    await self._published(handler, session.will_topic, session.will_message)
                return

    async def _subscribe(self, session: Session, topic: str, qos: int) -> int:
        code: int = await self.add_subscription((topic, min(qos, 1)), session)
        if code != REFUSED and not {"+", "#"}.isdisjoint(topic):
            self._wildcards.add(topic)
        return code

    def _listens(self, session: Session) -> bool:
        access = self._server.access
        commands = access.topics(session.client_id, access.command_suffixes)
        return any(known is session for each in commands for known, _ in self._subscriptions.get(each, ()))

    async def _topic_filtering(self, session: Session, topic: str, action: Action) -> bool:
        """amqtt asks this of subscriptions."""
        handler: _Handler = self._sessions[session.client_id][1]
        return handler.peer.subscribe(topic) or self._deny(handler, "subscribe", topic)

    def _deny(self, handler: _Handler, action: str, topic: str) -> bool:
        """Says so once a connection: who does this can do it often."""
        if not handler.denied:
            handler.denied = True
            logger.warning("mqtt.embedded_denied", peer=handler.peer.name, action=action, topic=topic)
        return False

    async def _published(self, handler: _Handler, topic: str, data: bytes) -> None:
        """To all who may have it, never retained. amqtt's own way loses some when somebody subscribes."""
        if not handler.peer.publish(topic):
            self._deny(handler, "publish", topic)
            return
        filters = [topic, *(each for each in self._wildcards if self._matches(topic, each))]
        for session, qos in [target for each in filters for target in self._subscriptions.get(each, ())]:
            _, target = self._sessions.get(session.client_id, (None, None))
            if target is None or not target.peer.receive(topic):
                continue
            if target.window.locked() and target.peer.kind != LINK_USER:
                logger.warning("mqtt.embedded_overrun", peer=target.peer.name, topic=topic)
                continue
            await target.window.acquire()
            task = asyncio.create_task(self._deliver(target, topic, data, qos))
            self.deliveries.add(task)
            task.add_done_callback(self.deliveries.discard)

    async def _deliver(self, target: _Handler, topic: str, data: bytes, qos: int) -> None:
        try:
            if not target.gone.is_set():
                await target.mqtt_publish(topic, data, qos, retain=False)
        except (AMQTTError, ProtocolHandlerError, TimeoutError) as error:
            logger.info("mqtt.embedded_undelivered", peer=target.peer.name, topic=topic, why=str(error))
        finally:
            target.window.release()


class EmbeddedServer:
    """The server as the rest of the broker sees it. Once `close` has begun `presence` hears nothing more."""

    def __init__(
        self, *, host: str, port: int, access: Access, presence: Presence, max_packet_bytes: int = 262_144
    ) -> None:
        self.host = host
        self.port = port
        self.access = access
        self.max_packet_bytes = max_packet_bytes
        self._presence = presence
        self._broker: _Broker | None = None
        self._crowded = False

    @property
    def url(self) -> str:
        """For our own link: with its password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt://{LINK_USER}:{quote(self.access.link_password, safe='')}@{host}:{self.port}?v=3.1.1"

    @property
    def connected(self) -> int:
        """How many devices are connected."""
        return 0 if self._broker is None else sum(":" not in name for name in self._broker.sessions)

    async def start(self) -> None:
        """Listens. With port 0 the system gives one, and `port` then says which.

        Raises:
            OSError: the address is taken or not ours.
        """
        # What amqtt says of strangers and time-outs, with tracebacks, is said here in one line each.
        logging.getLogger("amqtt").setLevel(logging.CRITICAL)
        logging.getLogger("transitions").setLevel(logging.CRITICAL)
        broker = _Broker(self)
        try:
            await broker.start()
        except BrokerError as error:
            raise OSError(f"{self.host}:{self.port} cannot be listened on: {error.__cause__}") from error
        self._broker = broker
        self.port = broker._servers["default"].instance.sockets[0].getsockname()[1]
        logger.info("mqtt.embedded_up", host=self.host, port=self.port)

    async def close(self) -> None:
        broker, self._broker = self._broker, None
        if broker is None:
            return
        broker.closing = True
        broker._servers["default"].instance.close()
        tasks: list[asyncio.Task[Any]] = [*broker.tasks, *broker.deliveries]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_WITHIN_SEC)
        await broker.shutdown()

    def disconnect(self, hardware_id: str) -> None:
        """Ends the device's connection, and any on its way in whose token may have been checked before."""
        if self._broker is None:
            return
        for task, client_id in self._broker.tasks.items():
            if client_id == hardware_id:
                task.cancel()
        _, handler = self._broker.sessions.get(hardware_id, (None, None))
        if handler is not None:
            handler.end()

    def arrived(self) -> None:
        if not self._crowded and self.connected > CROWDED:
            self._crowded = True
            advice = "an external server such as Mosquitto carries more"
            logger.warning("mqtt.embedded_crowded", devices=self.connected, advice=advice)

    def noticed(self, handler: _Handler, *, online: bool) -> None:
        if self._broker is not None and handler.peer.kind == "device" and handler.online != online:
            handler.online = online
            tell = self._presence.device_online if online else self._presence.device_offline
            tell(handler.peer.name)
