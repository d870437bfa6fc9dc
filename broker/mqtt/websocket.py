"""MQTT over WebSocket, on the HTTP port at /mqtt: browsers and Node as devices and services.

The HTTP protocol hands over connections that asked for a WebSocket at exactly this path. Only the subprotocol
`mqtt` is accepted, in binary frames and without compression. Source: MQTT 5.0, section 6.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, cast

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import ProtocolError

from broker.mqtt.listener import Listener
from broker.mqtt.shell import Connection

SUBPROTOCOL = "mqtt"
# Bytes that are unpacked in one turn of the loop. A frame may have six bytes, and each costs the same time.
SLICE = 2_048
WRONG_DATA = 1_003


class _Transport(asyncio.Transport):
    """The transport of the MQTT connection: it writes frames to the real transport."""

    def __init__(self, socket: WebSocket) -> None:
        super().__init__()
        self._socket = socket

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._socket.send(BytesMessage(data=bytes(data)))

    def close(self) -> None:
        self._socket.send(CloseConnection(code=1_000))
        self._socket.transport.close()

    def abort(self) -> None:
        self._socket.transport.abort()

    def is_closing(self) -> bool:
        return self._socket.transport.is_closing()

    def pause_reading(self) -> None:
        self._socket.read(on=False)

    def resume_reading(self) -> None:
        self._socket.read(on=True)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket.transport.get_extra_info(name, default)


class WebSocket(asyncio.Protocol):
    """One WebSocket connection. `origins`: the origins that may open one, beside the server's own."""

    def __init__(self, listener: Listener, origins: Collection[str]) -> None:
        self.transport: asyncio.Transport
        self._listener = listener
        self._origins = origins
        self._loop = asyncio.get_running_loop()
        self._ws = WSConnection(ConnectionType.SERVER)
        self._connection: Connection | None = None
        self._reading = True
        self._waiting = bytearray()
        self._scheduled = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._waiting += data
        self._work()

    def pause_writing(self) -> None:
        if self._connection is not None:
            self._connection.pause_writing()

    def resume_writing(self) -> None:
        if self._connection is not None:
            self._connection.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        if self._connection is not None:
            self._connection.connection_lost(error)

    def read(self, *, on: bool) -> None:
        self._reading = on
        self._schedule()

    def send(self, event: Event) -> None:
        if not self.transport.is_closing():
            try:
                self.transport.write(self._ws.send(event))
            except ProtocolError:
                self.transport.close()  # the client has closed the WebSocket already

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._scheduled = False
        if not self.transport.is_closing():
            self._work()

    def _work(self) -> None:
        """Unpacks a slice of the received bytes. The rest waits for the next turn of the loop."""
        if self._reading and self._waiting:
            data = bytes(self._waiting[:SLICE])
            del self._waiting[:SLICE]
            try:
                self._ws.receive_data(data)
                for event in self._ws.events():
                    self._take(event)
            except (ProtocolError, UnicodeError) as error:  # a header may be not ASCII
                hint = getattr(error, "event_hint", None)
                if self._connection is None:
                    status = hint.status_code if isinstance(hint, RejectConnection) else 400
                    self._refuse(status, "invalid_request", "this is not a WebSocket handshake of version 13")
                self.transport.close()
                return
        if self._waiting and self._reading:
            self._schedule()
        if not self.transport.is_closing():
            if self._waiting or not self._reading:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def _take(self, event: object) -> None:
        connection = self._connection
        if isinstance(event, BytesMessage) and connection is not None:
            if event.frame_finished:
                connection.session.frame(self._loop.time())
            connection.data_received(bytes(event.data))
        elif isinstance(event, Ping) and connection is not None:
            self.transport.write(self._ws.send(event.response()))
            connection.session.frame(self._loop.time())
            connection.data_received(b"")  # the session may want to be read later
        elif isinstance(event, Request):
            self._open(event)
        elif isinstance(event, CloseConnection):
            self.send(event.response())
            self.transport.close()
        elif isinstance(event, TextMessage):
            self.send(CloseConnection(code=WRONG_DATA, reason="MQTT needs binary frames"))
            self.transport.close()

    def _open(self, request: Request) -> None:
        why = self._fault(request)
        if why is not None:
            self._refuse(*why)
            return
        self.send(AcceptConnection(subprotocol=SUBPROTOCOL))
        self._connection = self._listener.connection()
        self._connection.connection_made(_Transport(self))

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answers the handshake with an HTTP error."""
        body = b'{"error":{"code":"%s","message":"%s"}}' % (code.encode(), message.encode())
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close"), (b"sec-websocket-version", b"13")]
        self.send(RejectConnection(status_code=status, headers=headers, has_body=True))
        self.send(RejectData(data=body))
        self.transport.close()

    def _fault(self, request: Request) -> tuple[int, str, str] | None:
        headers = {name.lower(): value for name, value in request.extra_headers}
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = origin.partition("//")[2] == request.host
        if SUBPROTOCOL not in request.subprotocols:
            return 400, "invalid_request", "the subprotocol must be mqtt"
        if origin and not own and origin not in self._origins and "*" not in self._origins:
            return 403, "forbidden", "pages of this origin may not connect; see cors_origins"
        return None


def upgrades(listener: Listener, origins: Collection[str]) -> Callable[..., asyncio.Protocol]:
    """The protocol factory for uvicorn. It ignores the settings that uvicorn passes."""

    def make(**_: object) -> asyncio.Protocol:
        return WebSocket(listener, origins)

    return make
