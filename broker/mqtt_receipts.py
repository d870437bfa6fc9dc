"""What became of each publish on one connection: its PUBACK's reason, or, after a time, that nobody knows.

Each `done` is called exactly once, and a failing one costs only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from broker.seams import Receipt

logger = structlog.get_logger()

RECEIPT_WITHIN_SEC = 10

Done = Callable[[Receipt], None]


class Receipts:
    """By message id. The oldest comes first, so one timer is enough for all."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, tuple[Done, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, mid: int, done: Done) -> None:
        deadline = self._loop.time() + RECEIPT_WITHIN_SEC
        self._open[mid] = (done, deadline)
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._give_up)

    def settle(self, mid: int, reason: int | None) -> None:
        """`reason` None: nobody knows. Does nothing for a message that was given up on before."""
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
