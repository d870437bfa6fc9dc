"""A TCP proxy of our own that delays, cuts, or goes half-open: nothing passes, and neither end is told.

Bytes that a half-open connection swallowed are lost, so it never passes anything again. New connections are
not concerned. The proxy must never change a byte.
"""

from __future__ import annotations

import asyncio

CHUNK = 65_536


class _Line:
    """One connection through the proxy."""

    def __init__(self, ends: list[asyncio.StreamWriter]) -> None:
        self.deaf = False
        self._ends = ends

    def cut(self) -> None:
        """Ends it at once; both ends are told."""
        for end in self._ends:
            end.transport.abort()


class Proxy:
    """Listens on `port` and passes everything on to `target`. `delay_sec`: how long each chunk waits."""

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.delay_sec = 0.0
        self._target = target
        self._lines: set[_Line] = set()
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)

    def close(self) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for line in list(self._lines):
            line.cut()

    async def halve(self, seconds: float) -> None:
        """The connections of this moment are half-open for some time, and then they are cut."""
        lines = list(self._lines)
        for line in lines:
            line.deaf = True
        await asyncio.sleep(seconds)
        for line in lines:
            line.cut()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, OSError):
                return
            raise
        line = _Line([writer, far])
        self._lines.add(line)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(line, reader, far))
                group.create_task(self._pass(line, far_reader, writer))
        except* OSError:
            pass  # an end is gone, and the other one goes with it
        finally:
            line.cut()
            self._lines.discard(line)

    async def _pass(self, line: _Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if self.delay_sec:
                await asyncio.sleep(self.delay_sec)
            if not line.deaf:
                writer.write(data)
                await writer.drain()
        raise ConnectionResetError("one end is gone")
