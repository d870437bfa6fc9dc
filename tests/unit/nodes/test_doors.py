"""A node that passes requests on: what the owner does, and what the client of the door then gets."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from broker.nodes import entrance as module
from broker.nodes import streaming
from broker.nodes.connections import Lost
from broker.nodes.entrance import Entrance
from broker.nodes.forwarding import ACCEPTED, MOVED, Peers
from broker.seams import Node
from tests.conftest import unused_port
from tests.unit.nodes.test_entrance import KEY, THEIRS, WITHIN_SEC, Beats, Client, ask, cluster_on


class Owner:
    """An HTTP server that notes request lines, and gives all the same answer; `once`: only the first.
    `ends_after_sec`: it keeps the first request so long, and does not answer it; its successor does."""

    def __init__(
        self,
        *headers: str,
        status: str = "404 Not Found",
        once: bool = False,
        ends_after_sec: float | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.heads: list[bytes] = []
        self._answer = "\r\n".join(
            [f"HTTP/1.1 {status}", "date: then", "content-length: 0", *headers, "", ""]
        )
        self._once, self._ends_after_sec = once, ends_after_sec

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        self.lines.append(head.partition(b"\r\n")[0].decode())
        if self._ends_after_sec is not None and len(self.lines) == 1:
            await asyncio.sleep(self._ends_after_sec)
        elif not self._once or len(self.lines) == 1:
            writer.write(self._answer.encode())
        await writer.drain()
        writer.close()


async def through_a_door(owner: Owner, client: Client, metrics: bytes | None = None) -> Client:
    """`metrics`: those of the door, which are only for holders of a key."""
    server = await asyncio.start_server(owner.take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        cluster = cluster_on(Beats(THEIRS, f"127.0.0.1:{port}"))
        await cluster.beat()
        peers = Peers(cluster, KEY)
        entrance = Entrance(cluster, peers, KEY)
        if metrics is not None:
            entrance.metrics, entrance.shows_metrics = lambda: metrics, False
        await ask(entrance, client)
        peers.close()
    return client


async def test_a_request_that_no_owner_can_be_reached_for_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HELD_SEC", 0.3)
    cluster = cluster_on(Beats(THEIRS, f"127.0.0.1:{unused_port()}"))  # it lives, and nobody listens there
    await cluster.beat()
    assert (await ask(Entrance(cluster, Peers(cluster, KEY), KEY), Client())).status == 503


async def test_a_request_that_waited_long_at_an_owner_goes_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HELD_SEC", 0.05)
    owner = Owner(status="200 OK", ends_after_sec=2 * module.HELD_SEC)
    client = await through_a_door(owner, Client("/v1/commands/c?wait=30"))
    assert (client.status, len(owner.lines)) == (200, 2)


async def test_a_stream_ends_if_the_owner_cannot_be_reached_again_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "WITHIN_SEC", 0.3)
    client = await through_a_door(
        Owner(f"content-type: {streaming.STREAM.decode()}", status="200 OK", once=True), Client()
    )
    assert (client.status, client.sent[-1]["more_body"]) == (200, False)


class Endless(Owner):
    """Its event has no end. `taken`: how many bytes of each event were read."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n\r\n" % streaming.STREAM
        if self.taken:  # the door asks once more
            head = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        writer.write(head + b"data: ")
        self.taken.append(0)
        with suppress(ConnectionError):
            while len(self.taken) == 1:
                writer.write(bytes(100))
                await writer.drain()
                self.taken[0] += 100
        writer.close()


async def test_an_event_without_end_does_not_fill_the_memory_of_a_door(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "MESSAGE_BYTES", 10_000)
    owner = Endless()
    async with asyncio.timeout(WITHIN_SEC):
        client = await through_a_door(owner, Client())
    assert (client.status, [each["body"] for each in client.sent[1:]]) == (200, [b""])
    assert owner.taken[0] > 10_000
    assert len(owner.taken) == 2


async def test_a_stranger_stays_one_at_a_door_until_the_owner_accepts_a_key() -> None:
    assert not (await through_a_door(Owner(), Client("/nothing"))).passed
    known = await through_a_door(Owner(f"{ACCEPTED.decode().title()}: 1"), Client("/nothing"))
    assert known.passed
    assert set(known.headers) == {b"content-length"}  # this node's own server adds the date


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_a_door_shows_its_own_metrics_if_the_owner_accepts_the_key(path: str) -> None:
    client = await through_a_door(Owner(status="200 OK"), Client(path), metrics=b"of the door")
    assert (client.status, client.sent[1]["body"]) == (200, b"of the door")
    assert client.headers == {
        b"content-type": CONTENT_TYPE_LATEST.encode(),
        b"content-length": b"11",
        b"cache-control": b"no-store",
        b"x-content-type-options": b"nosniff",
    }
    refused = await through_a_door(Owner(status="401 Unauthorized"), Client(path), metrics=b"of the door")
    assert (refused.status, refused.sent[1]["body"]) == (401, b"")


