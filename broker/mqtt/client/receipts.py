"""The outcome of each publish on one connection: the reason code of its PUBACK, or unknown after a timeout.

This module also assigns message ids. It does not reuse an id before its PUBACK has arrived. Each `done`
callback is called exactly once. An exception in one callback does not affect the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from broker.seams import Receipt

logger = structlog.get_logger()

RECEIPT_WITHIN_SEC = 10
LAST_ID = 65_535

Done = Callable[[Receipt], None]


class Receipts:
    """Open publishes by message id, oldest first, so one timer serves all of them.

    `len` counts the publishes without a PUBACK, also those whose outcome was reported as unknown.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, tuple[Done, float]] = {}
        self._given_up: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._given_up)

    def next_id(self) -> int:
        """A message id that is not in use. The caller keeps `len` far below `LAST_ID`, so one is free."""
        while True:
            self._last_id = self._last_id % LAST_ID + 1
            if self._last_id not in self._open and self._last_id not in self._given_up:
                return self._last_id

    def expect(self, mid: int, done: Done) -> None:
        deadline = self._loop.time() + RECEIPT_WITHIN_SEC
        self._open[mid] = (done, deadline)
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._give_up)

    def settle(self, mid: int, reason: int | None) -> None:
        """Reports the outcome of a publish; `reason` None means unknown.

        Calls nothing if the outcome was already reported as unknown: `done` is called only once.
        """
        self._given_up.discard(mid)
        done, _ = self._open.pop(mid, (None, 0))
        if done is not None:
            try:
                done(Receipt(written=True, reason=reason))
            except Exception:
                logger.exception("mqtt.receipt_failed", mid=mid)

    def forget(self) -> None:
        """Reports every open publish as unknown, because the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
        for mid in list(self._open):
            self.settle(mid, None)

    def _give_up(self) -> None:
        self._timer = None
        for mid, (_, deadline) in list(self._open.items()):
            if deadline > self._loop.time():
                self._timer = self._loop.call_at(deadline, self._give_up)
                return
            self.settle(mid, None)
            self._given_up.add(mid)
