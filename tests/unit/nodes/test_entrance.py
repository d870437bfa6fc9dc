"""What a node does with requests, and at the end of its lease: an ASGI app on a log that only knows nodes."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

import pytest

from broker.http.app import _routes
from broker.http.edge.strangers import PASSED
from broker.nodes import cluster as cluster_module
from broker.nodes import entrance as module
from broker.nodes.asked import KEYED, Asked
from broker.nodes.cluster import Cluster
from broker.nodes.entrance import Apps, Entrance
from broker.nodes.forwarding import ACCEPTED, LOCAL, MOVED, SECRET, Peers
from broker.seams import Node, View
from tests.conftest import unused_port

OURS, THEIRS = "node_b", "node_a"
KEY = "s" * 40
WITHIN_SEC = 60


class Beats:
    """A log that only knows nodes. It refuses two beats at once, as one connection does."""

    def __init__(self, owner: str, address: str | None = None) -> None:
        self.notified = asyncio.Event()
        self.term, self.owner, self.address = int(owner == OURS), owner, address
        self.beats: list[Node] = []
        self.slow = asyncio.Event()
        self.slow.set()
        self._under_way = False

    async def beat(self, node: Node, *, notify: bool = False) -> View:
        assert not self._under_way, "another beat is under way"
        self._under_way = True
        self.beats.append(node)
        await self.slow.wait()
        self._under_way = False
        return View(1, self.owner, [Node(self.owner, "a", self.address, beat=len(self.beats))])


class Clock:
    ms = 0

    def __call__(self) -> int:
        return self.ms


def cluster_on(log: Beats, clock: Clock | None = None) -> Cluster:
    return Cluster(cast(Any, log), Node(OURS, "b"), clock or Clock(), Clock())


class Client:
    """One request: what is sent to it. It stays connected."""

    body = b"7 bytes"

    def __init__(self, target: str = "/v1/devices", method: str = "GET", **headers: str) -> None:
        path, _, query = target.partition("?")
        names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope: dict[str, Any] = {"type": "http", "method": method, "path": path}
        self.scope |= {"raw_path": path.encode(), "query_string": query.encode(), "client": ("192.0.2.1", 1)}
        self.scope["headers"] = [(b"host", b"a"), *names]
        self.passed = False
        self.scope[PASSED] = self._pass
        self.sent: list[dict[str, Any]] = []
        self._said = False

    def _pass(self) -> None:
        self.passed = True

    async def receive(self) -> Any:
        if self._said:
            await asyncio.Event().wait()
        self._said = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    def asked(self) -> Asked:
        return Asked(self.scope, self.receive, self.send)


async def ask(entrance: Entrance, client: Client) -> Client:
    async with asyncio.timeout(WITHIN_SEC):
        await entrance.app(local=False)(cast(Any, client.scope), client.receive, client.send)
    return client


def served(entrance: Entrance, app: Any) -> None:
    entrance.apps = Apps(app, app, list)


@pytest.mark.parametrize(
    ("method", "path", "keyed", "repeatable"),
    [
        ("POST", "/v1/devices/a/commands", True, True),
        ("POST", "/v1/devices/a/commands", False, False),
        ("POST", "/v1/commands", True, True),
        ("POST", "/v1/commands/c/retry", True, True),
        ("POST", "/v1/devices/a/commands/c/retry", True, True),
        ("POST", "/v1/devices", True, False),
        ("POST", "/v1/keys", True, False),
        ("POST", "/v1/devices/a/token", True, False),
        ("POST", "/v1/devices/a/commands/claim", True, False),
        ("DELETE", "/v1/devices/a", True, False),
        ("DELETE", "/v1/devices/a/commands/c", False, True),
        ("GET", "/v1/devices/a/commands", False, True),
        ("GET", "/v1/devices/a/commands/pending", False, False),
        ("GET", "/v1/devices/a/commands/pending/", False, False),
    ],
)
def test_a_door_repeats_only_what_does_no_harm_twice(
    method: str, path: str, keyed: bool, repeatable: bool
) -> None:
    client = Client(path, method, **({"idempotency_key": "k"} if keyed else {}))
    assert client.asked().repeatable is repeatable


def test_the_routes_that_a_door_repeats_with_a_key_are_those_that_use_it() -> None:
    for route in _routes(local=False).routes:
        for handler in getattr(route, "route_handlers", ()):
            for method in handler.http_methods:
                path = re.sub(r"{[^}]+}", "x", route.path)
                uses_it = "idempotency_key" in handler.parsed_fn_signature.parameters
                assert (KEYED.fullmatch(f"{method} {path}") is not None) == uses_it, (method, path)


def test_streams_and_waiting_requests_have_connections_of_their_own() -> None:
    assert Client(accept="application/json, Text/Event-Stream;q=0.9").asked().lasts
    assert Client("/v1/commands/c?wait=30").asked().lasts
    assert not Client(accept="application/json").asked().lasts


async def test_an_answer_that_had_begun_breaks_off_at_the_end_of_the_lease() -> None:
    clock = Clock()
    cluster = cluster_on(Beats(OURS), clock)
    await cluster.beat()
    entrance = Entrance(cluster, Peers(cluster, KEY), KEY)
    client = Client()

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        clock.ms = 60_000
        try:
            while True:  # as an event stream: it ends when its client is gone
                await send({"type": "http.response.body", "body": b": ping\n", "more_body": True})
                await asyncio.sleep(0)
        except Exception as error:
            raise ValueError("as Litestar wraps it") from error

    served(entrance, streaming)
    await ask(entrance, client)
    assert [message["type"] for message in client.sent] == ["http.response.start"]


async def test_after_the_end_of_the_lease_nothing_is_begun() -> None:
    clock, begun = Clock(), 0
    cluster = cluster_on(Beats(OURS), clock)
    await cluster.beat()
    entrance = Entrance(cluster, Peers(cluster, KEY), KEY)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal begun
        begun += 1

    served(entrance, app)
    clock.ms = 60_000
    client = await ask(entrance, Client("/v1/devices/a/commands/claim", "POST"))
    assert (client.status, client.headers[MOVED], begun) == (503, b"1", 0)


async def held(entrance: Entrance) -> None:
    """Waits until one request waits, with its body read."""
    async with asyncio.timeout(WITHIN_SEC):
        while not (entrance.held and entrance.held_bytes):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_the_bodies_of_waiting_requests_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 10)
    cluster = cluster_on(Beats(THEIRS))
    await cluster.beat()
    entrance = Entrance(cluster, Peers(cluster, KEY), KEY)
    waiting, other, third = Client(), Client(), Client()
    asking = asyncio.create_task(ask(entrance, waiting))
    await held(entrance)
    await ask(entrance, other)
    assert (waiting.sent, other.status) == ([], 503)
    asking.cancel()
    await asyncio.wait({asking})
    asking = asyncio.create_task(ask(entrance, third))
    await held(entrance)  # the first has given its room back
    assert third.sent == []
    asking.cancel()


async def test_requests_that_wait_for_the_end_of_a_command_take_no_place_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HELD", 1)
    cluster = cluster_on(Beats(THEIRS))
    await cluster.beat()
    entrance = Entrance(cluster, Peers(cluster, KEY), KEY)
    long, short, third = Client("/v1/commands/c?wait=30"), Client(), Client()
    asking = [asyncio.create_task(ask(entrance, each)) for each in (long, short)]
    async with asyncio.timeout(WITHIN_SEC):
        while entrance.held < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await ask(entrance, third)
    assert (long.sent, short.sent, third.status) == ([], [], 503)
    for each in asking:
        each.cancel()
    await asyncio.wait(asking)


async def test_a_node_that_let_the_log_go_does_not_act_for_the_rest_of_its_lease() -> None:
    log = Beats(OURS)
    cluster = cluster_on(log)
    await cluster.beat()
    assert cluster.holds()
    log.slow.clear()
    running = asyncio.create_task(cluster.run())
    async with asyncio.timeout(WITHIN_SEC):
        while len(log.beats) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        released = asyncio.create_task(cluster.release())  # while a beat is under way
        await asyncio.sleep(0)
        log.slow.set()
        await released
    running.cancel()
    assert log.beats[-1].draining
    assert not cluster.holds()


class Unowned(Beats):
    """A log that nobody owns yet."""

    claims = 0

    async def beat(self, node: Node, *, notify: bool = False) -> View:
        view = await super().beat(node, notify=notify)
        return view if self.claims else View(0, None, [])

    async def own(self, name: str, address: str | None, now: int) -> int:
        self.claims += 1
        self.term = self.claims
        return self.claims


async def test_a_node_claims_the_log_once_however_late_its_beats_are_confirmed() -> None:
    log, clock = Unowned(OURS), Clock()
    log.term = 0
    cluster = cluster_on(log, clock)
    await cluster.beat()
    claiming = asyncio.create_task(cluster.claimed())
    await asyncio.sleep(0)
    clock.ms = 8_000
    await cluster.beat()  # so late that it may not act yet
    for _ in range(5):
        cluster.wake()
        for _ in range(20):  # turns of the loop; one look of the node takes fewer
            await asyncio.sleep(0)
    claiming.cancel()
    assert log.claims == 1


async def test_a_notification_during_a_beat_makes_the_node_beat_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_module, "BEAT_SEC", 3_600)
    log = Beats(THEIRS)
    cluster = cluster_on(log)
    log.slow.clear()
    running = asyncio.create_task(cluster.run())
    async with asyncio.timeout(WITHIN_SEC):
        while not log.beats:  # noqa: ASYNC110
            await asyncio.sleep(0)
        log.notified.set()
        log.slow.set()
        while len(log.beats) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()


async def test_what_a_node_passed_on_is_not_passed_on_again() -> None:
    log = Beats(OURS)
    cluster = cluster_on(log)
    await cluster.beat()
    entrance = Entrance(cluster, Peers(cluster, KEY), KEY)
    client = Client(**{"x-ordain-secret": KEY})
    asking = asyncio.create_task(ask(entrance, client))
    await asyncio.sleep(0.01)
    assert not client.sent  # this node owns the log, and reads it
    log.owner, log.address, log.term = THEIRS, f"127.0.0.1:{unused_port()}", 0
    await cluster.beat()
    await asking
    assert (client.status, client.headers[MOVED]) == (503, b"1")


async def test_an_owner_tells_the_door_whether_it_accepted_the_key() -> None:
    cluster = cluster_on(Beats(OURS))
    await cluster.beat()
    entrance = Entrance(cluster, Peers(cluster, KEY), KEY)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/devices":
            scope[PASSED]()
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    served(entrance, app)
    given = {SECRET.decode(): KEY, LOCAL.decode(): "0"}
    assert ACCEPTED in (await ask(entrance, Client(**given))).headers
    assert ACCEPTED not in (await ask(entrance, Client("/nothing", **given))).headers
    assert ACCEPTED not in (await ask(entrance, Client())).headers  # a client has no use for it
