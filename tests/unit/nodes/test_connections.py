"""HTTP between nodes, byte by byte: what is an answer, and which connection may be used again."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from broker.nodes import connections as module
from broker.nodes.connections import Connections, Lost, Request
from tests.conftest import unused_port

WITHIN_SEC = 60
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: "
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Last(bytes):
    """An answer after which the connection closes."""


class Other:
    """Another node. It gives one answer to each request."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.asked: list[bytes] = []
        self.connections = self.ended = 0
        self.address = ""

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: ([0-9]+)\r\n", head)
                self.asked.append(head + await reader.readexactly(int(length[1]) if length else 0))
                answer = self.answers.pop(0)
                writer.write(answer)
                if isinstance(answer, Last):
                    break
            else:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        self.ended += 1

    async def ends(self, count: int) -> None:
        """Waits until so many connections have ended."""
        async with asyncio.timeout(WITHIN_SEC):
            while self.ended < count:  # noqa: ASYNC110
                await asyncio.sleep(0)


@asynccontextmanager
async def listening(other: Other) -> AsyncIterator[Connections]:
    server = await asyncio.start_server(other.take, "127.0.0.1", 0)
    other.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    ours = Connections()
    async with server, asyncio.timeout(WITHIN_SEC):
        yield ours
        ours.close()
        await other.ends(other.connections)


async def got(
    ours: Connections, other: Other, method: str = "GET", body: bytes = b""
) -> tuple[int, dict[bytes, bytes], bytes]:
    answer = await ours.ask(other.address, Request(method, b"/a?b", [(b"host", b"h")], body))
    try:
        whole = b""
        while piece := await answer.piece():
            whole += piece
        return answer.status, dict(answer.headers), whole
    finally:
        answer.close()


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (OK, 200, b"ok"),
        (HEAD + b"0\r\n\r\n", 200, b""),
        (CHUNKED + b"2\r\nok\r\n1\r\n!\r\n0\r\ntrailer: x\r\n\r\n", 200, b"ok!"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n", 304, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, 200, b"ok"),
    ],
)
async def test_after_a_whole_answer_the_connection_is_used_again(
    answer: bytes, status: int, body: bytes
) -> None:
    other = Other(answer, OK)
    async with listening(other) as ours:
        first = await got(ours, other)
        assert (first[0], first[2]) == (status, body)
        assert not {b"trailer", b"link"} & set(first[1])
        assert await got(ours, other) == (200, {b"content-length": b"2"}, b"ok")
        assert other.connections == 1


@pytest.mark.parametrize(
    ("method", "answer", "body"),
    [
        ("GET", HEAD + b"2\r\nConnection: close\r\n\r\nok", b"ok"),
        ("GET", b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        ("GET", OK + OK, b"ok"),
        ("GET", OK + b"?", b"ok"),
        ("HEAD", HEAD + b"7\r\n\r\n", b""),
        ("HEAD", CHUNKED, b""),
    ],
)
async def test_a_connection_that_may_hold_more_than_the_answer_is_not_used_again(
    method: str, answer: bytes, body: bytes
) -> None:
    other = Other(answer, HEAD + b"3\r\n\r\nour")
    async with listening(other) as ours:
        assert (await got(ours, other, method))[2] == body
        await other.ends(1)
        assert (await got(ours, other))[2] == b"our"
        assert other.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        HEAD + b"3\r\n\r\nok",
        CHUNKED + b"2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nas long as it stays open",
        HEAD + b"2\r\ntransfer-encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"SSH-2.0-server\r\n",
    ],
)
async def test_an_answer_that_breaks_off_or_is_not_http_is_lost(answer: bytes) -> None:
    other = Other(Last(answer))
    async with listening(other) as ours:
        with pytest.raises(Lost) as lost:
            await got(ours, other)
        assert lost.value.reached


async def test_a_head_without_end_is_lost() -> None:
    other = Other(b"HTTP/1.1 200 OK\r\na: " + (module.HEAD_BYTES + 1) * b"b", OK)
    async with listening(other) as ours:
        with pytest.raises(Lost):
            await got(ours, other)
        assert (await got(ours, other))[2] == b"ok"


