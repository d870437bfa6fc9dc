"""The bytes of one MQTT connection: asyncio's transport on one side, for paho a socket on the other.

It knows no packets and decides nothing. It never blocks either: what one turn of the loop writes is sent
together, and what the network does not take yet asyncio keeps, in order.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import cast

# Long enough for a last packet on any network that still works.
GOODBYE_SEC = 0.25
NO_LINGER = struct.pack("ii", 1, 0)


class Wire(asyncio.Protocol):
    """`received` and `ended` are called from the loop, never from `write`, and must not raise. `sent` is
    called after each send."""

    def __init__(
        self,
        received: Callable[[bytes], None],
        ended: Callable[[Exception | None], None],
        sent: Callable[[], None],
    ) -> None:
        self._received = received
        self._ended = ended
        self._sent = sent
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
            self._sent()

    def abort(self) -> None:
        """Resets the connection at once, also one that is closing in order. What the other side has not got
        yet, it never gets: the system does not send it again either."""
        self._out.clear()
        if self._transport is not None and not self._over.is_set():
            with suppress(OSError):  # macOS, if the other side has ended it
                there = self._transport.get_extra_info("socket")
                there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            self._transport.abort()

    async def goodbye(self) -> None:
        """Ends the connection if there is one, by force if the other side does not listen any more."""
        if self._transport is None:
            return
        self.close()
        # Not asyncio.timeout: before Python 3.11.3 it raises no TimeoutError in a cancelled task.
        late = self._loop.call_later(GOODBYE_SEC, self.abort)
        try:
            await self._over.wait()
        finally:
            late.cancel()
            if not self._over.is_set():
                self.abort()

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
