"""One connection of the MQTT link, from CONNECT to its end.

Only this module and the link use private parts of aiomqtt and paho.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiomqtt
import structlog
from paho.mqtt import client as paho
from paho.mqtt.reasoncodes import ReasonCode

from broker.mqtt.client.packets import (
    PUBACK,
    PUBLISH,
    Splitter,
    acknowledgement,
    publish_packet,
    read_puback,
    read_publish,
    whole,
)
from broker.mqtt.client.receipts import Receipts
from broker.mqtt.client.wire import Wire
from broker.seams import LinkEvents, Message, Outgoing, Receipt
from devices.mqtt_url import Version

T = TypeVar("T")

logger = structlog.get_logger()

OPEN_WITHIN_SEC = 10
# Receive Maximum. The limit on answers a second is WINDOW / commit time, so the usual 20 is too low.
WINDOW = 1_000
REFUSED = 0x80


def code_of(answer: int | ReasonCode | None) -> int:
    return answer.value if isinstance(answer, ReasonCode) else answer or 0


class _Ended(aiomqtt.MqttError):
    """The connection ended while an answer of the server was awaited."""


class HungUp(_Ended):
    """It ended before the server's CONNACK."""


class Connection:
    """One TCP connection with its own aiomqtt client. Every reconnect makes a new `Connection`, because a
    reused aiomqtt client floods the server with old messages.

    This class reads and writes PUBLISH and PUBACK itself. paho handles all other packets. paho uses the
    `Wire` as its socket, so paho never blocks.
    """

    def __init__(self, client: aiomqtt.Client, events: LinkEvents, *, version: Version) -> None:
        self.up = False
        self.receipts = Receipts()
        self._five = version == "5"
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._events = events
        self._aio = client
        self._paho = client._client
        self._paho.disable_logger()
        self._paho.on_disconnect = self._on_disconnect
        # There is no real socket for aiomqtt to watch. Without these callbacks paho writes at once.
        self._paho.on_socket_open = self._paho.on_socket_close = None
        self._paho.on_socket_register_write = self._paho.on_socket_unregister_write = None
        self._splitter = Splitter()
        self._inbox: deque[Message | tuple[int, int]] = deque()
        self._wire = Wire(self._received, self._ended, self._sent)
        self._alive: asyncio.Task[None] | None = None
        self._subscribed: set[str] = set()

    async def open(self, host: str, port: int, tls: ssl.SSLContext | None, topics: Sequence[str]) -> None:
        """Connects and subscribes; returns when the server has granted every subscription. Messages wait in
        the inbox until `announce`.

        Raises:
            aiomqtt.MqttError: the server refused the connection or a subscription, or closed early.
            OSError: the TCP or TLS connection failed.
            TimeoutError: not done within OPEN_WITHIN_SEC.
        """
        async with asyncio.timeout(OPEN_WITHIN_SEC):
            # asyncio and uvloop both set TCP_NODELAY. Without it a round trip takes 88 ms instead of 0.7 ms.
            await self._loop.create_connection(lambda: self._wire, host, port, ssl=tls)
            if self.lost.done():  # cut before CONNECT, which would end the connection of another node
                raise _Ended(str(self.lost.exception()))
            self._paho._create_socket = lambda: self._wire  # type: ignore[method-assign]
            self._aio._client_connect()
            self._alive = asyncio.create_task(self._keep_alive())
            try:
                await self._answer(self._aio._connected)
            except _Ended as error:
                raise HungUp(f"the server ended the connection before its CONNACK: {error}") from error
            await self.subscribe(topics, needed=True)

    async def subscribe(self, subscriptions: Sequence[str], *, needed: bool) -> None:
        """Subscribes; raises like `open`. A refusal of a topic that is not `needed` is only logged."""
        if not (new := [each for each in dict.fromkeys(subscriptions) if each not in self._subscribed]):
            return
        self._subscribed.update(new)
        granted = asyncio.create_task(self._aio.subscribe([(topic, 1) for topic in new]))
        try:
            codes = [code_of(answer) for answer in await self._answer(granted)]
        finally:
            granted.cancel()
        if len(codes) != len(new):
            raise aiomqtt.MqttError(f"the server answered {len(new)} subscriptions with {len(codes)} codes")
        for topic, value in zip(new, codes, strict=True):
            if value >= REFUSED:
                logger.error("mqtt.subscription_refused", topic=topic, code=value)
                if needed:
                    raise aiomqtt.MqttError(f"the server refused the subscription to {topic}: {value:#04x}")

    async def _answer(self, answer: asyncio.Future[T]) -> T:
        """Waits for the server's answer or for the end of the connection, which aiomqtt would not notice."""
        either: set[asyncio.Future[Any]] = {answer, self.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise _Ended(f"the connection ended too early: {self.lost.exception()}")
        return answer.result()

    async def _keep_alive(self) -> None:
        try:
            while self._paho.loop_misc() == paho.MQTT_ERR_SUCCESS:  # noqa: ASYNC110 - paho's clock
                await asyncio.sleep(1)
        except Exception as error:
            self._lose(error)

    def announce(self) -> None:
        self.up = True
        self.tell(self._events.link_up, "link_up")
        self._drain()

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        if not self.up:
            return False
        if len(self.receipts) >= WINDOW:
            # The send slots allow far fewer, so the server has stopped sending PUBACKs: reconnect.
            self._lose(aiomqtt.MqttError(f"{WINDOW} messages are not acknowledged"))
            return False
        mid = self.receipts.next_id()
        self._wire.write(publish_packet(mid, outgoing, five=self._five))
        self.receipts.expect(mid, done)
        return True

    def puback(self, mid: int, qos: int) -> None:
        if self.up:
            self._wire.write(acknowledgement(mid, qos))

    def cut(self) -> None:
        """Closes the socket without a word; what was not sent yet is never sent."""
        self.up = False
        self._wire.abort()
        self._lose(aiomqtt.MqttError("the lease of this node has ended"))

    async def end(self) -> None:
        """Sends DISCONNECT if the connection is still open, and stops the tasks of this connection."""
        self.up = False
        self._lose(aiomqtt.MqttError("closed"))
        self.lost.exception()  # retrieved, so that asyncio does not log it as never retrieved
        if self._aio._connected.done():
            self._aio._connected.exception()
        if self._alive is not None:
            self._alive.cancel()
        self._paho.disconnect()
        await self._wire.goodbye()  # it closes before it waits, so a cancellation leaves no open socket

    def _sent(self) -> None:
        self._paho._last_msg_out = time.monotonic()  # paho sends PINGREQ only after a time without writes

    def _received(self, data: bytes) -> None:
        if self.lost.done():
            return  # no PUBACK is sent for this data, so the server sends it again on the next connection
        self._paho._last_bytes_received = time.monotonic()
        try:
            for first, body in self._splitter.feed(data):
                self._take(first, body)
                if self.lost.done():
                    break
        except Exception as error:  # a malformed packet: paho raises many exception types for it
            self._lose(error)
        self._drain()

    def _take(self, first: int, body: bytes) -> None:
        kind = first & 0xF0
        if kind == PUBLISH:
            self._inbox.append(read_publish(first, body, five=self._five, owner=self))
        elif kind == PUBACK:
            self._inbox.append(read_puback(body, five=self._five))
        else:
            self._wire.give(whole(first, body))
            self._paho.loop_read()

    def _ended(self, error: Exception | None) -> None:
        self._lose(error or aiomqtt.MqttError("the server closed the connection"))

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _more: Any) -> None:
        self._lose(aiomqtt.MqttCodeError(reason, "the MQTT connection ended"))

    def _drain(self) -> None:
        while self.up and self._inbox:
            come = self._inbox.popleft()
            if isinstance(come, Message):
                self.tell(partial(self._events.message, come), come.topic)
            else:
                self.receipts.settle(*come)

    def tell(self, call: Callable[[], None], about: str) -> None:
        try:
            call()
        except Exception:
            logger.exception("mqtt.callback_failed", about=about)

    def _lose(self, error: Exception) -> None:
        if not self.lost.done():
            self.lost.set_exception(error)
