"""HTTP between the nodes: what the real `Peers` send reaches the real entrance of another process."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from litestar.types import ASGIApp

from broker.nodes.connections import CONNECT_SEC, QUIET_SEC, Answer, Lost, Request, Transport
from tests.simulation.loop import Node, SimLoop
from tests.simulation.nodes.net import Net, Way


class Exchange(Answer):
    """One request and its answer. Each end is in a process of its own."""

    def __init__(self, net: Net, here: str, there: str, request: Request) -> None:
        self.status, self.headers = 0, list[tuple[bytes, bytes]]()
        self.begun: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._there = Way(net, here, there)
        self._back = Way(net, there, here, contextvars.copy_context())
        self._pieces: deque[bytes] = deque()
        self._ended = False
        self._came = asyncio.Event()
        self._broken = False
        self._gone = asyncio.Event()  # at the other end: we closed
        self._asked = False
        path, _, query = request.target.partition(b"?")
        self._body = request.body
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": path.decode(),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": (here, 40_000),
            "server": (there, 80),
            "state": {},
        }

    # --- at the other end

    async def run(self, app: ASGIApp) -> None:
        await app(cast(Any, self.scope), cast(Any, self._receive), cast(Any, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self._back.send(lambda: self._take(message))

    def lose(self) -> None:
        """The other end died, or raised: its machine resets the connection."""
        self._back.send(self._break)

    # --- at this end

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if not self.begun.done():
                self.begun.set_result(message)
            return
        self._pieces.append(message.get("body", b""))
        self._ended = not message.get("more_body")
        self._came.set()

    def _break(self) -> None:
        self._broken = True
        self._came.set()
        if not self.begun.done():
            self.begun.set_exception(Lost(reached=True))

    async def piece(self) -> bytes:
        while not any(self._pieces) and not self._ended and not self._broken:
            self._came.clear()
            try:
                async with asyncio.timeout(QUIET_SEC):
                    await self._came.wait()
            except TimeoutError as error:
                raise Lost(reached=True) from error
        piece = b"".join(self._pieces)
        self._pieces.clear()
        if not piece and not self._ended:
            raise Lost(reached=True)
        return piece

    def close(self) -> None:
        self._there.send(self._gone.set)


class SimTransport(Transport):
    """`find`: the process that listens on a machine, and its app; None: nobody does."""

    def __init__(
        self, loop: SimLoop, net: Net, here: str, find: Callable[[str], tuple[Node, ASGIApp] | None]
    ) -> None:
        self._loop, self._net, self._here, self._find = loop, net, here, find

    def close(self) -> None:
        """Nothing is kept open."""

    async def ask(self, address: str, request: Request) -> Answer:
        there = address.partition(":")[0]
        await asyncio.sleep(self._net.delay())
        if not self._net.reaches(self._here, there):
            await asyncio.sleep(CONNECT_SEC)
            raise Lost(reached=False)
        if (listening := self._find(there)) is None:
            raise Lost(reached=False)
        node, app = listening
        exchange = Exchange(self._net, self._here, there, request)
        node.on_kill.append(exchange.lose)
        task = self._loop.spawn(node, exchange.run(app))

        def ended(task: asyncio.Task[None]) -> None:
            node.on_kill.remove(exchange.lose)
            if not task.cancelled():
                task.exception()  # of an app that fails; the connection ends either way
            exchange.lose()

        task.add_done_callback(ended, context=self._net.world)
        try:
            async with asyncio.timeout(QUIET_SEC):
                start = await exchange.begun
        except TimeoutError as error:
            raise Lost(reached=True) from error
        except asyncio.CancelledError:
            exchange.close()
            raise
        exchange.status, exchange.headers = start["status"], list(start["headers"])
        return exchange
