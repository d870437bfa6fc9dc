"""The MQTT link: one connection to whatever MQTT server there is, kept up until it is closed.

It passes messages on and withholds each PUBACK until it is told; it never decides, keeps anything for a
dead connection or sends anything twice. Private parts of aiomqtt and paho are used here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import aiomqtt
import structlog
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.mqtt_receipts import Receipts
from broker.mqtt_url import Version, parse_url
from broker.seams import Entropy, LinkEvents, Message, Outgoing, Receipt

logger = structlog.get_logger()

OPEN_WITHIN_SEC = 10
BACKOFF_SEC = (0.1, 5.0)
# The server keeps our session, and the answers in it, for as long as a long weekend's outage.
SESSION_EXPIRY_SEC = 7 * 86_400
# Answers a second are at most this window divided by the time of a commit: the default of 20 would throttle.
WINDOW = 1_000
REFUSED = 0x80
# 1 is how a server that knows only MQTT 3.1.1 says 0x84.
WRONG_VERSION = frozenset({1, 0x84})

_SILENT = logging.getLogger("broker.mqtt.aiomqtt")
_SILENT.disabled = True


async def _connected_socket(host: str, port: int, tls: ssl.SSLContext | None) -> socket.socket:
    """Not left to paho: it would do this in a thread, which cannot be cancelled."""
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host} has no address")
    for family, kind, proto, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            # Without it Nagle's algorithm and delayed acknowledgements make 88 ms of a 0.7 ms round trip.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
            if tls is not None:
                sock = secured = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                await _handshake(secured)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
        else:
            return sock
    raise failure


async def _handshake(sock: ssl.SSLSocket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            loop.add_reader(sock.fileno(), ready.set)
        except ssl.SSLWantWriteError:
            loop.add_writer(sock.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(sock.fileno())
            loop.remove_writer(sock.fileno())


def _publish_properties(outgoing: Outgoing) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if outgoing.correlation is not None:
        properties.CorrelationData = outgoing.correlation
    if outgoing.response_topic is not None:
        properties.ResponseTopic = outgoing.response_topic
    if outgoing.expiry_sec is not None:
        properties.MessageExpiryInterval = outgoing.expiry_sec
    if outgoing.user_properties:
        properties.UserProperty = list(outgoing.user_properties)
    return properties


def _code(answer: int | ReasonCode | None) -> int:
    return answer.value if isinstance(answer, ReasonCode) else answer or 0


class _Connection:
    """One connection from its TCP socket to its end. A new one each time: aiomqtt's re-used client floods.

    paho calls back while it holds its locks, so what it says is put in `_inbox` and told from there.
    """

    def __init__(self, client: aiomqtt.Client, events: LinkEvents, *, version: Version) -> None:
        self.up = False
        self.lost = client._disconnected
        self.receipts = Receipts()
        self._five = version == "5"
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._aio = client
        self._paho = client._client
        self._paho.disable_logger()
        self._paho.manual_ack_set(True)
        self._paho.on_message = self._on_message
        self._paho.on_publish = self._on_publish
        self._paho.on_disconnect = self._on_disconnect
        self._inbox: deque[tuple[Callable[[], None], str]] = deque()
        self._entering: asyncio.Task[Any] | None = None

    async def open(
        self, host: str, port: int, tls: ssl.SSLContext | None, subscriptions: Sequence[str]
    ) -> None:
        """Returns when the server has granted everything; messages wait in the inbox until `announce`."""
        async with asyncio.timeout(OPEN_WITHIN_SEC):
            connected = await _connected_socket(host, port, tls)
            self._paho._create_socket = lambda: connected  # type: ignore[method-assign]
            self._entering = asyncio.create_task(self._aio.__aenter__())
            # Shielded: part of it runs in a thread, and `end` must clear up after that.
            await asyncio.shield(self._entering)
            sock = self._paho.socket()
            if sock is None:
                raise aiomqtt.MqttError("the server closed the connection after CONNACK")
            # With no one to register writes with, paho writes at once, as `publish` promises.
            self._paho.on_socket_register_write = None
            self._loop.add_reader(sock.fileno(), self._readable)
            codes = await self._subscribe(subscriptions)
        for topic, value in zip(subscriptions, codes, strict=True):
            if value >= REFUSED:
                logger.error("mqtt.subscription_refused", topic=topic, code=value)
                raise aiomqtt.MqttError(f"the server refused the subscription to {topic}: {value:#04x}")

    async def _subscribe(self, subscriptions: Sequence[str]) -> list[int]:
        """The server's codes. aiomqtt alone would not notice here that the connection has ended."""
        granted = asyncio.create_task(self._aio.subscribe([(topic, 1) for topic in subscriptions]))
        either: set[asyncio.Future[Any]] = {granted, self.lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not granted.done():
                raise aiomqtt.MqttError(f"the connection ended before SUBACK: {self.lost.exception()}")
        finally:
            granted.cancel()
        return [_code(answer) for answer in granted.result()]

    def announce(self) -> None:
        self.up = True
        self._tell(self._events.link_up, "link_up")
        self._drain()

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        if not self.up:
            return False
        if len(self._paho._out_messages) >= WINDOW:
            # Ours are far fewer (send slots), so this server has stopped acknowledging: start afresh.
            self._lose(aiomqtt.MqttError(f"{WINDOW} messages are not acknowledged"))
            return False
        properties = _publish_properties(outgoing) if self._five else None
        info = self._paho.publish(outgoing.topic, outgoing.payload, 1, False, properties)
        if info.rc in (paho.MQTT_ERR_NO_CONN, paho.MQTT_ERR_QUEUE_SIZE):
            return False
        self.receipts.expect(info.mid, done)
        self._register_write()
        return True

    def puback(self, mid: int) -> None:
        if self.up:
            self._paho.ack(mid, 1)
            self._register_write()

    async def end(self) -> None:
        """Says goodbye if there is anybody, and leaves nothing of itself in the loop."""
        self.up = False
        self._lose(aiomqtt.MqttError("closed"))
        self.lost.exception()  # looked at, so that the loop does not report it
        if self._entering is None:
            return
        self._paho.disconnect()
        if not self._aio._connected.done():
            self._aio._connected.set_exception(aiomqtt.MqttError("closed"))
            self._aio._connected.exception()
        await asyncio.wait({self._entering})
        if not self._entering.cancelled():
            self._entering.exception()
        self._paho._sock_close()
        if self._aio._misc_task is not None:
            self._aio._misc_task.cancel()
            await asyncio.wait({self._aio._misc_task})

    def _on_message(self, _client: Any, _userdata: Any, raw: paho.MQTTMessage) -> None:
        message = Message(
            topic=raw._topic.decode(errors="replace"),
            payload=bytes(raw.payload),
            qos=raw.qos,
            dup=raw.dup,
            retain=raw.retain,
            correlation=getattr(raw.properties, "CorrelationData", None),
            token=(self, raw.mid) if raw.qos else None,
        )
        self._inbox.append((partial(self._events.message, message), message.topic))

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: ReasonCode, _more: Any) -> None:
        self._inbox.append((partial(self.receipts.settle, mid, reason.value), "receipt"))

    def _on_disconnect(self, *told: Any) -> None:
        # aiomqtt ignores an end before CONNACK and would wait for its time-out.
        if not self._aio._connected.done():
            self._aio._connected.set_exception(aiomqtt.MqttError("the server closed the connection"))
        else:
            self._aio._on_disconnect(*told)

    def _readable(self) -> None:
        try:
            self._paho.loop_read()
            # TLS may have decrypted more than was read, and the socket will not say so.
            while isinstance(sock := self._paho.socket(), ssl.SSLSocket) and sock.pending():
                self._paho.loop_read()
        except Exception as error:  # a broken packet, in whatever way paho stumbles over it
            self._lose(error)
        self._drain()
        self._register_write()

    def _writable(self) -> None:
        try:
            self._paho.loop_write()
        except Exception as error:
            self._lose(error)

    def _register_write(self) -> None:
        """What the socket did not take at once goes out when it can; paho's unregistering ends that."""
        sock = self._paho.socket()
        if sock is not None and self._paho.want_write():
            self._loop.add_writer(sock.fileno(), self._writable)

    def _drain(self) -> None:
        while self.up and self._inbox:
            self._tell(*self._inbox.popleft())

    def _tell(self, call: Callable[[], None], about: str) -> None:
        try:
            call()
        except Exception:
            logger.exception("mqtt.callback_failed", about=about)

    def _lose(self, error: Exception) -> None:
        if not self.lost.done():
            self.lost.set_exception(error)


