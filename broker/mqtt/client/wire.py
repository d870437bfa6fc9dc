"""The bytes of one MQTT connection: asyncio's transport on one side, for paho a socket on the other.

It knows no packets and decides nothing. It never blocks either: what one turn of the loop writes is sent
together, and what the network does not take yet asyncio keeps, in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

# Long enough for a last packet on any network that still works.
GOODBYE_SEC = 0.25


class Wire(asyncio.Protocol):
    """`received` and `ended` are called from the loop, never from `write`, and must not raise."""

    def __init__(self, received: Callable[[bytes], None], ended: Callable[[Exception | None], None]) -> None:
        self._received = received
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._transport: asyncio.WriteTransport | None = None
        self._out: list[bytes] = []
        self._for_paho = b""

    def write(self, data: bytes) -> None:
        """Sent in the next turn of the loop, before whatever is scheduled after this; a send costs 3 µs."""
        self._out.append(data)
        if len(self._out) == 1:
            self._loop.call_soon(self._send_all)

    def _send_all(self) -> None:
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(out))

    def abort(self) -> None:
        """Closes the connection at once, without what was not sent yet."""
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    async def goodbye(self) -> None:
        """Ends the connection if there is one, by force if the other side does not listen any more."""
        if self._transport is None:
            return
        self.close()
        try:
            async with asyncio.timeout(GOODBYE_SEC):
                await self._over.wait()
        except TimeoutError:
            self._transport.abort()
            await self._over.wait()

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        self._received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._over.set()
        self._ended(error)

    # --- what paho calls of its socket ---

    def give(self, packet: bytes) -> None:
        """What paho will read next. It reads whole packets, one `loop_read` each."""
        self._for_paho += packet

    def recv(self, size: int) -> bytes:
        if not self._for_paho:
            raise BlockingIOError
        taken, self._for_paho = self._for_paho[:size], self._for_paho[size:]
        return taken

    def send(self, data: bytes | bytearray) -> int:
        self.write(bytes(data))
        return len(data)

    def close(self) -> None:
        self._send_all()
        if self._transport is not None:
            self._transport.close()

    def setblocking(self, flag: bool) -> None:
        """It never blocks."""

    def fileno(self) -> int:
        return -1
