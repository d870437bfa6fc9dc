"""Progress of a long command, on standard error. A command that ends within a second prints nothing."""

from __future__ import annotations

import sys
import time

PAUSE_SEC = 1.0


class Progress:
    """Call it with the amount that is done; it prints at most once a second. `total` is in the same unit."""

    def __init__(self, total: int, unit: str = "events") -> None:
        self._total = total
        self._unit = unit
        self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= PAUSE_SEC:
            self._said = now
            print(f"{done:,} of {self._total:,} {self._unit}", file=sys.stderr, flush=True)
