"""The broker's timers: a heap of times at which a command or a lane must be checked again.

Nothing here is durable. Every time is computed from the log and set again after a restart.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable

STALL_MS = 1_000
SLACK = 1_000
AFTER_MS = 2_000
# After a start, devices that connect directly have this time to reconnect and send their answers.
COME_BACK_MS = 30_000


class Deadlines:
    """At most one time per key; setting it again replaces it. `fire(key)` is called when it is reached.

    `space` is awaited after every 64 fires, so that the events they stage stay within the writer's bound.
    """

    def __init__(
        self, now: Callable[[], int], fire: Callable[[str], None], space: Callable[[], Awaitable[None]]
    ) -> None:
        self._now = now
        self._fire = fire
        self._space = space
        self._heap: list[tuple[int, str]] = []
        self._set: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._asleep = False
        self._asleep_until: int | None = None
        self.stalled: Callable[[], None] | None = None

    def set(self, key: str, at: int | None) -> None:
        """Sets the time of a key, in ms of broker time; None removes it."""
        if at is None:
            self._set.pop(key, None)
            return
        if self._set.get(key) == at:
            return
        self._set[key] = at
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._set) + SLACK:
            # Removed times stay in the heap until they are reached. With long TTLs they would pile up.
            self._heap = [(moment, name) for name, moment in self._set.items()]
            heapq.heapify(self._heap)
        if self._asleep and (self._asleep_until is None or at < self._asleep_until):
            self._wake.set()

    def replace(self, times: dict[str, int]) -> None:
        """Forgets all times, and sets these."""
        self._set = times
        self._heap = [(at, key) for key, at in times.items()]
        heapq.heapify(self._heap)
        self._wake.set()

    def look_again(self) -> None:
        """Checks all times again after the broker clock jumped."""
        self._wake.set()

    def __len__(self) -> int:
        return len(self._set)

    def next(self) -> int | None:
        """The earliest time that was not removed or replaced; None if there is none."""
        while self._heap and self._set.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    async def run(self) -> None:
        """Fires what is due, for ever. Calls `stalled` if the loop woke up more than `STALL_MS` late."""
        slept, fired = True, 0
        while True:
            at, now = self.next(), self._now()
            if at is not None and at <= now:
                if slept and at < now - STALL_MS and self.stalled is not None:
                    self.stalled()
                slept, fired = False, fired + 1
                _, key = heapq.heappop(self._heap)
                del self._set[key]
                self._fire(key)
                if fired % 64 == 0:
                    # Thousands may be due at once: let other tasks run, and let the writer commit.
                    await asyncio.sleep(0)
                    await self._space()
                continue
            await self._sleep(at, now)
            slept = True

    async def _sleep(self, at: int | None, now: int) -> None:
        self._wake.clear()
        self._asleep, self._asleep_until = True, at
        try:
            async with asyncio.timeout(None if at is None else (at - now) / 1_000):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            self._asleep = False


class Drain:
    """Knows when all answers that were queued while the link was down have been read. Timers wait until then.

    An external MQTT server queues the answers and delivers them when the link is up. Devices that connect to
    the broker directly keep their answers and send them after they have reconnected. `ends` is per device,
    and None while the link is down. Times in broker ms.
    """

    def __init__(self) -> None:
        self._ends: int | None = None
        self._back: dict[str, int] = {}  # the ends of devices that have reconnected

    def begin(self, now: int, *, direct: bool) -> int:
        """Starts the drain; returns its latest end. `direct`: devices connect to the broker directly."""
        self._back.clear()
        self._ends = now + (COME_BACK_MS if direct else AFTER_MS)
        return self._ends

    def away(self) -> None:
        """The link went down."""
        self._ends = None

    def came(self, device_id: str, now: int) -> None:
        """A device reconnected and sends the answers that it kept: its drain ends `AFTER_MS` from now."""
        if self._ends is None:
            return
        if now < self._ends:
            self._back.setdefault(device_id, min(self._ends, now + AFTER_MS))
        else:
            self._back[device_id] = now + AFTER_MS

    def ends(self, device_id: str) -> int | None:
        return None if self._ends is None else self._back.get(device_id, self._ends)
