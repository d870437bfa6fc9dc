"""The books of a simulation: what the devices did, what the broker says of it, and whether the two agree.

Pure. The devices' side is counted here and by nobody else, so that a command that was done twice is seen
even where both sides would rather not know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import msgspec

from devices.clock import parse_rfc3339
from devices.fleet.faults import Fate, Faults, fate

NEVER_HANDED_OVER = ("pending", "expired", "cancelled")
CLOSED = ("executed", "failed", "timed_out", "expired", "cancelled")
# All are counted.
EXAMPLES_SHOWN = 10


class Sent(msgspec.Struct, frozen=True):
    """A command that the broker accepted."""

    hardware_id: str
    number: int


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A command as the broker shows it; what else it shows does not matter here."""

    id: str
    state: str
    created_at: str
    executed_at: str | None = None


class Deed(msgspec.Struct):
    """What one device did about one command."""

    fate: Fate
    deliveries: int = 0
    runs: int = 0

    @property
    def muted(self) -> bool:
        return self.fate.silent and self.deliveries < 2


class Ledger:
    """All deeds by device and command id."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._deeds: dict[tuple[str, str], Deed] = {}
        self.runs = 0

    def delivered(self, hardware_id: str, command_id: str, number: object) -> Deed:
        """Another delivery. A command without a number is not ours, and is told apart by its id."""
        deed = self._deeds.get((hardware_id, command_id))
        if deed is None:
            name = str(number) if isinstance(number, int) else command_id
            deed = self._deeds[hardware_id, command_id] = Deed(fate(self._faults, hardware_id, name))
        deed.deliveries += 1
        return deed

    def deed(self, hardware_id: str, command_id: str) -> Deed:
        """Of a command that was delivered to the device."""
        return self._deeds[hardware_id, command_id]

    def ran(self, hardware_id: str, command_id: str) -> Deed:
        deed = self._deeds[hardware_id, command_id]
        deed.runs += 1
        self.runs += 1
        return deed

    def runs_by_command(self) -> Counter[str]:
        """On all devices together, so that a command on the wrong one counts too."""
        runs = Counter[str]()
        for (_, command_id), deed in self._deeds.items():
            runs[command_id] += deed.runs
        return runs


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """How many of the sent commands each fault was drawn for."""

    offline: int
    fail: int
    duplicate: int
    lose: int
    slow: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a simulation. `refused`: not taken by the broker; all else is of what it accepted.

    `doubled`: done more than once. `lost`: accepted and not known, or not closed though the device was there.
    `misfits`: what the broker says does not fit what the device did. Latency is from created to executed.
    """

    devices: int
    seed: int
    interrupted: bool
    sending_sec: float
    sent: int
    refused: int
    executed: int
    failed: int
    timed_out: int
    expired: int
    cancelled: int
    open: int
    doubled: int
    lost: int
    misfits: int
    drawn: Drawn
    latency_p50_ms: int | None
    latency_p99_ms: int | None
    examples: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not (self.doubled or self.lost or self.misfits)


def summarise(
    *,
    faults: Faults,
    devices: int,
    ledger: Ledger,
    sent: Mapping[str, Sent],
    views: Mapping[str, View],
    online: frozenset[str],
    refused: int,
    sending_sec: float,
    interrupted: bool,
) -> Summary:
    """`views` is all that the broker knows of `sent`; `online` names the devices that are connected now."""
    runs = ledger.runs_by_command()
    states = Counter(view.state for view in views.values())
    fates = {id: fate(faults, to.hardware_id, str(to.number)) for id, to in sent.items()}
    unknown = [id for id in sent if id not in views]
    unclosed = [id for id, view in views.items() if view.state not in CLOSED]
    left = [] if interrupted else [id for id in unclosed if sent[id].hardware_id in online]
    misfits = [
        f"{id} on {sent[id].hardware_id}: {why}"
        for id, view in views.items()
        if (why := misfit(view.state, fates[id], runs[id])) is not None
    ]
    examples = [
        *(f"{id} ran {count} times" for id, count in runs.items() if count > 1),
        *(f"{id} was accepted, and the broker does not know it" for id in unknown),
        *(f"{id} is {views[id].state}, though {sent[id].hardware_id} is online" for id in left),
        *misfits,
    ]
    took = sorted(_took_ms(view) for view in views.values() if view.state == "executed")
    return Summary(
        devices=devices,
        seed=faults.seed,
        interrupted=interrupted,
        sending_sec=round(sending_sec, 3),
        sent=len(sent),
        refused=refused,
        executed=states["executed"],
        failed=states["failed"],
        timed_out=states["timed_out"],
        expired=states["expired"],
        cancelled=states["cancelled"],
        open=len(unclosed),
        doubled=sum(count > 1 for count in runs.values()),
        lost=len(unknown) + len(left),
        misfits=len(misfits),
        drawn=Drawn(
            offline=sum(each.away_sec > 0 for each in fates.values()),
            fail=sum(each.failed for each in fates.values()),
            duplicate=sum(each.doubled for each in fates.values()),
            lose=sum(each.lost for each in fates.values()),
            slow=sum(each.slow_sec > 0 for each in fates.values()),
        ),
        latency_p50_ms=percentile(took, 50),
        latency_p99_ms=percentile(took, 99),
        examples=tuple(examples[:EXAMPLES_SHOWN]),
    )


def misfit(state: str, drawn: Fate, runs: int) -> str | None:
    """Why the state that the broker shows cannot be, given what the device drew and did; None if it can."""
    if state in NEVER_HANDED_OVER and runs:
        return f"{state} means never handed over, and the device did it"
    if state == "executed" and (drawn.failed or not runs):
        return "executed, and the device failed it" if runs else "executed, and no device did it"
    if state == "failed" and not (drawn.failed and runs):
        return "failed, and the device did not say so"
    if state == "timed_out" and not drawn.silent:
        return "timed_out, and the device answered"
    return None


def percentile(ordered: list[int], percent: int) -> int | None:
    """The nearest rank; None of nothing."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else None


def _took_ms(view: View) -> int:
    assert view.executed_at is not None, "an executed command says when"
    return parse_rfc3339(view.executed_at) - parse_rfc3339(view.created_at)
