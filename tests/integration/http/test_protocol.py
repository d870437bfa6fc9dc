"""Bytes before they are a request: bounded in size and time, and refused in the common form of errors."""

from __future__ import annotations

import asyncio
import json
import socket
from asyncio import Server
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from broker.http.edge import protocol
from broker.http.edge.protocol import Bounded
from tests.integration.core_support import until
from tests.integration.http.support import Broker, register, running

Sides = tuple[asyncio.StreamReader, asyncio.StreamWriter]
DEADLINE_SEC = 120
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"


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
        b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na: " + b"x" * 600_000,
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


@pytest.mark.parametrize("start", [b"GET", GET, b"\r\n"], ids=["a line", "a head", "an empty line"])
@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["at once", "after another"])
async def test_an_incomplete_head_times_out(
    served: Server, monkeypatch: pytest.MonkeyPatch, start: bytes, before: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SEC", 0.1)
    async with connected(served) as (reader, writer):
        writer.write(before)
        if before:
            assert (await answer(reader))[0] == 200
        writer.write(start)
        await refused(reader, 408, "invalid_request")


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
    stream = f"GET /v1/events?after=0 HTTP/1.1\r\nAccept: text/event-stream\r\nX-API-Key: {key}\r\n\r\n"
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
