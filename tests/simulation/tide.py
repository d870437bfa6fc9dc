"""When the simulated world is busy: spells of many requests and faults, and long quiet stretches between.

Timers of hours, hourly housekeeping and connections that live long are only met in a run of hours. In the
quiet stretches only devices, connections and the broker itself are awake, so that an hour costs little.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from tests.simulation.loop import SimLoop

SPELLS, SPELL_SEC = (2, 3), (100, 260)
QUIET_SEC, LONGEST_QUIET_SEC = 2_400, 14_400


class Tide:
    """`busy` is set during a spell. A worker that awaits it acts in spells only."""

    def __init__(self, loop: SimLoop) -> None:
        self.busy = asyncio.Event()
        self.busy.set()
        self._random = loop.rng("tide")

    async def run(self) -> None:
        """All spells of one run, each with the quiet that follows it."""
        draw = self._random
        for _ in range(draw.randint(*SPELLS)):
            self.busy.set()
            await asyncio.sleep(draw.uniform(*SPELL_SEC))
            self.busy.clear()
            # In one of four cases the next spell follows at once: no device has calmed down yet.
            if draw.random() < 0.75:
                await asyncio.sleep(min(LONGEST_QUIET_SEC, draw.expovariate(1 / QUIET_SEC)))

    async def sleep(self, times: float, busy_sec: float, quiet_sec: float) -> None:
        """Sleeps for `times` that many seconds; in the quiet at most until the next spell."""
        if self.busy.is_set():
            await asyncio.sleep(times * busy_sec)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(times * quiet_sec):
                await self.busy.wait()

    def end(self) -> None:
        self.busy.set()
