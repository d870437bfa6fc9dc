"""An event stream through a node that does not own the log. It survives the end of the owner.

Only whole messages are passed on, and each has the position of its event as its id. So the stream can go on
at the next owner after the last one: no event is missed, and none comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2

from broker.nodes.asked import Asked
from broker.nodes.forwarding import Lost, Peers, shown
from broker.seams import Node

STREAM = "text/event-stream"
AGAIN_SEC = 0.2
WITHIN_SEC = 30.0  # then the stream ends, and its client may find another door
MESSAGE_BYTES = 16_777_216  # no event is larger; a peer must not fill our memory

# Where the owner is: waits for one; None: there is none in time, or it is this node.
Owner = Callable[[], Awaitable[Node | None]]


def is_stream(answer: httpx2.Response) -> bool:
    kind: str = answer.headers.get("content-type", "")
    return answer.status_code == 200 and kind.startswith(STREAM)


async def pass_on(
    peers: Peers, next_owner: Owner, owner: Node, asked: Asked, answer: httpx2.Response, *, local: bool
) -> None:
    """Passes on a stream until it ends for good: its key was revoked, or no owner was found in time."""
    await asked.start(answer.status_code, shown(answer))
    after: bytes | None = None
    opened: httpx2.Response | None = answer
    while opened is not None:
        resumed = after is not None
        try:
            async for message in _messages(peers, owner, opened):
                begins = message.startswith(b"retry:")  # says only where the stream begins
                if not (begins and resumed):
                    await asked.piece(message)
                after = _id(message) or after
        except (httpx2.TransportError, Lost):
            pass  # the next owner goes on after the last message
        finally:
            await opened.aclose()
        owner, opened = await _again(peers, next_owner, asked, after, local=local)
    await asked.piece(b"", more=False)


async def _messages(peers: Peers, owner: Node, answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The messages of a stream, each one whole; comments are messages of one line."""
    kept, pieces = b"", answer.aiter_raw().__aiter__()
    while (piece := await peers.unless_moved(owner, _next(pieces))) is not None:
        kept += piece
        while True:
            end = b"\n" if kept.startswith(b":") else b"\n\n"
            message, found, rest = kept.partition(end)
            if not found:
                break
            kept = rest
            yield message + end
        if len(kept) > MESSAGE_BYTES:
            raise Lost(reached=True)


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    return await anext(pieces, None)


def _id(message: bytes) -> bytes | None:
    lines = (line for line in message.split(b"\n") if line.startswith(b"id:"))
    return next((line[3:].strip() for line in lines), None)


async def _again(
    peers: Peers, next_owner: Owner, asked: Asked, after: bytes | None, *, local: bool
) -> tuple[Node, httpx2.Response | None]:
    """Opens the stream once more at the owner; None if that refuses it, or none is found in time."""
    loop = asyncio.get_running_loop()
    until = loop.time() + WITHIN_SEC
    while loop.time() < until and (owner := await next_owner()) is not None:
        try:
            answer = await peers.send(owner, asked, local=local, after=after)
        except Lost:
            await asyncio.sleep(AGAIN_SEC)
            continue
        if is_stream(answer):
            return owner, answer
        await answer.aclose()
        if answer.status_code != 503:
            break
        await asyncio.sleep(AGAIN_SEC)
    return Node("", ""), None
