"""A TCP server for a test, of which nothing is left at the end."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

# A connection that arrives within the last turns of the loop before `close()` is never handed to us and stays
# open. asyncio needs this number of turns to hand it over.
ACCEPTING_TURNS = 5
Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def stream_server(
    handle: Handle, host: str = "127.0.0.1", port: int = 0, context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Runs `handle` for each connection; yields the port. At the end it cancels what still runs and closes
    every connection. `asyncio.start_server` alone leaves those open whose task was cancelled too early."""
    tasks: set[asyncio.Future[Any]] = set()
    writers: list[asyncio.StreamWriter] = []

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.ensure_future(handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(ended)

    def ended(task: asyncio.Future[Any]) -> None:
        tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: the client's side of the test shows what went wrong

    server = await asyncio.start_server(accepted, host, port, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for _ in range(ACCEPTING_TURNS):
            await asyncio.sleep(0)
        server.close()
        running = list(tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)  # asyncio calls connection_lost in the next turn
