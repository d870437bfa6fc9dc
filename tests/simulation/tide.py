"""What a run has, and when it is busy: spells of many requests and faults, and long quiet stretches between.

Timers of hours, hourly housekeeping and connections that live long are only met in a run of hours. In the
quiet stretches only devices, connections and the broker itself are awake, so that an hour costs little.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import msgspec

from tests.simulation.loop import SimLoop

SPELLS, SPELL_SEC = (2, 3), (100, 260)
QUIET_SEC, LONGEST_QUIET_SEC = 2_400, 14_400


class Parts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run may have at most. `only`: names of faults, requests and other parts; None for all of them.

    Everything is drawn from the seed as before; what goes beyond these bounds is left out.
    """

    spells: int = 3
    devices: int = 8
    clients: int = 4
    only: tuple[str, ...] | None = None


ALL = Parts()


class Tide:
    """`busy` is set during a spell. A worker that awaits it acts in spells only. `asked`: the names of parts
    that the run had, or that were left out."""

    def __init__(self, loop: SimLoop, parts: Parts = ALL) -> None:
        self.parts = parts
        self.asked: dict[str, None] = {}
        self.busy = asyncio.Event()
        self.busy.set()
        self._random = loop.rng("tide")

    async def run(self) -> None:
        """All spells of one run, each with the quiet that follows it."""
        for busy_sec, quiet_sec in stretches(self._random, self.parts):
            self.busy.set()
            await asyncio.sleep(busy_sec)
            self.busy.clear()
            if quiet_sec:
                await asyncio.sleep(quiet_sec)

    async def sleep(self, times: float, busy_sec: float, quiet_sec: float) -> None:
        """Sleeps for `times` that many seconds; in the quiet at most until the next spell."""
        if self.busy.is_set():
            await asyncio.sleep(times * busy_sec)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(times * quiet_sec):
                await self.busy.wait()

    def allows(self, name: str) -> bool:
        self.asked[name] = None
        return self.parts.only is None or name in self.parts.only

    def end(self) -> None:
        self.busy.set()


def stretches(draw: random.Random, parts: Parts = ALL) -> list[tuple[float, float]]:
    """How many seconds each spell and the quiet after it take."""
    found = []
    for _ in range(min(parts.spells, draw.randint(*SPELLS))):
        busy_sec = draw.uniform(*SPELL_SEC)
        # In one of four cases the next spell follows at once: no device has calmed down yet.
        quiet = draw.random() < 0.75
        found.append((busy_sec, min(LONGEST_QUIET_SEC, draw.expovariate(1 / QUIET_SEC)) if quiet else 0.0))
    return found
