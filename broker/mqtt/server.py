"""The embedded MQTT server: amqtt in our loop, for trying out and small sites.

It lets a device in by its token and to its own topics only, keeps nothing for anybody who is away, and tells
who is there. It must never touch what belongs to a client id before the password is right, nor acknowledge
what a device says before our own link has.
Private parts of amqtt are used here and in `mqtt_connection`, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import structlog
from amqtt.broker import Broker  # type: ignore[import-untyped]
from amqtt.contexts import Action, BrokerConfig, ListenerConfig  # type: ignore[import-untyped]
from amqtt.errors import (  # type: ignore[import-untyped]
    AMQTTError,
    BrokerError,
    NoDataError,
    ProtocolHandlerError,
)
from amqtt.mqtt.publish import PublishPacket  # type: ignore[import-untyped]
from amqtt.mqtt.subscribe import SubscribePacket  # type: ignore[import-untyped]
from amqtt.mqtt.unsubscribe import UnsubscribePacket  # type: ignore[import-untyped]
from amqtt.session import Session  # type: ignore[import-untyped]

from broker.mqtt.access import LINK_USER, SERVICE_USER, Access, Claim, Peer
from broker.mqtt.connection import CLOSE_WITHIN_SEC, Handler, Packets, Writer
from broker.mqtt.handover import Said
from broker.seams import Presence

logger = structlog.get_logger()

# MQTT allows a client one and a half times its keep-alive.
KEEPALIVE_GRACE = 1.5
# amqtt needs 52 kB a connection, and 45 s to let 7,000 in.
CROWDED = 500
REFUSED = 0x80


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
        self._links: set[Handler] = set()
        self.services: set[Handler] = set()
        # By device: the packet ids our link may have had though the device was cut off before its PUBACK.
        self._had: dict[str, set[int]] = {}

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
        writer = Writer(stream_writer)
        try:
            await self._serve(task, Packets(stream, self._server.max_packet_bytes), writer)
        except asyncio.CancelledError:
            logger.debug("mqtt.embedded_cut_off", address=writer.get_peer_info())
        except Exception as error:  # whatever a stranger's bytes make amqtt stumble over
            log = logger.debug if isinstance(error, NoDataError) else logger.info
            log("mqtt.embedded_failed", address=writer.get_peer_info(), why=str(error))
        finally:
            del self.tasks[task]
            await writer.close()

    async def _serve(self, task: asyncio.Task[Any], packets: Packets, writer: Writer) -> None:
        handler, session = await Handler.init_from_connect(packets, writer, self.plugins_manager)
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
        if peer.kind == SERVICE_USER:
            self.services.add(handler)
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

    async def _forget(self, session: Session, handler: Handler) -> None:
        self._sessions.pop(session.client_id, None)
        self._links.discard(handler)
        self.services.discard(handler)
        handler.outbox.end()
        self._offer_again()
        if had := handler.spoken.end():
            self._had[session.client_id] = had
        else:
            self._had.pop(session.client_id, None)
        if handler.dropped:
            logger.info("mqtt.embedded_qos0_lost", peer=handler.peer.name, messages=handler.dropped)
        await self._del_all_subscriptions(session)
        self._wildcards &= self._subscriptions.keys()
        self._server.noticed(handler, online=False)
        # amqtt waits for ever for a reader that was stopped before it began.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WITHIN_SEC):
                await handler.stop()

    async def _converse(self, session: Session, handler: Handler) -> None:
        """Deals with what the client sends, in order, until it leaves."""
        while True:
            item = await handler.next()
            if isinstance(item, PublishPacket):
                await self._said(handler, item)
            elif isinstance(item, SubscribePacket):
                codes = [await self._subscribe(session, topic, qos) for topic, qos in item.payload.topics]
                await handler.mqtt_acknowledge_subscription(item.variable_header.packet_id, codes)
                self._server.noticed(handler, online=self._listens(session))
                if handler.peer.kind == LINK_USER and 1 in codes:
                    self._links.add(handler)
                    self._offer_again()
            elif isinstance(item, UnsubscribePacket):
                for topic in item.payload.topics:
                    if self._del_subscription(topic, session) and not self._subscriptions[topic]:
                        del self._subscriptions[topic]
                await handler.mqtt_acknowledge_unsubscription(item.variable_header.packet_id)
                self._server.noticed(handler, online=self._listens(session))
            else:
                if item is None and session.will_flag and not self.closing:
                    await self._published(
                        handler, Said(handler.spoken, session.will_topic, session.will_message)
                    )
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
        handler: Handler = self._sessions[session.client_id][1]
        return handler.peer.subscribe(topic) or self._deny(handler, "subscribe", topic)

    def _deny(self, handler: Handler, action: str, topic: str) -> bool:
        """Says so once a connection: who does this can do it often."""
        if not handler.denied:
            handler.denied = True
            logger.warning("mqtt.embedded_denied", peer=handler.peer.name, action=action, topic=topic)
        return False

    async def _said(self, handler: Handler, packet: Any) -> None:
        said = Said(handler.spoken, packet.topic_name, packet.data)
        if handler.peer.kind == "device":
            said.qos, said.packet_id = packet.qos, packet.packet_id
            said.dup = packet.dup_flag and packet.packet_id in self._had.get(handler.peer.name, ())
            handler.spoken.waiting.append(said)
        await self._published(handler, said)

    async def _published(self, handler: Handler, said: Said) -> None:
        """To all who may have it, never retained. amqtt's own way loses some when somebody subscribes."""
        if not handler.peer.publish(said.topic):
            self._deny(handler, "publish", said.topic)
            said.take()
            return
        self._offer(said)
        for target, qos in self._targets(said.topic):
            if target.peer.kind == LINK_USER and qos:
                continue
            if target.window.locked():
                logger.warning("mqtt.embedded_overrun", peer=target.peer.name, topic=said.topic)
                continue
            await target.window.acquire()
            task = asyncio.create_task(self._deliver(target, said.topic, said.data, qos))
            self.deliveries.add(task)
            task.add_done_callback(self.deliveries.discard)

    def _targets(self, topic: str) -> list[tuple[Handler, int]]:
        filters = [topic, *(each for each in self._wildcards if self._matches(topic, each))]
        known = [target for each in filters for target in self._subscriptions.get(each, ())]
        targets = [
            (self._sessions[session.client_id][1], qos)
            for session, qos in known
            if session.client_id in self._sessions
        ]
        return [(target, qos) for target, qos in targets if target.peer.receive(topic)]

    def _offer(self, said: Said) -> None:
        """To our link. While there is none it waits with its device, but for QoS 0."""
        for target, qos in self._targets(said.topic):
            if target in self._links and qos:
                target.outbox.offer(said)
        if not said.owed and (self._links or not said.qos):
            said.take()

    def _offer_again(self) -> None:
        for _, handler in self._sessions.values():
            for said in handler.spoken.adrift():
                self._offer(said)

    async def _deliver(self, target: Handler, topic: str, data: bytes, qos: int) -> None:
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

    def serves(self) -> bool:
        """Is there anybody who may listen to events?"""
        return self._broker is not None and bool(self._broker.services)

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

    def noticed(self, handler: Handler, *, online: bool) -> None:
        if self._broker is not None and handler.peer.kind == "device" and handler.online != online:
            handler.online = online
            tell = self._presence.device_online if online else self._presence.device_offline
            tell(handler.peer.name)
