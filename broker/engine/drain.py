"""Until when answers that waited during our absence may still arrive. Before that, no timer may count.

With an MQTT server in between, answers wait there and arrive when our link is up. Devices that connect to us
directly send theirs when they have reconnected.
"""

from __future__ import annotations

AFTER_MS = 2_000
# After a start, devices that connect to us directly have this long to reconnect and send their answers.
COME_BACK_MS = 30_000


class Drain:
    """`ends` is None while our link is down. Times are in ms of the broker's clock."""

    def __init__(self) -> None:
        self._ends: int | None = None
        self._back: dict[str, int] = {}  # earlier ends, for devices that have reconnected

    def begin(self, now: int, *, direct: bool) -> int:
        """Starts the wait for queued answers; returns when it ends at the latest."""
        self._back.clear()
        self._ends = now + (COME_BACK_MS if direct else AFTER_MS)
        return self._ends

    def away(self) -> None:
        """Our link went down."""
        self._ends = None

    def came(self, device_id: str, now: int) -> None:
        """A device connected to us: its queued answers arrive now."""
        if self._ends is not None and now < self._ends:
            self._back.setdefault(device_id, now + AFTER_MS)

    def ends(self, device_id: str) -> int | None:
        return None if self._ends is None else min(self._ends, self._back.get(device_id, self._ends))
