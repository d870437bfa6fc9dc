"""HTTP to the owner: one attempt to have a request answered there.

The answer is passed on as it comes. Whether a request may be sent again after a lost owner is for the caller
to say: `Lost` tells whether the owner may have got it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import httpx2

from broker.log.postgresql.vanished import options
from broker.nodes.asked import Asked, Headers, let_go
from broker.nodes.cluster import Cluster
from broker.seams import Node

T = TypeVar("T")

CONNECT_SEC = 2.0
QUIET_SEC = 120.0  # longer than any request waits, and than an event stream is silent
TIMES = httpx2.Timeout(CONNECT_SEC, read=QUIET_SEC).as_dict()
VANISHED_SEC = 8  # an owner whose machine confirms nothing for so long gives no answer any more
LOOK_SEC = 1.0
KEPT = 100
# What the nodes tell each other with a request: the shared secret, the client's address, and whether it is
# the operator of the machine; and with an answer: that this node does not own the log and did nothing, or
# that it accepted the client's key.
SECRET, PEER, LOCAL, MOVED = b"x-ordain-secret", b"x-ordain-peer", b"x-ordain-local", b"x-ordain-moved"
ACCEPTED = b"x-ordain-accepted"
BETWEEN_NODES = frozenset({SECRET, PEER, LOCAL, MOVED, ACCEPTED})
# Of one connection only.
HOP = BETWEEN_NODES | {
    b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"te", b"trailer", b"upgrade",
    b"expect", b"content-length",
}  # fmt: skip


class Lost(Exception):
    """The owner gave no answer. `reached`: it may have got the request."""

    def __init__(self, *, reached: bool) -> None:
        super().__init__("the owner gave no answer")
        self.reached = reached


class Peers:
    """This node's connections to the owner. `secret`: what the nodes know each other by. `transport`: how
    they are made; None: over the network."""

    def __init__(
        self, cluster: Cluster, secret: str, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self._cluster, self._secret = cluster, secret.encode()
        # No bound here: the entrance bounds the requests that wait, and the owner each project's streams.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=KEPT)
        # The pool looks at all its connections for each request: with 1,500 streams among them a request
        # took 10 ms instead of 1. So what stays open for long has a pool of its own.
        self._short, self._long = (
            transport
            or httpx2.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=options(VANISHED_SEC))
            for _ in range(2)
        )

    async def close(self) -> None:
        for each in (self._short, self._long):
            await each.aclose()

    async def send(
        self, owner: Node, asked: Asked, *, local: bool, after: bytes | None = None
    ) -> httpx2.Response:
        """The beginning of the owner's answer. `local`: the operator asks. `after`: the id of the last event
        that an event stream has passed on.

        Raises:
            Lost: there is no answer, another node became the owner, or that node says that it is not.
        """
        peer = (asked.scope.get("client") or ("", 0))[0]
        headers = [each for each in asked.headers if each[0] not in HOP]
        if after is not None:
            headers = [each for each in headers if each[0] != b"last-event-id"]
            headers.append((b"last-event-id", after))
        headers += [(SECRET, self._secret), (PEER, str(peer).encode()), (LOCAL, b"1" if local else b"0")]
        # The target goes on as it came: a URL would lose `..`, and the owner would see another path.
        pool = self._long if asked.lasts else self._short
        made = httpx2.Request(
            asked.method,
            f"http://{owner.address}/",
            headers=headers,
            content=asked.body or None,
            extensions={"target": asked.target.encode("latin-1"), "timeout": TIMES},
        )
        try:
            answer = await self.unless_moved(owner, pool.handle_async_request(made))
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise Lost(reached=False) from error
        except httpx2.TransportError as error:
            raise Lost(reached=True) from error
        if MOVED.decode() in answer.headers:
            await answer.aclose()
            raise Lost(reached=False)
        return answer

    async def unless_moved(self, owner: Node, work: Awaitable[T]) -> T:
        """Raises:
        Lost: another node became the owner meanwhile; the work was cancelled.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                if self._cluster.members.view.owner != owner.incarnation:
                    raise Lost(reached=True)
                change = asyncio.ensure_future(self._cluster.change(LOOK_SEC))
                await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
            return task.result()
        finally:
            let_go(task)

    async def whole(self, owner: Node, asked: Asked, answer: httpx2.Response) -> None:
        """Passes on an answer that ends, when all of it is here: until then another owner can give it.

        Raises:
            Lost: the owner was lost in the middle.
        """
        try:
            body = await self.unless_moved(owner, _raw(answer))
        except httpx2.TransportError as error:
            raise Lost(reached=True) from error
        await asked.start(answer.status_code, shown(answer))
        await asked.piece(body, more=False)


def shown(answer: httpx2.Response) -> Headers:
    """The headers that the client gets too."""
    hidden = HOP - {b"content-length"} | {b"date"}  # the server of this node adds its own
    found = ((name.lower(), value) for name, value in answer.headers.raw)
    return [(name, value) for name, value in found if name not in hidden]


async def _raw(answer: httpx2.Response) -> bytes:
    return b"".join([piece async for piece in answer.aiter_raw()])
