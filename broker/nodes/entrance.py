"""What every HTTP request meets first on one of several nodes.

The node that owns the log handles requests itself; any other passes them on. A request that a node passed on
is never passed on again. Nothing is answered by an owner whose lease has ended meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import structlog
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from broker.http.edge.health import Health
from broker.nodes.asked import Asked, Gone, NoRoom, Room
from broker.nodes.cluster import Cluster
from broker.nodes.connections import Lost
from broker.nodes.forwarding import ACCEPTED, LOCAL, MOVED, PEER, SECRET, Peers, header
from broker.nodes.streaming import is_stream, pass_on
from broker.seams import Node

logger = structlog.get_logger()

HELD_SEC = 10.0  # a lease, and 5 s
LOOK_SEC = 0.25
AGAIN_SEC = 0.1
# Requests that wait at this node, for an owner or for its answer; those that ask to wait are counted apart.
HELD = 2_000
HELD_BYTES = 268_435_456  # of their bodies
CROWDED = "too many requests wait at this node"
LOST = (
    "the owner of the log ended before it answered: it is unknown whether this was done; look, or repeat it"
)
NOBODY = "no node owns the log now, or this node cannot reach it; try again later"


class _Lapsed(Exception):
    """The lease of this node ended in the middle of an answer."""


class Apps:
    """The apps of the node that owns the log: for the public address, and for the operator. `ready`: the
    reasons why the broker is not ready."""

    def __init__(self, public: ASGIApp, local: ASGIApp, ready: Callable[[], list[str]]) -> None:
        self.public, self.local, self.ready = public, local, ready


class Entrance:
    """`apps`: set while this node handles requests itself. `leaves`: it will not handle any again. `failed`:
    it neither handles requests nor passes them on any more. `outcomes`: requests passed on, by outcome."""

    def __init__(self, cluster: Cluster, peers: Peers, secret: str) -> None:
        self.cluster = cluster
        self.apps: Apps | None = None
        self.leaves = self.failed = False
        self.metrics: Callable[[], bytes] = bytes
        self.shows_metrics = True
        self.outcomes = {"answered": 0, "unknown": 0, "held": 0, "crowded": 0}
        self._peers, self._secret = peers, secret.encode()
        self._under_way = 0
        self._held = Counter[bool]()
        self._room = Room(HELD_BYTES)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def held(self) -> int:
        """How many requests wait at this node."""
        return self._held.total()

    @property
    def held_bytes(self) -> int:
        return self._room.taken

    # --- what is run where ---

    def app(self, *, local: bool) -> ASGIApp:
        """The app on the public address, or, `local`, the one on the private socket."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = cast(dict[str, Any], scope)
            if request["type"] != "http":
                return
            asked = Asked(request, receive, send)
            try:
                await self._enter(asked, local)
            except Gone:
                return
            finally:
                asked.close()

        return app

    async def quiet(self, within_sec: float) -> None:
        """Waits until this node handles no request of its own any more, or that long."""
        try:
            async with asyncio.timeout(within_sec):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("node.still_answering", requests=self._under_way)

    async def _enter(self, asked: Asked, local: bool) -> None:
        given = dict(asked.headers)
        passed_on = SECRET in given and not local
        if passed_on:
            if not hmac.compare_digest(given[SECRET], self._secret):
                await asked.refuse("forbidden", "this is not the secret of the nodes of this log")
                return
            asked.passed()
            asked.report_passed()
            local = given.get(LOCAL) == b"1"
            asked.scope["client"] = (given.get(PEER, b"").decode("latin-1"), 0)
        elif await self._own(asked, local):
            return
        if self.apps is not None:
            if self.cluster.holds():
                await self._handle(self.apps, asked, asked.receive, local)
            else:  # now it is certain that nothing is done; after a decision it would not be
                await self._moved(asked)
            return
        try:
            await asked.read(self._room)
        except NoRoom:
            self.outcomes["crowded"] += 1
            await asked.refuse("unavailable", CROWDED, headers={"connection": "close"})
            return
        except ValueError as error:
            await asked.refuse("too_large", str(error), headers={"connection": "close"})
            return
        if self._held[asked.lasts] >= HELD:
            self.outcomes["crowded"] += 1
            await asked.refuse("unavailable", CROWDED)
            return
        self._held[asked.lasts] += 1
        try:
            await self._answer(asked, local, passed_on)
        finally:
            self._held[asked.lasts] -= 1

    async def _own(self, asked: Asked, local: bool) -> bool:
        """Answers what is about this node, and nothing else; False if the request is about the broker."""
        path = asked.path if asked.method in ("GET", "HEAD") else ""
        if path == "/readyz":
            apps = self.apps
            reasons = self._not_a_door() if apps is None else apps.ready()
            if reasons:
                await asked.refuse("unavailable", f"not ready: {'; '.join(reasons)}", {"reasons": reasons})
            else:
                await asked.json(200, Health("ready", "door" if apps is None else "owner"))
        elif path == "/healthz":
            await asked.json(200, Health("ok", "door" if self.apps is None else "owner"))
        elif path == "/metrics" and self.apps is None and (local or self.shows_metrics):
            await self._figures(asked)
        else:
            return False
        return True

    async def _figures(self, asked: Asked) -> None:
        await asked.whole(200, self.metrics(), {"content-type": CONTENT_TYPE_LATEST})

    def _not_a_door(self) -> list[str]:
        age = self.cluster.beat_age_ms
        if age is None or age > self.cluster.members.lease_ms:
            return ["log: the database cannot be reached"]
        owner = self.cluster.members.owner
        if owner is None or not self.cluster.lives(owner):
            return ["node: no node owns the log"]
        return []

    # --- answering ---

    async def owner(self, until: float) -> Node | None:
        """Waits for a node that owns the log; None: it is this one, and it handles requests.

        Raises:
            TimeoutError: there was none.
        """
        loop = asyncio.get_running_loop()
        while self.apps is None and not self.failed:
            owner = self.cluster.members.owner
            if owner is not None and owner.address and not self.cluster.owns and not owner.draining:
                return owner
            if loop.time() >= until:
                raise TimeoutError
            await self.cluster.change(LOOK_SEC)
        if self.apps is None:
            raise TimeoutError
        return None

    async def _answer(self, asked: Asked, local: bool, passed_on: bool) -> None:
        """Answers a request that this node cannot handle at once."""
        loop = asyncio.get_running_loop()
        until, waited = loop.time() + HELD_SEC, False
        if passed_on and (self.leaves or not self.cluster.owns):
            await self._moved(asked)
            return
        try:
            while (owner := await asked.unless_gone(self.owner(until))) is not None:
                sent = loop.time()
                if passed_on:  # this node was about to own the log, and another one does now
                    await self._moved(asked)
                    return
                try:
                    await self._pass_on(owner, asked, local)
                    return
                except Lost as error:
                    if error.reached and not asked.repeatable:
                        self.outcomes["unknown"] += 1
                        await asked.refuse("unavailable", LOST)
                        return
                if loop.time() - sent > HELD_SEC and not waited:  # for its answer, at an owner that lived
                    waited, until = True, loop.time() + HELD_SEC
                if loop.time() >= until:
                    raise TimeoutError
                await self.cluster.change(AGAIN_SEC)
        except TimeoutError:
            self.outcomes["held"] += 1
            await asked.refuse("unavailable", NOBODY)
            return
        assert self.apps is not None
        await self._handle(self.apps, asked, asked.replay(), local)

    async def _moved(self, asked: Asked) -> None:
        await asked.refuse("unavailable", NOBODY, headers={MOVED.decode(): "1"})

    async def _pass_on(self, owner: Node, asked: Asked, local: bool) -> None:
        """Raises:
        Lost: the owner gave no answer.
        """
        answer = await asked.unless_gone(self._peers.send(owner, asked, local=local))
        try:
            if header(answer, ACCEPTED) is not None:
                asked.passed()
            if is_stream(answer) and asked.method != "HEAD":
                stream = pass_on(self._peers, self._next_owner, owner, asked, answer, local=local)
                self._held[asked.lasts] -= 1  # it does not wait for an answer
                try:
                    await asked.unless_gone(stream)
                finally:
                    self._held[asked.lasts] += 1
            elif asked.path == "/metrics" and answer.status == 200:
                await self._figures(asked)  # of this node; the owner has checked the key
            else:
                await asked.unless_gone(self._peers.whole(owner, asked, answer))
            self.outcomes["answered"] += 1
        finally:
            answer.close()

    async def _next_owner(self) -> Node | None:
        """The node at which a stream goes on; this one too. None: there is none in time."""
        try:
            found = await self.owner(asyncio.get_running_loop().time() + HELD_SEC)
        except TimeoutError:
            return None
        return found or self.cluster.node

    async def _handle(self, apps: Apps, asked: Asked, receive: Receive, local: bool) -> None:
        """Runs the app of this node. Nothing is sent after the end of its lease: an answer that had begun is
        broken off, so that the client does not wait for the rest."""
        self._under_way += 1
        self._idle.clear()
        lapsed = False

        async def send(message: Message) -> None:
            nonlocal lapsed
            lapsed = lapsed or not self.cluster.holds()
            if lapsed and asked.started:
                raise _Lapsed
            if lapsed:
                return
            if message["type"] == "http.response.start":
                accepted = [(ACCEPTED, b"1")] if asked.accepted else []
                await asked.start(message["status"], [*message["headers"], *accepted])
            else:
                body = cast(dict[str, Any], message)
                await asked.piece(body.get("body", b""), more=body.get("more_body", False))

        try:
            scope = cast(Scope, asked.scope)
            await (apps.local if local else apps.public)(scope, receive, send)
        except asyncio.CancelledError:  # the process ends
            if not asked.started:
                await asked.refuse("unavailable", LOST)
            raise
        except Exception:  # Litestar wraps what `send` raises
            if not (lapsed and asked.started):
                raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        if lapsed and not asked.started:
            await asked.refuse("unavailable", LOST)
