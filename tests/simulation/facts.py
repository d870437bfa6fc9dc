"""A recorded history, indexed for the checkers, and the constants that the checkers share.

Nothing here may be imported from the broker: the life-cycle table is written down a second time on purpose,
so that the checkers do not depend on the code they check.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import msgspec

from tests.simulation.history import Commit, History, Row

# event: (states it may follow, state it leads to); contract.md, section 2.
TABLE: dict[str, tuple[frozenset[str], str]] = {
    "created": (frozenset({"none"}), "pending"),
    "published": (frozenset({"pending", "published"}), "published"),
    "acknowledged": (frozenset({"published", "timed_out"}), "acknowledged"),
    "progressed": (frozenset({"published", "acknowledged", "timed_out"}), "acknowledged"),
    "executed": (frozenset({"published", "acknowledged", "timed_out"}), "executed"),
    "failed": (frozenset({"pending", "published", "acknowledged", "timed_out"}), "failed"),
    "timed_out": (frozenset({"published", "acknowledged"}), "timed_out"),
    "expired": (frozenset({"pending"}), "expired"),
    "cancelled": (frozenset({"pending"}), "cancelled"),
}
FINAL = frozenset({"executed", "failed", "expired", "cancelled"})
CLOSING = FINAL | {"timed_out"}
ANSWER_EVENT = {
    "acknowledged": "acknowledged",
    "progress": "progressed",
    "executed": "executed",
    "failed": "failed",
}
FROM_DEVICE = frozenset({"device_ack", "device_result", "relay_report"})
GRACE_MS = 15_000
NEVER = 1 << 62
NO_COMMANDS = ("system", "erasures", "audit", "owner")


class Run(msgspec.Struct):
    """One life of the broker's process. `ahead`: how far true time was ahead of its clock, at most, ms: the
    shortest time from an event's own time to its commit. `runs`: its clock ran from the start."""

    first: int  # the head of its first commit: rows before that may be of the life before
    ahead: int = NEVER
    runs: bool = False

    def true_time(self, broker_time: int) -> int | None:
        """When its clock showed this time, at the latest; None if that is not known."""
        return broker_time + self.ahead if self.runs and self.ahead != NEVER else None


class Facts:
    """A history, indexed for lookups."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.streams: dict[str, list[Row]] = defaultdict(list)
        # Erased rows keep the data that the history saw when they became durable, so that the other
        # invariants are checked for erased commands as well.
        self.empty = {row["position"] for row in history.log if row["data"] is None}
        self.rows = [history.as_recorded(row) for row in history.log]
        for row in self.rows:
            self.streams[row["stream"]].append(row)
        self.commands = {
            name: rows for name, rows in self.streams.items() if "/" not in name and name not in NO_COMMANDS
        }
        self.created = {name: rows[0] for name, rows in self.commands.items() if rows[0]["type"] == "created"}
        self.publishes = [record for record in history.wire if record.what == "publish"]
        self._commits: list[Commit] = []
        for commit in history.commits:
            if not self._commits or commit.head > self._commits[-1].head:
                self._commits.append(commit)
        self._heads = [commit.head for commit in self._commits]

    def commit_of(self, row: Row) -> Commit | None:
        """The first observed commit that covers the row. From this moment on the row is durable."""
        index = bisect_left(self._heads, row["position"])
        return self._commits[index] if index < len(self._commits) else None

    @cached_property
    def lives(self) -> list[Run]:
        """The lives of the broker's process. A process may record some events before its `started`."""
        found = [Run(first=0)]
        for down in self._downs:
            index = bisect_right(self._commits, down, key=lambda commit: commit.seq)
            found.append(Run(first=self._commits[index].head if index < len(self._commits) else NEVER))
        for row in self.rows:
            commit = self.commit_of(row)
            if commit is None:
                continue
            life = found[bisect_left(self._downs, commit.seq)]
            if row["type"] == "started":
                life.runs = not self.behind(row)
            if row["position"] > life.first:
                life.ahead = min(life.ahead, commit.t - row["recorded_at"])
        return found

    @cached_property
    def _downs(self) -> list[int]:
        return [each.seq for each in self.history.lives if each.what in ("down", "ended")]

    def behind(self, started: Row) -> bool:
        """Whether the process may have started with a clock before the last event. Then the clock stands, and
        shows the time of that event."""
        position = started["position"]
        before: int = self.rows[position - 2]["recorded_at"] if position > 1 else -NEVER
        at: int = started["recorded_at"]
        return at <= before + 1

    def true_time(self, row: Row, broker_time: int) -> int | None:
        """When the process that recorded the row saw this time on its clock, at the latest; None if that
        is not known."""
        life = self.life_of(row)
        return None if life is None else life.true_time(broker_time)

    def life_of(self, row: Row) -> Run | None:
        """The life of the process that recorded the row; None if that is not known."""
        commit = self.commit_of(row)
        if commit is None:
            return None
        life = self.life_at(commit.seq)
        return life if row["position"] > life.first else None

    def life_at(self, seq: int) -> Run:
        """The life of the process that ran at this moment, or that ran next."""
        return self.lives[bisect_left(self._downs, seq)]

    def durable(self, row: Row) -> int:
        commit = self.commit_of(row)
        return commit.seq if commit else NEVER

    def not_durable(self, row: Row) -> int:
        """The last `seq` at which the row was seen not to be durable; 0 if there was none."""
        index = bisect_left(self._heads, row["position"])
        return self._commits[index - 1].seq if index else 0

    def state_at(self, command_id: str, position: int) -> str:
        """The state of a command when the event at this position was recorded."""
        state = "none"
        for row in self.commands.get(command_id, ()):
            if row["position"] < position and row["type"] in TABLE:
                state = TABLE[row["type"]][1]
        return state

    def deleted(self, device_id: str) -> int:
        """The `seq` at which the device's `deleted` event became durable, or NEVER."""
        rows = self.streams.get(f"device/{device_id}", ())
        return min((self.durable(row) for row in rows if row["type"] == "deleted"), default=NEVER)

    def covered(self, erased: Row) -> Iterator[str]:
        """The commands that an `erased` event covers: those it names, or those that were closed at that
        moment and created before its cutoff."""
        said = data(erased)
        yield from said.get("ids", ())
        for command_id, row in self.created.items() if "cutoff" in said else ():
            rows = self.commands[command_id]
            before = [each["type"] for each in rows if each["position"] < erased["position"]]
            if row["recorded_at"] < said["cutoff"] and before and before[-1] in CLOSING:
                yield command_id

    @cached_property
    def gone(self) -> dict[str, Row]:
        """For each command the first event that erased it."""
        # reversed: a later purge covers the command as well, and the first event wins
        rows = reversed(self.streams.get("erasures", []))
        return {each: row for row in rows for each in self.covered(row)}

    def erased_at(self, command_id: str) -> int:
        """The `seq` at which the erasure of the command became durable, or NEVER."""
        return self.durable(self.gone[command_id]) if command_id in self.gone else NEVER

    def first(self, command_id: str, event: str) -> Row | None:
        return next((row for row in self.commands.get(command_id, ()) if row["type"] == event), None)

    def definition(self, command_id: str) -> dict[str, Any]:
        """The device type's definition of this command when it was accepted."""
        row = self.created.get(command_id)
        digest = data(row).get("definition") if row else None
        rows = self.streams.get(f"type/{digest}")
        return data(rows[0]).get("definition", {}) if rows else {}


def data(row: Row) -> dict[str, Any]:
    """The row's data; empty for an erased row."""
    return row["data"] or {}
