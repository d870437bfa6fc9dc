"""Knows when all answers that were queued while the link was down have been read. Timers wait until then.

An external MQTT server queues the answers and delivers them when the link is up. Devices that connect to
the broker directly keep their answers and send them after they have reconnected.
"""

from __future__ import annotations

AFTER_MS = 2_000
# After a start, devices that connect directly have this time to reconnect and send their answers.
COME_BACK_MS = 30_000


class Drain:
    """The end of the drain, for each device. `ends` is None while the link is down. Times in broker ms."""

    def __init__(self) -> None:
        self._ends: int | None = None
        self._back: dict[str, int] = {}  # earlier ends, for devices that have reconnected

    def begin(self, now: int, *, direct: bool) -> int:
        """Starts the drain; returns its latest end. `direct`: devices connect to the broker directly."""
        self._back.clear()
        self._ends = now + (COME_BACK_MS if direct else AFTER_MS)
        return self._ends

    def away(self) -> None:
        """The link went down."""
        self._ends = None

    def came(self, device_id: str, now: int) -> None:
        """A device reconnected and sends its queued answers now: its drain ends `AFTER_MS` from now."""
        if self._ends is not None and now < self._ends:
            self._back.setdefault(device_id, now + AFTER_MS)

    def ends(self, device_id: str) -> int | None:
        return None if self._ends is None else min(self._ends, self._back.get(device_id, self._ends))