@pytest.mark.parametrize("answer", [b"", HEAD + b"2\r\n\r\no"])
async def test_a_node_that_says_nothing_for_long_has_lost_the_request(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_SEC", 0.05)
    other = Other(answer)
    async with listening(other) as ours:
        with pytest.raises(Lost) as lost:
            await got(ours, other)
        assert lost.value.reached
        await other.ends(1)


async def test_what_could_not_be_sent_has_not_reached_the_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody, other = Other(), Other()
    nobody.address = f"127.0.0.1:{unused_port()}"
    async with listening(other) as ours:
        with pytest.raises(Lost) as refused:
            await got(ours, nobody)
        monkeypatch.setattr(module, "CONNECT_SEC", 0)
        with pytest.raises(Lost) as late:
            await got(ours, other)
        assert (refused.value.reached, late.value.reached) == (False, False)
        await other.ends(1)


async def test_a_connection_that_closes_at_once_has_not_carried_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Other()
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def closed(factory: Callable[[], asyncio.Protocol], host: str, port: int) -> None:
        transport, protocol = await connect(factory, host, port)
        transport.abort()  # as if the other node had closed it
        while protocol in ours._open:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async with listening(other) as ours:
        monkeypatch.setattr(loop, "create_connection", closed)
        with pytest.raises(Lost) as caught:
            await ours.ask(other.address, Request("GET", b"/", [], b""))
        assert not caught.value.reached


async def test_a_cancelled_request_ends_its_connection_and_its_answer_is_not_anothers() -> None:
    other = Other(b"", OK)
    async with listening(other) as ours:
        asking = asyncio.create_task(got(ours, other))
        while not other.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
        asking.cancel()
        await other.ends(1)
        assert (await got(ours, other))[2] == b"ok"
        assert other.connections == 2


async def test_an_answer_that_is_not_read_to_its_end_ends_its_connection() -> None:
    other = Other(HEAD + b"3\r\n\r\nok", OK)
    async with listening(other) as ours:
        answer = await ours.ask(other.address, Request("GET", b"/", [], b""))
        answer.close()
        await other.ends(1)
        assert (await got(ours, other))[2] == b"ok"
        assert other.connections == 2


async def test_an_idle_connection_is_left_when_the_other_node_closed_it_or_it_is_old() -> None:
    other = Other(Last(OK), OK, OK, OK)
    async with listening(other) as ours:
        await got(ours, other)
        while ours._open:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await got(ours, other)
        ours._kept_sec = 0
        await got(ours, other)
        assert other.connections == 3
        await other.ends(2)


async def test_an_idle_connection_is_left_when_its_end_was_not_read_yet() -> None:
    def answer_once(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(OK)
            ended.wait(WITHIN_SEC)

    other, ended = Other(OK), threading.Event()
    ours = Connections()
    async with asyncio.timeout(WITHIN_SEC):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            other.address = f"127.0.0.1:{listener.getsockname()[1]}"
            for _ in range(2):
                node = threading.Thread(target=answer_once, args=[listener], daemon=True)
                node.start()
                assert (await got(ours, other))[2] == b"ok"
                ended.set()
                node.join()  # the event loop is held up meanwhile
            ours.close()
            while ours._open:  # noqa: ASYNC110
                await asyncio.sleep(0)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_whose_request_is_cancelled_is_not_kept(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def cancelled() -> None:
        other = Other()
        async with listening(other) as ours:
            for turns in range(10):
                asks = asyncio.create_task(ours.ask(other.address, Request("GET", b"/", [], b"")))
                for _ in range(turns):
                    await asyncio.sleep(0)
                asks.cancel()
                await asyncio.wait([asks])
            while ours._open:  # noqa: ASYNC110
                await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(cancelled())


async def test_an_idle_connection_to_another_node_is_ended() -> None:
    one, two = Other(OK, b""), Other(OK)
    async with listening(two), listening(one) as ours:
        await got(ours, one)
        await got(ours, two)
        await one.ends(1)


async def test_requests_at_the_same_time_have_connections_of_their_own() -> None:
    other = Other(OK, OK, OK, OK)
    async with listening(other) as ours:
        await asyncio.gather(got(ours, other), got(ours, other))
        await asyncio.gather(got(ours, other), got(ours, other))
        assert other.connections == 2


async def test_no_more_connections_are_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 1)
    other = Other(OK, OK, OK)
    async with listening(other) as ours:
        await asyncio.gather(got(ours, other), got(ours, other))
        await other.ends(1)
        await got(ours, other)
        assert other.connections == 2


async def test_what_is_not_read_makes_the_other_node_wait() -> None:
    length = 64 * module.AHEAD_BYTES
    other = Other(HEAD + b"%d\r\n\r\n" % length + bytes(length), OK, OK)
    async with listening(other) as ours:
        answer = await ours.ask(other.address, Request("GET", b"/", [], b""))
        for _ in range(1_000):  # turns of the loop, each of which would read more
            await asyncio.sleep(0)
        assert isinstance(answer, module._Answer)
        assert answer._ahead_bytes <= module.AHEAD_BYTES + 262_144  # what the loop reads at once
        sizes = [len(await answer.piece())]
        while size := len(await answer.piece()):
            sizes.append(size)
        answer.close()  # all of it is here: its connection may have another request
        assert sum(sizes) == length
        assert max(sizes) <= 4 * module.AHEAD_BYTES
        assert (await got(ours, other))[2] == b"ok"
        assert other.connections == 1


async def test_a_body_goes_on_and_its_length_is_said_where_one_is_expected() -> None:
    other = Other(OK, OK, OK)
    async with listening(other) as ours:
        await got(ours, other, "POST", b"body")
        await got(ours, other, "POST")
        await got(ours, other, "DELETE")
        assert other.asked == [
            b"POST /a?b HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nbody",
            b"POST /a?b HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n",
            b"DELETE /a?b HTTP/1.1\r\nhost: h\r\n\r\n",
        ]
