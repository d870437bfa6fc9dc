"""Bytes before they are a request: bounded in size and time, and refused in the common form of errors."""

from __future__ import annotations

import asyncio
import json
import socket
from asyncio import Server
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from broker.http.edge import protocol
from broker.http.edge.protocol import Bounded
from broker.http.edge.strangers import Strangers
from tests.integration.core_support import until
from tests.integration.http.support import Broker, register, running

Sides = tuple[asyncio.StreamReader, asyncio.StreamWriter]
DEADLINE_SEC = 120
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/devices HTTP/1.1\r\nHost: a\r\n"
UPGRADE = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
HIDDEN = b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n"  # must never be read as a request


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


@pytest.fixture
async def served(broker: Broker) -> AsyncIterator[Server]:
    """The app behind the HTTP protocol class that the broker uses."""
    state = ServerState()
    config = Config(broker.app, ws="none", lifespan="off", log_config=None)
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: Bounded(config, state, {}), "127.0.0.1", 0) as server:
        yield server
        async with asyncio.timeout(DEADLINE_SEC):
            while state.connections or state.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Sides]:
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.fixture
async def sides(served: Server) -> AsyncIterator[Sides]:
    async with connected(served) as both:
        yield both


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    async with asyncio.timeout(DEADLINE_SEC):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, json.loads(body)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All data until the broker closes the connection."""
    async with asyncio.timeout(DEADLINE_SEC):
        return await reader.read()


async def refused(reader: asyncio.StreamReader, status: int, code: str) -> None:
    got, headers, body = await answer(reader)
    assert (got, headers["content-type"], body["error"]["code"]) == (status, "application/json", code)
    assert body.keys() == {"error"}
    assert headers["connection"] == "close"
    assert await ended(reader) == b""


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\r\n",
    ],
)
async def test_bytes_that_are_not_http_get_an_error_in_the_common_form(sides: Sides, line: bytes) -> None:
    reader, writer = sides
    writer.write(line)
    await refused(reader, 400, "invalid_request")


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: " + b"x" * 200_000,
        GET + b"".join(b"a%d: b\r\n" % n for n in range(20_000)),
        GET + b"a: " + b"x" * 65_600 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000,
        b"POST /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na: " + b"x" * 600_000,
    ],
    ids=["one header", "many headers", "a whole head", "an address", "after the body"],
)
async def test_a_too_large_head_is_refused(sides: Sides, head: bytes) -> None:
    reader, writer = sides
    writer.write(head)
    if head.startswith(b"POST"):
        assert (await answer(reader))[0] == 405
        with suppress(ConnectionResetError):  # the client got its answer and sends into a closed connection
            assert await ended(reader) == b""
    else:
        await refused(reader, 431, "too_large")


async def test_large_heads_and_pipelined_requests_are_answered_in_order(sides: Sides) -> None:
    reader, writer = sides
    writer.write((GET + b"a: " + b"x" * 60_000 + b"\r\n\r\n") * 5 + (GET + b"\r\n") * 50)
    for _ in range(55):
        assert (await answer(reader))[0] == 200


async def test_of_many_requests_at_once_only_a_few_are_begun_in_one_turn_of_the_loop(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, begin = asyncio.get_running_loop(), Bounded.on_message_begin
    turn, begun = 0, Counter[int]()
    handle: asyncio.Handle | None = None

    def next_turn() -> None:
        nonlocal turn, handle
        turn += 1
        handle = loop.call_soon(next_turn)

    def counted(self: Bounded) -> None:
        begun[turn] += 1
        begin(self)

    monkeypatch.setattr(Bounded, "on_message_begin", counted)
    next_turn()
    short = b"GET /healthz HTTP/1.1\r\nHost:a\r\n\r\n"
    async with connected(served) as (reader, writer):
        writer.write(short * 2_000)
        for _ in range(2_000):
            assert (await answer(reader))[0] == 200

    assert handle is not None
    handle.cancel()
    assert begun.total() == 2_000
    assert max(begun.values()) <= protocol.SLICE // len(short) + 1


async def test_head_and_body_of_an_answer_are_one_write_and_a_head_alone_does_not_wait(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, writes = Bounded.connection_made, list[bytes]()

    def watched(self: Bounded, transport: Any) -> None:
        write = transport.write

        def noted(data: bytes) -> None:
            writes.append(bytes(data))
            write(data)

        transport.write = noted
        made(self, transport)

    monkeypatch.setattr(Bounded, "connection_made", watched)
    async with connected(served) as (reader, writer):
        writer.write((GET + b"\r\n") * 2)
        assert [(await answer(reader))[0] for _ in range(2)] == [200, 200]
        writer.write(GET.replace(b"GET", b"HEAD") + b"\r\n")
        async with asyncio.timeout(DEADLINE_SEC):
            assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")

    assert [write[:15] for write in writes] == [b"HTTP/1.1 200 OK"] * 3
    assert [write.endswith(b"\r\n\r\n") for write in writes] == [False, False, True]


async def test_nothing_is_written_after_the_refusal_of_a_body() -> None:
    asked = list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            asked.append((await receive())["type"])
            if asked[-1] == "http.disconnect":
                return

    loop, faults = asyncio.get_running_loop(), list[str]()
    loop.set_exception_handler(lambda _, context: faults.append(str(context)))
    config, state = Config(app, ws="none", lifespan="off", log_config=None), ServerState()
    head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with await loop.create_server(lambda: Bounded(config, state, {}), "127.0.0.1", 0) as server:
        async with connected(server) as (reader, writer):
            writer.write(head + b"1388\r\n" + b"a" * 5_000 + b"\r\nZZZ\r\n")
            said = await ended(reader)
    assert b" 400 " in said.removeprefix(protocol.CONTINUE).splitlines()[0]
    assert asked[-1] == "http.disconnect"
    assert faults == []


async def test_the_head_of_a_stream_does_not_wait_for_its_first_part() -> None:
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await gate.wait()
        await send({"type": "http.response.body", "body": b"x", "more_body": False})

    config, state = Config(app, ws="none", lifespan="off", log_config=None), ServerState()
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: Bounded(config, state, {}), "127.0.0.1", 0) as server:
        async with connected(server) as (reader, writer):
            writer.write(GET + b"Connection: close\r\n\r\n")
            async with asyncio.timeout(DEADLINE_SEC):
                assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
            gate.set()
            assert await ended(reader) == b"1\r\nx\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GET + b"a: b\r\n" * (protocol.MOST_HEADERS - 1), 200),
        (GET + b"a: b\r\n" * protocol.MOST_HEADERS, 431),
        (GET.replace(b"healthz", b"v1/" + b"a" * protocol.TARGET_BYTES), 414),
    ],
)
async def test_the_parts_of_a_head_are_bounded(sides: Sides, head: bytes, status: int) -> None:
    reader, writer = sides
    writer.write(head + b"\r\n")
    assert (await answer(reader))[0] == status


async def test_an_incomplete_head_times_out(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, with a limit that does not pass on a busy machine before a client has sent anything."""
    monkeypatch.setattr(protocol, "HEAD_SEC", 3.0)

    async def times_out(before: bytes, start: bytes) -> None:
        async with connected(served) as (reader, writer):
            writer.write(before)
            if before:
                assert (await answer(reader))[0] == 200
            writer.write(start)
            await refused(reader, 408, "invalid_request")

    starts = (b"GET", GET, b"\r\n")  # a line, a head, an empty line
    await asyncio.gather(*(times_out(*each) for each in product((b"", GET + b"\r\n"), starts)))