class MqttLink:
    """`broker.seams.Link` over a real server. `run` once, in a task; `close` from anywhere.

    `why` is why the link is down, None while it is up; `version` is the MQTT version in use or next tried.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        subscriptions: Sequence[str],
        events: LinkEvents,
        clean_session: bool,
        entropy: Entropy,
        keepalive: int = 10,
    ) -> None:
        self.address = parse_url(url)
        self.version: Version = self.address.version or "5"
        self.why: str | None = "not connected yet"
        self._client_id = client_id
        self._subscriptions = subscriptions
        self._events = events
        self._clean_session = clean_session
        self._entropy = entropy
        self._keepalive = keepalive
        self._tls = ssl.create_default_context() if self.address.tls else None
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def up(self) -> bool:
        return self._connection is not None and self._connection.up

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        return self._connection is not None and self._connection.publish(outgoing, done)

    def puback(self, message: Message) -> None:
        if message.token is not None:
            connection, mid = message.token
            connection.puback(mid)

    async def run(self) -> None:
        """Keeps the link up until `close`."""
        self._task = asyncio.create_task(self._forever())
        try:
            await asyncio.wait({self._task})
        finally:
            await self.close()
        if not self._task.cancelled():
            self._task.result()

    async def close(self) -> None:
        self._closing = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=1)

    async def _forever(self) -> None:
        failures = 0
        while not self._closing:
            failures = 0 if await self._once() else failures + 1
            shortest, longest = BACKOFF_SEC
            # The exponent is bounded: 2 ** 2000 would be more than a float holds.
            ceiling = min(longest, shortest * 2 ** min(failures + 1, 10))
            await asyncio.sleep(self._entropy.uniform(shortest, ceiling))

    async def _once(self) -> bool:
        """One connection, as long as it lasts. Returns whether the link was up."""
        connection = _Connection(self._client(), self._events, version=self.version)
        why = "closed"
        try:
            await connection.open(self.address.host, self.address.port, self._tls, self._subscriptions)
            self._up(connection)
            await asyncio.wait({connection.lost})
            why = str(connection.lost.exception() or "the server ended the connection")
            return True
        except (aiomqtt.MqttError, OSError) as error:
            self._failed(error)
            return False
        finally:
            self._down(connection, why)
            await connection.end()

    def _client(self) -> aiomqtt.Client:
        five = self.version == "5"
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0 if self._clean_session else SESSION_EXPIRY_SEC
        properties.ReceiveMaximum = WINDOW
        return aiomqtt.Client(
            self.address.host,
            self.address.port,
            username=self.address.username,
            password=self.address.password,
            identifier=self._client_id,
            logger=_SILENT,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            clean_session=None if five else self._clean_session,
            clean_start=self._clean_session if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties if five else None,
            keepalive=self._keepalive,
            max_inflight_messages=WINDOW,
            timeout=OPEN_WITHIN_SEC,
        )

    def _up(self, connection: _Connection) -> None:
        self._connection = connection
        self.why = None
        logger.info("mqtt.link_up", server=self.address.shown, version=self.version)
        connection.announce()

    def _down(self, connection: _Connection, why: str) -> None:
        if self._connection is connection:
            self._connection = None
            self.why = why
            connection.up = False
            log = logger.info if self._closing else logger.warning
            log("mqtt.link_down", server=self.address.shown, why=why)
            connection._tell(partial(self._events.link_down, why), "link_down")
            connection.receipts.forget()

    def _failed(self, error: Exception) -> None:
        code = _code(error.rc) if isinstance(error, aiomqtt.MqttCodeError) else None
        if code in WRONG_VERSION and self.version == "5" and self.address.version is None:
            self.version = "3.1.1"
        self.why = str(error) or f"no answer within {OPEN_WITHIN_SEC} s"
        logger.warning("mqtt.connect_failed", server=self.address.shown, why=self.why)
