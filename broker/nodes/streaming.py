"""An event stream through a node that does not own the log. It survives the end of the owner.

Only whole messages are passed on, and each has the position of its event as its id. So the stream can go on
at the next owner after the last one: no event is missed, and none comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from broker.nodes.asked import Asked
from broker.nodes.connections import Answer, Lost
from broker.nodes.forwarding import Peers, header, shown
from broker.seams import Node

STREAM = b"text/event-stream"
AGAIN_SEC = 0.2
WITHIN_SEC = 30.0  # then the stream ends, and its client may find another door
MESSAGE_BYTES = 16_777_216  # no event is larger; a peer must not fill our memory

# Where the owner is: waits for one; None: there is none in time, or it is this node.
Owner = Callable[[], Awaitable[Node | None]]


def is_stream(answer: Answer) -> bool:
    return answer.status == 200 and (header(answer, b"content-type") or b"").startswith(STREAM)


async def pass_on(
    peers: Peers, next_owner: Owner, owner: Node, asked: Asked, answer: Answer, *, local: bool
) -> None:
    """Passes on a stream until it ends for good: its key was revoked, or no owner was found in time."""
    await asked.start(answer.status, shown(answer))
    after: bytes | None = None
    opened: Answer | None = answer
    while opened is not None:
        resumed = after is not None
        try:
            async for message in _messages(peers, owner, opened):
                begins = message.startswith(b"retry:")  # says only where the stream begins
                if not (begins and resumed):
                    await asked.piece(message)
                after = _id(message) or after
        except Lost:
            pass  # the next owner goes on after the last message
        finally:
            opened.close()
        owner, opened = await _again(peers, next_owner, asked, after, local=local)
    await asked.piece(b"", more=False)


async def _messages(peers: Peers, owner: Node, answer: Answer) -> AsyncIterator[bytes]:
    """The messages of a stream, each one whole; comments are messages of one line."""
    kept = b""
    while piece := await peers.unless_moved(owner, answer.piece()):
        kept, begin = kept + piece, 0
        while True:
            mark = b"\n" if kept.startswith(b":", begin) else b"\n\n"
            found = kept.find(mark, begin)
            if found < 0:
                break
            yield kept[begin : found + len(mark)]
            begin = found + len(mark)
        kept = kept[begin:]
        if len(kept) > MESSAGE_BYTES:
            raise Lost(reached=True)


def _id(message: bytes) -> bytes | None:
    lines = (line for line in message.split(b"\n") if line.startswith(b"id:"))
    return next((line[3:].strip() for line in lines), None)


async def _again(
    peers: Peers, next_owner: Owner, asked: Asked, after: bytes | None, *, local: bool
) -> tuple[Node, Answer | None]:
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
        answer.close()
        if answer.status != 503:
            break
        await asyncio.sleep(AGAIN_SEC)
    return Node("", ""), None
