"""The faults of a simulated fleet: how often each happens, and which ones one command gets.

Pure. The faults of a command depend only on the seed, the device and the command's number. So the same run
has the same faults in any order of events, and the faults of one command never depend on another command.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, le=1)]


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of all commands; one command can have several faults. Durations in s: shortest, longest."""

    offline: Share = 0.0
    fail: Share = 0.0
    duplicate: Share = 0.0
    lose: Share = 0.0
    slow: Share = 0.0
    seed: int = 1
    slow_sec: tuple[float, float] = (1.0, 5.0)
    away_sec: tuple[float, float] = (1.0, 8.0)


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """The faults of one command. They happen only at its first delivery.

    `away_sec`: the connection breaks, before the device processes the command (`unread`) or after it.
    `lost`: the device sends no answer until the broker sends the command again.
    """

    failed: bool = False
    doubled: bool = False
    lost: bool = False
    slow_sec: float = 0.0
    away_sec: float = 0.0
    unread: bool = False

    @property
    def silent(self) -> bool:
        """Whether the broker gets no answer to the first delivery."""
        return self.lost or self.away_sec > 0


def fate(faults: Faults, hardware_id: str, command: str) -> Fate:
    """The faults of one command. `command` identifies it among the device's commands."""

    def draw(what: str) -> float:
        text = f"{faults.seed}/{hardware_id}/{command}/{what}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64

    def seconds(what: str, share: float, between: tuple[float, float]) -> float:
        shortest, longest = between
        return shortest + draw(f"{what}_sec") * (longest - shortest) if draw(what) < share else 0.0

    return Fate(
        failed=draw("fail") < faults.fail,
        doubled=draw("duplicate") < faults.duplicate,
        lost=draw("lose") < faults.lose,
        slow_sec=seconds("slow", faults.slow, faults.slow_sec),
        away_sec=seconds("offline", faults.offline, faults.away_sec),
        unread=draw("unread") < 0.5,
    )
