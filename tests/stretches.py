"""The longest time the event loop was held up, in CPU time: other processes on the machine do not count."""

from __future__ import annotations

import asyncio
import gc
import time
from types import TracebackType
from typing import Self

# The rule is 10 ms. These tests only have to find work that grows with the input: the faults that they stand
# for held the loop up for one to eleven seconds. A busy machine doubles CPU times.
LONGEST_SEC = 0.25


class Stretches:
    """`cpu_sec`: the most CPU time of this thread between two turns of the loop, while the block ran."""

    def __init__(self) -> None:
        self.cpu_sec = 0.0
        self._since = 0.0
        self._handle: asyncio.Handle | None = None

    async def __aenter__(self) -> Self:
        gc.freeze()  # as `ordain serve` does: what other tests left behind must not be searched
        await asyncio.sleep(0)
        self._since = time.thread_time()
        self._turn()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._handle is not None
        self._handle.cancel()
        self.cpu_sec = max(self.cpu_sec, time.thread_time() - self._since)
        gc.unfreeze()

    def _turn(self) -> None:
        now = time.thread_time()
        self.cpu_sec = max(self.cpu_sec, now - self._since)
        self._since = now
        self._handle = asyncio.get_running_loop().call_soon(self._turn)
