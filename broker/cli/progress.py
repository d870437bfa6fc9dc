"""How far a long command has come, on standard error; a short one says nothing."""

from __future__ import annotations

import sys
import time

PAUSE_SEC = 1.0


class Progress:
    """Called with how much is done; says so once a second. `total` in the same unit."""

    def __init__(self, total: int, unit: str = "events") -> None:
        self._total = total
        self._unit = unit
        self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= PAUSE_SEC:
            self._said = now
            print(f"{done:,} of {self._total:,} {self._unit}", file=sys.stderr, flush=True)
