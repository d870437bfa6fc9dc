"""The MQTT link: the broker's connection to its MQTT server. It reconnects until it is closed.

The link passes received messages on. It sends the PUBACK of a message only when the caller asks for it. It
makes no decisions, never sends a message twice, and drops its state when a connection ends.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import aiomqtt
import structlog
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from broker.mqtt.client.connection import OPEN_WITHIN_SEC, WINDOW, Connection, HungUp, code_of
from broker.seams import Entropy, LinkEvents, Message, Outgoing, Receipt
from devices.mqtt_url import Version, parse_url
from devices.tls import trust

logger = structlog.get_logger()

BACKOFF_SEC = (0.1, 5.0)
AGAIN_SEC = 0.2
# The other MQTT version is tried after so many ends before a CONNACK. One end can have other reasons.
HANG_UPS = 3
# The MQTT server keeps the session, with queued answers, for 7 days: longer than a long weekend's outage.
SESSION_EXPIRY_SEC = 7 * 86_400
# CONNACK codes for "unsupported protocol version": 0x84 in MQTT 5, 1 from a server that knows only 3.1.1.
WRONG_VERSION = frozenset({1, 0x84})

_SILENT = logging.getLogger("broker.mqtt.aiomqtt")
_SILENT.disabled = True


class MqttLink:
    """`broker.seams.Link` over a real MQTT server. Call `run` once, in a task; call `close` from anywhere.

    `why` says why the link is down; it is None while the link is up. `version` is the MQTT version of the
    current connection, or of the next attempt. Some servers end the connection when they do not know the
    version of a CONNECT (RabbitMQ 3.10). So after a few such ends the other version is tried, in turn, unless
    the URL says the version. `tls`: how an `mqtts` server is verified, else by the system's authorities.
    While `holds` is false, nothing is sent and nothing is connected.
    """

    direct = False

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
        tls: ssl.SSLContext | None = None,
        holds: Callable[[], bool] = lambda: True,
    ) -> None:
        self.address = parse_url(url)
        self.version: Version = self.address.version or "5"
        self.why: str | None = "not connected yet"
        self._client_id = client_id
        self._subscriptions = subscriptions
        self._more, self._wanted = list[str](), asyncio.Event()  # what the link can do without
        self._events = events
        self._clean_session = clean_session
        self._entropy = entropy
        self._keepalive = keepalive
        self._tls = (tls or trust()) if self.address.tls else None
        self._holds = holds
        self._hung_up = 0  # in a row, on a CONNECT of this version
        self._connection: Connection | None = None
        self._newest: Connection | None = None  # also while it opens
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def up(self) -> bool:
        return self._connection is not None and self._connection.up

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        return self._may_send() and self._connection is not None and self._connection.publish(outgoing, done)

    def _may_send(self) -> bool:
        if self._holds():
            return True
        self.cut()
        return False

    def cut(self) -> None:
        """Ends the connection at once: another node may have taken the place of this one."""
        if self._newest is not None:
            self._newest.cut()

    def want(self, filters: Sequence[str]) -> None:
        """Subscribes to these topics too, now and at each reconnect. The link stays up if one is refused."""
        self._more += filters
        self._wanted.set()

    def listens(self, topic: str) -> bool:
        return True  # the server does not say

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        if message.token is not None and self._may_send():
            connection, mid = message.token
            connection.puback(mid, message.qos)

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
            while not self._holds():  # noqa: ASYNC110 - the end of a lease is rare, and so is its return
                await asyncio.sleep(AGAIN_SEC)
            failures = 0 if await self._once() else failures + 1
            shortest, longest = BACKOFF_SEC
            # The exponent is bounded, because a float cannot hold 2 ** 2000.
            ceiling = min(longest, shortest * 2 ** min(failures + 1, 10))
            await asyncio.sleep(self._entropy.uniform(shortest, ceiling))

    async def _once(self) -> bool:
        """Opens one connection and waits until it ends. Returns whether the link was up."""
        self._newest = connection = Connection(self._client(), self._events, version=self.version)
        why = "closed"
        try:
            await connection.open(self.address.host, self.address.port, self._tls, self._subscriptions)
            self._more = [each for each in self._more if "+" in each]  # others were for retained messages
            await connection.subscribe(self._more, needed=False)
            self._up(connection)
            await self._lasts(connection)
            why = str(connection.lost.exception() or "the server ended the connection")
            return True
        except (aiomqtt.MqttError, OSError) as error:
            self._failed(error)
            return False
        finally:
            self._down(connection, why)
            await connection.end()

    async def _lasts(self, connection: Connection) -> None:
        """Waits until the connection ends, and subscribes to what is wanted meanwhile."""
        while not connection.lost.done():
            self._wanted.clear()
            await connection.subscribe(self._more, needed=False)
            wanted: asyncio.Future[Any] = asyncio.create_task(self._wanted.wait())
            try:
                await asyncio.wait({wanted, connection.lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                wanted.cancel()

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
            timeout=OPEN_WITHIN_SEC,
        )

    def _up(self, connection: Connection) -> None:
        self._connection = connection
        self._hung_up, self.why = 0, None
        logger.info("mqtt.link_up", server=self.address.shown, version=self.version)
        connection.announce()

    def _down(self, connection: Connection, why: str) -> None:
        if self._connection is connection:
            self._connection, self.why = None, why
            connection.up = False
            log = logger.info if self._closing else logger.warning
            log("mqtt.link_down", server=self.address.shown, why=why)
            connection.tell(partial(self._events.link_down, why), "link_down")
            connection.receipts.forget()

    def _failed(self, error: Exception) -> None:
        code = code_of(error.rc) if isinstance(error, aiomqtt.MqttCodeError) else None
        if code in WRONG_VERSION and self.version == "5" and self.address.version is None:
            self.version = "3.1.1"
        self._hung_up = self._hung_up + 1 if isinstance(error, HungUp) else 0
        if self._hung_up == HANG_UPS and self.address.version is None:
            self._hung_up, tried = 0, self.version
            self.version = "3.1.1" if tried == "5" else "5"
            logger.warning("mqtt.other_version", server=self.address.shown, tried=tried, next=self.version)
        self.why = str(error) or f"no answer within {OPEN_WITHIN_SEC} s"
        logger.warning("mqtt.connect_failed", server=self.address.shown, why=self.why)