async def test_an_idle_connection_is_closed_without_an_answer(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SEC", 0.1)
    async with connected(served) as (reader, _):
        assert await ended(reader) == b""


async def test_an_incomplete_body_times_out(
    sides: Sides, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = sides
    _, key = await broker.core.keys.create("acme", ("devices:write",), None)
    monkeypatch.setattr(protocol, "BODY_SEC", 0.05)
    writer.write(
        b"POST /v1/devices HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    )
    writer.write(b"X-API-Key: %s\r\n\r\n{" % key.encode())
    await refused(reader, 408, "invalid_request")


async def test_no_error_is_sent_before_an_earlier_answer(sides: Sides) -> None:
    reader, writer = sides
    writer.write(GET + b"\r\n" + b"nonsense\r\n\r\n")
    # The first request has no answer yet, and the client would read a 400 as its answer.
    assert await ended(reader) == b""


async def test_a_client_that_reads_nothing_is_cut_and_others_are_not_affected(
    broker: Broker, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALLED_SEC", 0.2)
    _, key = await broker.core.keys.create("acme", ("devices:write", "events:read"), None)
    client = broker.client(key)
    await register(client)
    stream = "GET /v1/events?after=0 HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n"
    stream += f"X-API-Key: {key}\r\n\r\n"
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    small.connect(served.sockets[0].getsockname())
    async with connected(served) as (reader, writer):
        with small:
            small.sendall(stream.encode())
            writer.write(stream.encode())
            await until(lambda: broker.streams.open == 2)
            body = {"type": "open", "params": {"text": "x" * 60_000}}
            for _ in range(80):  # more than the 4 MB that the system buffers for one connection
                assert (await client.post("/v1/devices/lamp-1/commands", json=body)).status_code == 201
                await reader.readuntil(b"id: ")
            await until(lambda: broker.streams.open == 1)
        broker.streams.close()
        assert (await ended(reader)).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "body later"])
async def test_an_upgrade_with_a_body_is_refused_and_its_body_is_no_request(
    served: Server, cut: bool
) -> None:
    bodies = [
        b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
    ]
    lines = [b"GET /healthz", b"POST /v1/devices", b"GET /mqtt"]
    for line, upgrade, body in product(lines, [UPGRADE, b"Upgrade: h2c\r\nConnection: upgrade\r\n"], bodies):
        async with connected(served) as (reader, writer):
            head, at = line + b" HTTP/1.1\r\nHost: a\r\n" + upgrade, body.index(b"\r\n\r\n") + 4
            writer.write(head + (body[:at] if cut else body))
            if cut:
                await asyncio.sleep(0)
                writer.write(body[at:])
            await refused(reader, 400, "invalid_request")


@pytest.mark.parametrize("gap", [False, True], ids=["at once", "later"])
async def test_after_an_upgrade_the_connection_ends_with_its_answer(sides: Sides, gap: bool) -> None:
    reader, writer = sides
    writer.write(GET + UPGRADE + b"\r\n" + (b"" if gap else HIDDEN))
    status, headers, _ = await answer(reader)
    assert (status, headers["connection"]) == (200, "close")
    if gap:
        writer.write(HIDDEN)
    assert await ended(reader) == b""


async def test_a_connection_header_of_a_proxy_without_upgrade_changes_nothing(sides: Sides) -> None:
    reader, writer = sides
    for _ in range(2):
        writer.write(POST + b"Connection: upgrade\r\nContent-Length: 2\r\n\r\n{}")
        assert (await answer(reader))[0] == 401


AMBIGUOUS = [
    (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: \r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    (b"GET /healthz\r\n\r\n", 400),
    (b"GET /healthz HTTP/0.9\r\nHost: a\r\n\r\n", 400),
    (b"GET /healthz HTTP/2.0\r\nHost: a\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"POST /v1/devices HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: identity\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n", 400),
    (POST + b"Content-Length: +5\r\n\r\n12345", 400),
    (POST + b"Content-Length : 5\r\n\r\n12345", 400),
    (POST + b"Content-Length: 5, 5\r\n\r\n12345", 400),
    (POST + b"A: b\r\n c: d\r\n\r\n", 400),
    (POST + b"A: b\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"A: b\rB: c\r\n\r\n", 400),
    (POST + b"A: b\0c\r\n\r\n", 400),
    (POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
    (b"GET //healthz HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /v1//devices HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /v1%2Fdevices HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /v1/devices/a%2fcommands HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET http://a/healthz HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /healthz#a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
]


async def test_a_head_that_two_readers_may_understand_differently_is_refused(served: Server) -> None:
    for head, status in AMBIGUOUS:
        async with connected(served) as (reader, writer):
            writer.write(head)
            got, _, body = await answer(reader)
            assert got == status, (head, body)
            assert await ended(reader) == b"", head


async def test_what_is_only_old_or_unusual_is_served(served: Server) -> None:
    for head in (
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\nHost: [::1]:80\r\n\r\n",
        b"GET /healthz?a=// HTTP/1.1\r\nHost: ordain.example.org:8080\r\n\r\n",
    ):
        async with connected(served) as (reader, writer):
            writer.write(head)
            assert (await answer(reader))[0] == 200, head


class Echo(asyncio.Protocol):
    """Takes a connection over and sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@pytest.fixture
async def taking(broker: Broker) -> AsyncIterator[Server]:
    """Like `served`, with a protocol that takes WebSockets over."""
    make: Any = lambda **_: Echo()  # noqa: E731
    state, config = ServerState(), Config(broker.app, ws=make, lifespan="off", log_config=None)
    config.load()
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: Bounded(config, state, {}), "127.0.0.1", 0) as server:
        yield server


HANDSHAKE = b"GET /mqtt HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: k\r\n" + UPGRADE


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["at once", "after another"])
async def test_a_websocket_at_its_path_is_taken_over(taking: Server, before: bytes) -> None:
    async with connected(taking) as (reader, writer), asyncio.timeout(DEADLINE_SEC):
        writer.write(before)
        if before:
            assert (await answer(reader))[0] == 200
        writer.write(HANDSHAKE + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /mqtt HTTP/1.1\r\n")
        writer.write(HIDDEN)
        writer.write_eof()
        assert await ended(reader) == HIDDEN


async def test_any_other_upgrade_is_not_taken_over(taking: Server) -> None:
    for request, status in (
        (HANDSHAKE.replace(b"/mqtt", b"/mqtt/") + b"\r\n", 404),
        (HANDSHAKE.replace(b"/mqtt", b"/mqtt?a") + b"\r\n", 404),
        (HANDSHAKE.replace(b"/mqtt", b"/mqt%74") + b"\r\n", 404),
        (HANDSHAKE.replace(b"GET", b"POST") + b"\r\n", 404),
        (HANDSHAKE.replace(b"1.1", b"1.0") + b"\r\n", 404),
        (HANDSHAKE.replace(b"websocket", b"h2c") + b"\r\n", 404),
        (HANDSHAKE + b"Content-Length: 1\r\n\r\na", 400),
        (HANDSHAKE + b"\r\n" + HIDDEN, 400),
    ):
        async with connected(taking) as (reader, writer):
            writer.write(request)
            got, _, body = await answer(reader)
            assert got == status, (request, body)
            assert await ended(reader) == b"", request


async def test_the_oldest_connection_without_a_key_is_closed_for_a_new_one(broker: Broker) -> None:
    state, strangers = ServerState(), Strangers(10, 2)
    config = Config(broker.app, ws="none", lifespan="off", log_config=None)

    def made() -> Bounded:
        return Bounded(config, state, {}, strangers=strangers)

    _, key = await broker.core.keys.create("acme", ("devices:read",), None)
    with_key = (
        GET.replace(b"/healthz", b"/v1/devices") + b"Authorization: Bearer " + key.encode() + b"\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    async with await loop.create_server(made, "127.0.0.1", 0) as server, asyncio.timeout(DEADLINE_SEC):
        async with connected(server) as known:
            known[1].write(with_key)
            assert (await answer(known[0]))[0] == 200
            async with connected(server) as silent, connected(server) as wrong:
                wrong[1].write(with_key.replace(key.encode(), b"key_x"))
                assert (await answer(wrong[0]))[0] == 401
                assert strangers.open == 2
                async with connected(server) as newest:
                    newest[1].write(GET + b"\r\n")
                    assert (await answer(newest[0]))[0] == 200
                    with suppress(ConnectionResetError):
                        assert await silent[0].read() == b""
                    known[1].write(with_key)
                    assert (await answer(known[0]))[0] == 200
                    assert (strangers.open, strangers.closed) == (2, 1)
        await until(lambda: strangers.open == 0)
