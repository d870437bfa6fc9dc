"""What goes wrong in a simulated fleet, as values: how often, and what that means for one command.

Pure, and drawn from the seed, the device and the command's number alone: the same run has the same faults,
whatever the order of events. What befalls a command must never depend on what befell another.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, le=1)]


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of all commands; a command may meet several faults. Seconds are drawn between the two given."""

    offline: Share = 0.0
    fail: Share = 0.0
    duplicate: Share = 0.0
    lose: Share = 0.0
    slow: Share = 0.0
    seed: int = 1
    slow_sec: tuple[float, float] = (1.0, 5.0)
    away_sec: tuple[float, float] = (1.0, 8.0)


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What befalls one command. All of it happens at its first delivery, and only then.

    `away_sec`: the connection breaks, before the command is looked at (`unread`) or when it was taken.
    `lost`: no answer leaves the device until it is asked again.
    """

    failed: bool = False
    doubled: bool = False
    lost: bool = False
    slow_sec: float = 0.0
    away_sec: float = 0.0
    unread: bool = False

    @property
    def silent(self) -> bool:
        """The broker hears nothing of the first delivery."""
        return self.lost or self.away_sec > 0


def fate(faults: Faults, hardware_id: str, command: str) -> Fate:
    """The fate of one command; `command` is what tells it from the device's others."""

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
