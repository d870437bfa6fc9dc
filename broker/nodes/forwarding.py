"""HTTP to the owner: one attempt to have a request answered there.

The answer is passed on as it comes. Whether a request may be sent again after a lost owner is for the caller
to say: `Lost` tells whether the owner may have got it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from broker.nodes.asked import Asked
from broker.nodes.cluster import Cluster
from broker.nodes.connections import Answer, Connections, Headers, Lost, Request, Transport
from broker.seams import Node

T = TypeVar("T")

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


class Peers:
    """Requests to the owner. `secret`: what the nodes know each other by."""

    def __init__(self, cluster: Cluster, secret: str, transport: Transport | None = None) -> None:
        self._cluster, self._secret = cluster, secret.encode()
        self._transport = transport or Connections()
        self._under_way = dict[asyncio.Timeout, str]()  # and the owner that each waits for
        cluster.looked = self._look

    def close(self) -> None:
        self._transport.close()

    async def send(self, owner: Node, asked: Asked, *, local: bool, after: bytes | None = None) -> Answer:
        """The beginning of the owner's answer. `local`: the operator asks. `after`: the id of the last event
        that an event stream has passed on.

        Raises:
            Lost: there is no answer, another node became the owner, or that node says that it is not.
        """
        assert owner.address is not None
        peer = (asked.scope.get("client") or ("", 0))[0]
        headers = [each for each in asked.headers if each[0] not in HOP]
        if after is not None:
            headers = [each for each in headers if each[0] != b"last-event-id"]
            headers.append((b"last-event-id", after))
        if not any(name == b"host" for name, _ in headers):  # in HTTP/1.0 it may be missing
            headers.append((b"host", owner.address.encode()))
        headers += [(SECRET, self._secret), (PEER, str(peer).encode()), (LOCAL, b"1" if local else b"0")]
        # The target goes on as it came: a URL would lose `..`, and the owner would see another path.
        request = Request(asked.method, asked.target.encode("latin-1"), headers, asked.body)
        answer = await self.unless_moved(owner, self._transport.ask(owner.address, request))
        if header(answer, MOVED) is not None:
            answer.close()
            raise Lost(reached=False)
        return answer

    async def unless_moved(self, owner: Node, work: Coroutine[Any, Any, T]) -> T:
        """Raises:
        Lost: another node became the owner meanwhile; the work was cancelled.
        """
        if self._cluster.members.view.owner != owner.incarnation:
            work.close()
            raise Lost(reached=True)
        try:
            async with asyncio.timeout(None) as ends:
                self._under_way[ends] = owner.incarnation
                try:
                    return await work
                finally:
                    self._under_way.pop(ends, None)
        except TimeoutError as error:
            raise Lost(reached=True) from error

    def _look(self) -> None:
        """Ends what waits for a node that is no longer the owner."""
        owner = self._cluster.members.view.owner
        for ends in [each for each, waits_for in self._under_way.items() if waits_for != owner]:
            del self._under_way[ends]
            ends.reschedule(0)

    async def whole(self, owner: Node, asked: Asked, answer: Answer) -> None:
        """Passes on an answer that ends, when all of it is here: until then another owner can give it.

        Raises:
            Lost: the owner was lost in the middle.
        """
        body = await self.unless_moved(owner, _whole(answer))
        await asked.start(answer.status, shown(answer))
        await asked.piece(body, more=False)


def header(answer: Answer, wanted: bytes) -> bytes | None:
    return next((value for name, value in answer.headers if name == wanted), None)


def shown(answer: Answer) -> Headers:
    """The headers that the client gets too."""
    hidden = HOP - {b"content-length"} | {b"date"}  # the server of this node adds its own
    return [each for each in answer.headers if each[0] not in hidden]


async def _whole(answer: Answer) -> bytes:
    pieces = []
    while piece := await answer.piece():
        pieces.append(piece)
    return b"".join(pieces)
