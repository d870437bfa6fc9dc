"""The result of a simulation: compares what the devices did with the states that the broker shows.

Pure. This module counts every execution on the devices itself, so it sees a command that was executed twice
even if neither the device nor the broker reports it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from devices.clock import parse_rfc3339
from devices.fleet.faults import Fate, Faults, fate

NEVER_HANDED_OVER = ("pending", "expired", "cancelled")
CLOSED = ("executed", "failed", "timed_out", "expired", "cancelled")
# All problems are counted, but only this many are shown.
EXAMPLES_SHOWN = 10


class Sent(msgspec.Struct, frozen=True):
    """A command that the broker accepted."""

    hardware_id: str
    number: int


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A command as the broker shows it; only the fields that are needed here."""

    id: str
    state: str
    created_at: str
    executed_at: str | None = None


class Deed(msgspec.Struct):
    """What one device did with one command."""

    fate: Fate
    deliveries: int = 0
    runs: int = 0

    @property
    def muted(self) -> bool:
        return self.fate.silent and self.deliveries < 2


class Ledger:
    """All `Deed`s, by device and command id."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._deeds: dict[tuple[str, str], Deed] = {}
        self.runs = 0

    def delivered(self, hardware_id: str, command_id: str, number: object) -> Deed:
        """Counts a delivery. A command without a number is from another client; its id selects its faults."""
        deed = self._deeds.get((hardware_id, command_id))
        if deed is None:
            name = str(number) if isinstance(number, int) else command_id
            deed = self._deeds[hardware_id, command_id] = Deed(fate(self._faults, hardware_id, name))
        deed.deliveries += 1
        return deed

    def deed(self, hardware_id: str, command_id: str) -> Deed:
        """The deed of a command that was delivered to the device."""
        return self._deeds[hardware_id, command_id]

    def ran(self, hardware_id: str, command_id: str) -> Deed:
        deed = self._deeds[hardware_id, command_id]
        deed.runs += 1
        self.runs += 1
        return deed

    def runs_by_command(self) -> Counter[str]:
        """Executions per command on all devices together, so that an execution on a wrong device counts."""
        runs = Counter[str]()
        for (_, command_id), deed in self._deeds.items():
            runs[command_id] += deed.runs
        return runs


class Acted(NamedTuple):
    """How often a bought device executed and refused a command; it does not know which. `fates`: its
    faults."""

    hardware_id: str
    runs: int
    refused: int
    fates: Sequence[Fate]


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """For each fault: how many of the sent commands have it."""

    offline: int
    fail: int
    duplicate: int
    lose: int
    slow: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a simulation. `refused`: commands that the broker refused. All other counts are of
    accepted commands.

    `doubled`: executed more than once. `lost`: accepted, but the broker does not know them, or they are not
    closed although the device is online. `misfits`: the broker's state contradicts what the device did.
    Latency is from created to executed.
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
    bought: Sequence[Acted] = (),
) -> Summary:
    """`views`: the commands of `sent` that the broker knows. `online`: names of the connected devices.
    `bought`: what the devices did, if they get no command ids."""
    runs = ledger.runs_by_command()
    states = Counter(view.state for view in views.values())
    fates = {id: fate(faults, to.hardware_id, str(to.number)) for id, to in sent.items()}
    drawn = [each for acted in bought for each in acted.fates] if bought else list(fates.values())
    unknown = [id for id in sent if id not in views]
    unclosed = [id for id, view in views.items() if view.state not in CLOSED]
    left = [] if interrupted else [id for id in unclosed if sent[id].hardware_id in online]
    misfits = (
        _overstated(bought, sent, views)
        if bought
        else [
            f"{id} on {sent[id].hardware_id}: {why}"
            for id, view in views.items()
            if (why := misfit(view.state, fates[id], runs[id])) is not None
        ]
    )
    examples = [
        *(f"{id} ran {count} times" for id, count in runs.items() if count > 1),
        *(f"{id} was accepted, but the broker does not know it" for id in unknown),
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
            offline=sum(each.away_sec > 0 for each in drawn),
            fail=sum(each.failed for each in drawn),
            duplicate=sum(each.doubled for each in drawn),
            lose=sum(each.lost for each in drawn),
            slow=sum(each.slow_sec > 0 for each in drawn),
        ),
        latency_p50_ms=percentile(took, 50),
        latency_p99_ms=percentile(took, 99),
        examples=tuple(examples[:EXAMPLES_SHOWN]),
    )


def _overstated(bought: Sequence[Acted], sent: Mapping[str, Sent], views: Mapping[str, View]) -> list[str]:
    """The devices of which the broker shows more ends than there were."""
    shown = Counter((sent[id].hardware_id, view.state) for id, view in views.items())
    return [
        f"{acted.hardware_id}: {shown[acted.hardware_id, state]} {state}, but the device did so {count} times"
        for acted in bought
        for state, count in (("executed", acted.runs), ("failed", acted.refused))
        if shown[acted.hardware_id, state] > count
    ]


def misfit(state: str, drawn: Fate, runs: int) -> str | None:
    """Why the broker's state contradicts the command's faults and executions; None if it does not."""
    if state in NEVER_HANDED_OVER and runs:
        return f"{state} means never sent, but the device executed it"
    if state == "executed" and (drawn.failed or not runs):
        return "executed, but the device failed it" if runs else "executed, but no device executed it"
    if state == "failed" and not (drawn.failed and runs):
        return "failed, but the device did not report a failure"
    if state == "timed_out" and not drawn.silent:
        return "timed_out, but the device answered"
    return None


def percentile(ordered: list[int], percent: int) -> int | None:
    """The percentile by nearest rank; None for an empty list."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else None


def _took_ms(view: View) -> int:
    assert view.executed_at is not None, "an executed command has a time"
    return parse_rfc3339(view.executed_at) - parse_rfc3339(view.created_at)
