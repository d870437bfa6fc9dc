"""HTTP on the wire: uvicorn's protocol with limits that apply before any key is checked.

A request head has a size limit and a time limit, a body has a time limit, and a client that does not read
its answer is disconnected. A request that a proxy might read differently is refused (`heads.fault_of`).
Refusals have the same JSON form as all errors. A refusal must never overtake an earlier answer on the
connection: while one is still due, the connection is only closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from broker.http.edge.errors import error_body
from broker.http.edge.heads import (
    Fault,
    Network,
    asks_to_upgrade,
    fault_of,
    forwarded_for,
    is_of,
    is_websocket,
)
from broker.http.edge.strangers import PASSED, Strangers

HEAD_BYTES = 65_536
TARGET_BYTES = 16_384
MOST_HEADERS = 200
SLICE = 4_096  # bytes that are parsed in one turn of the loop: a request may have thirty, and each takes time
HEAD_SEC = 10.0
BODY_SEC = 30.0
STALLED_SEC = 10.0  # how long a client may leave full buffers unread before it is disconnected
LINGER_SEC = 1.0  # a client that still sends would lose the answer if the connection closed at once

MALFORMED: Fault = (400, "invalid_request", "this is not HTTP/1.1")
LATE: Fault = (408, "invalid_request", "the rest of the request did not arrive in time")
TOO_LARGE: Fault = (431, "too_large", f"path, query and headers are larger than {HEAD_BYTES} bytes")
TOO_MANY: Fault = (431, "too_large", f"there are more than {MOST_HEADERS} headers")
TOO_LONG: Fault = (414, "too_large", f"path and query are larger than {TARGET_BYTES} bytes")


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # uvicorn writes it when the body is asked for


class _Joined:
    """The transport of one answer. It writes the head together with the first part of the body, if that comes
    in the same turn of the event loop: two writes are two system calls, and may wake the client twice."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._begun = False
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if data == CONTINUE:
            self._transport.write(data)
        elif not self._begun:
            self._begun, self._head = True, data
            self._loop.call_soon(self._flush)
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data)

    def _flush(self) -> None:
        if self._head and not self.is_closing():
            self.write(b"")

    def close(self) -> None:
        self._flush()
        self._transport.close()


