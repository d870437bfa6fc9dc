"""What became of each publish on one connection: its PUBACK's reason, or, after a time, that nobody knows.

It gives out the message ids, none of them twice before its PUBACK. Each `done` is called exactly once,
and a failing one costs only itself.
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
    """By message id. The oldest comes first, so one timer is enough for all; `len` is what has no PUBACK."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, tuple[Done, float]] = {}
        self._given_up: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._given_up)

    def next_id(self) -> int:
        """An id that the server does not hold. The caller keeps `len` far below `LAST_ID`."""
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
        """`reason` None: nobody knows. Does nothing for a message that was given up on before."""
        self._given_up.discard(mid)
        done, _ = self._open.pop(mid, (None, 0))
        if done is not None:
            try:
                done(Receipt(written=True, reason=reason))
            except Exception:
                logger.exception("mqtt.receipt_failed", mid=mid)

    def forget(self) -> None:
        """The connection has ended: nobody will ever know of any of them."""
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
