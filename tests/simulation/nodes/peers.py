"""HTTP between the nodes: what the real `Peers` send reaches the real entrance of another process."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import httpx2
from litestar.types import ASGIApp

from tests.simulation.loop import Node, SimLoop
from tests.simulation.nodes.net import Net, Way

CONNECT_SEC, QUIET_SEC = 2.0, 120.0


class Exchange(httpx2.AsyncByteStream):
    """One request and its answer, which is also the body of that. Each end is in a process of its own."""

    def __init__(self, net: Net, here: str, there: str, request: httpx2.Request) -> None:
        self.begun: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._there = Way(net, here, there)
        self._back = Way(net, there, here, contextvars.copy_context())
        self._pieces: deque[bytes | None] = deque()
        self._came = asyncio.Event()
        self._broken = False
        self._gone = asyncio.Event()  # at the other end: we closed
        self._asked = False
        target = request.extensions["target"]
        path, _, query = target.partition(b"?")
        self._body = request.content
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
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
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
        if not message.get("more_body"):
            self._pieces.append(None)
        self._came.set()

    def _break(self) -> None:
        self._broken = True
        self._came.set()
        if not self.begun.done():
            self.begun.set_exception(httpx2.RemoteProtocolError("the owner closed the connection"))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while not self._pieces and not self._broken:
                self._came.clear()
                async with asyncio.timeout(QUIET_SEC):
                    await self._came.wait()
            if not self._pieces:
                raise httpx2.ReadError("the owner closed the connection")
            if (piece := self._pieces.popleft()) is None:
                return
            yield piece

    async def aclose(self) -> None:
        self._there.send(self._gone.set)


class SimTransport(httpx2.AsyncBaseTransport):
    """`find`: the process that listens on a machine, and its app; None: nobody does."""

    def __init__(
        self, loop: SimLoop, net: Net, here: str, find: Callable[[str], tuple[Node, ASGIApp] | None]
    ) -> None:
        self._loop, self._net, self._here, self._find = loop, net, here, find

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        there = request.url.host
        await asyncio.sleep(self._net.delay())
        if not self._net.reaches(self._here, there):
            await asyncio.sleep(CONNECT_SEC)
            raise httpx2.ConnectTimeout("no answer")
        if (listening := self._find(there)) is None:
            raise httpx2.ConnectError("refused")
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
            raise httpx2.ReadTimeout("no answer") from error
        except asyncio.CancelledError:
            await exchange.aclose()
            raise
        return httpx2.Response(start["status"], headers=start["headers"], stream=exchange, request=request)