class Bounded(HttpToolsProtocol):
    """One connection. `_part`: the part of a request that is being received. Each part has its own timer.

    A WebSocket at `heads.WEBSOCKET_PATH` goes to uvicorn's `ws` protocol class, if there is one. After any
    other Upgrade, the request is answered like any other and the connection closes.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        strangers: Strangers | None = None,
        proxies: Sequence[Network] = (),
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._strangers = strangers  # None: the private socket
        self._proxies = proxies
        self._proxied = False  # a trusted proxy; its requests come from many clients
        self._last = False  # the request asked for another protocol, so no request after it is read
        self._leaving = False  # the WebSocket's protocol gets the connection
        self._part: Literal["head", "body"] | None = "head"
        self._parts = 0  # number of changes of `_part`
        self._timed = -1  # the value of `_parts` that the timer belongs to
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._kept = 0  # bytes received since the parser last passed on a part
        self._waiting = bytearray()  # received, and not parsed yet; meanwhile nothing is read
        self._scheduled = False
        self._fault: Fault | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        self._proxied = is_of(address, self._proxies)
        if self._strangers is not None and not self._proxied:
            self._strangers.add(self, address)
        self._time()

    def passed(self) -> None:
        """A key was accepted on this connection, so it no longer counts as a stranger's."""
        if self._strangers is not None:
            self._strangers.remove(self)

    def end(self) -> None:
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.passed()
        self._waiting.clear()
        for timer in filter(None, (self._timer, self._stall)):
            timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALLED_SEC, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused or self._last:
            return
        self._waiting += data
        if self._scheduled:
            self.transport.pause_reading()
        else:
            self._work()

    def _work(self) -> None:
        """Parses a slice of what was received. The rest follows in later turns of the loop."""
        held, self._scheduled = self._scheduled, False
        if self._waiting:
            piece = bytes(self._waiting[:SLICE])
            del self._waiting[:SLICE]
            self._parse(piece)
        if self._refused or self._last:
            self._waiting.clear()
        if self._waiting:
            self._scheduled = True
            self.transport.pause_reading()
            self.loop.call_soon(self._work)
        elif held and not self.flow.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._part is None:
            self._enter("head")  # here, because the parser reports nothing for empty lines
        self._kept += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser stopped behind the head. What follows it is not read: it is no HTTP.
            self._upgraded(rest=len(data) - upgrade.args[0] + len(self._waiting))
        except httptools.HttpParserError:
            self._refuse(self._fault or MALFORMED)
        else:
            if self._kept > HEAD_BYTES and self._part is not None:
                self._refuse(TOO_LARGE)
            else:
                self._time()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[PASSED] = self.passed  # type: ignore[literal-required]
        self._enter("head")

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if size > HEAD_BYTES:
            self._fault = TOO_LARGE
        elif len(self.headers) > MOST_HEADERS:
            self._fault = TOO_MANY
        elif len(self.url) > TARGET_BYTES:
            self._fault = TOO_LONG
        else:
            self._fault = fault_of(version, method, self.url, self.headers)
        if self._fault is not None:
            raise httptools.HttpParserError(self._fault[2])
        if self._proxied and (client := forwarded_for(self.headers, self._proxies)) is not None:
            self.scope["client"] = (client, 0)
        self._last = self.parser.should_upgrade() or asks_to_upgrade(self.headers)
        alone = self.cycle is None or self.cycle.response_complete
        self._leaving = (
            self.ws_protocol_class is not None
            and alone
            and is_websocket(version, method, self.url, self.headers)
        )
        super().on_headers_complete()
        if not self._leaving:
            if self._last:
                self.cycle.keep_alive = False
            if method != b"HEAD":  # its answer has no body
                self.cycle.transport = _Joined(self.transport, self.loop)  # type: ignore[assignment]
        self._enter("body")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part == "head":  # trailers after a chunked body are ignored
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._kept = 0

    def on_body(self, body: bytes) -> None:
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._enter(None)

    def _should_upgrade(self) -> bool:
        return self._leaving

    def _upgraded(self, rest: int) -> None:
        self._time()
        if self._leaving and rest:  # a WebSocket client sends nothing before the 101
            self._refuse(MALFORMED)
        elif self._leaving:
            self.passed()  # the MQTT server has its own bounds
            self.handle_websocket_upgrade()

    def _enter(self, part: Literal["head", "body"] | None) -> None:
        self._part = part
        self._parts += 1
        self._kept = 0

    def _time(self) -> None:
        """Starts the timer of the part that is being received. A part that arrived whole gets no timer."""
        if self._timed == self._parts:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timed, self._timer = self._parts, None
        if self._part is not None:
            self._timer = self.loop.call_later(HEAD_SEC if self._part == "head" else BODY_SEC, self._late)

    def _late(self) -> None:
        if self.flow.read_paused:  # the broker paused reading, so the client is not late
            self._timed = -1
            self._time()
        elif self._parts == 0 and self._kept == 0:
            self.transport.close()
        else:
            self._refuse(LATE)

    def _refuse(self, fault: Fault) -> None:
        """Sends an error as the last answer on this connection, then closes it."""
        part, self._refused = self._part, True
        self._part, self._timed = None, self._parts
        if self._timer is not None:
            self._timer.cancel()
        cycle, turn = self.cycle, not self.pipeline
        if cycle is not None:
            # A fault in a body may be answered if its request's own answer has not begun. A fault in a
            # head may be answered if the request before it has its complete answer.
            turn = turn and (not cycle.response_started if part == "body" else cycle.response_complete)
            cycle.disconnected = True
            cycle.waiting_for_100_continue = False  # nothing may be written after the answer below
            cycle.message_event.set()
        if not turn or self.transport.is_closing():
            self.transport.close()
            return
        status, code, message = fault
        details = {"field": "request", "reason": message} if code == "invalid_request" else None
        body = msgspec.json.encode(error_body(code, message, details))
        head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        head += b"cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SEC, self.transport.close)