@pytest.mark.parametrize("path", ["/metrics/", "/healthz/"])
async def test_a_door_answers_for_itself_also_with_a_slash_at_the_end(path: str) -> None:
    owner = Owner(status="200 OK")
    assert ((await through_a_door(owner, Client(path))).status, owner.lines) == (200, [])


async def test_the_target_goes_on_as_it_came() -> None:
    owner, target = Owner(), "/v1/devices/../../local/x?q=%zz&r='[\""
    await through_a_door(owner, Client(target))
    assert owner.lines == [f"GET {target} HTTP/1.1"]


async def test_a_request_of_http_1_0_without_a_host_goes_on_with_one() -> None:
    owner, client = Owner(), Client()
    client.scope["headers"] = []
    await through_a_door(owner, client)
    assert re.search(rb"\r\nhost: 127.0.0.1:[0-9]+\r\n", owner.heads[0])


async def test_headers_of_one_connection_and_those_between_nodes_do_not_go_on() -> None:
    owner = Owner()
    theirs = {"x-ordain-peer": "203.0.113.9", "x-ordain-local": "1", "x-ordain-accepted": "1"}
    await through_a_door(owner, Client(connection="x", te="trailers", if_match="a", **theirs))
    assert owner.heads[0].split(b"\r\n")[1:-2] == [
        b"host: a",
        b"if-match: a",
        b"x-ordain-secret: " + KEY.encode(),
        b"x-ordain-peer: 192.0.2.1",
        b"x-ordain-local: 0",
        b"content-length: 7",
    ]


class Silent:
    """An owner that gives no whole answer. `gone`: the door has closed its connection."""

    def __init__(self, head: bytes = b"") -> None:
        self.asked, self.gone = asyncio.Event(), asyncio.Event()
        self._head = head

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._head)
        self.asked.set()
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        self.gone.set()


class Leaving(Client):
    """It goes away while it waits for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = asyncio.Event()

    async def receive(self) -> Any:
        if self._said:
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        return await super().receive()


@asynccontextmanager
async def door_of(owner: Silent) -> AsyncIterator[tuple[Entrance, Beats]]:
    server = await asyncio.start_server(owner.take, "127.0.0.1", 0)
    log = Beats(THEIRS, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    cluster = cluster_on(log)
    await cluster.beat()
    peers = Peers(cluster, KEY)
    async with server, asyncio.timeout(WITHIN_SEC):
        yield Entrance(cluster, peers, KEY), log
        await owner.gone.wait()
    peers.close()


async def test_the_request_of_a_client_that_went_away_ends_at_the_owner_too() -> None:
    owner, client = Silent(), Leaving()
    async with door_of(owner) as (entrance, _):
        asking = asyncio.create_task(ask(entrance, client))
        await owner.asked.wait()
        client.leaves.set()
        await asking
        assert (client.sent, entrance.held) == ([], 0)


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_when_another_node_owns_the_log_nobody_waits_for_the_one_before(method: str) -> None:
    owner, next_owner = Silent(), Owner(status="200 OK")
    client = Client("/v1/devices/a/commands" + "/c" * (method == "DELETE"), method)
    server = await asyncio.start_server(next_owner.take, "127.0.0.1", 0)
    async with server, door_of(owner) as (entrance, log):
        asking = asyncio.create_task(ask(entrance, client))
        await owner.asked.wait()
        log.owner, log.address = "node_c", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await entrance.cluster.beat()
        await asking
    repeated = method == "DELETE"  # the other might be done twice
    assert (client.status, len(next_owner.lines)) == ((200, 1) if repeated else (503, 0))


async def test_what_a_node_that_is_not_the_owner_did_not_take_goes_to_the_owner() -> None:
    moved = b"HTTP/1.1 503 Service Unavailable\r\n" + MOVED + b": 1\r\ncontent-length: 7\r\n\r\n"
    before, owner = Silent(moved), Owner(status="200 OK")
    client = Client("/v1/devices/a/commands", "POST")
    server = await asyncio.start_server(owner.take, "127.0.0.1", 0)
    async with server, door_of(before) as (entrance, log):
        asking = asyncio.create_task(ask(entrance, client))
        await before.gone.wait()  # nobody waits for the rest of its answer
        log.owner, log.address = "node_c", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await entrance.cluster.beat()
        await asking
    assert (client.status, len(owner.lines)) == (200, 1)


async def test_nothing_of_a_node_that_is_not_the_owner_any_more_is_waited_for() -> None:
    cluster = cluster_on(Beats(THEIRS))
    await cluster.beat()
    with pytest.raises(Lost):
        await Peers(cluster, KEY).unless_moved(Node("node_c", "c"), asyncio.sleep(0))
