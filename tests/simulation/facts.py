"""A history, sorted for looking things up, and the words in which the checkers speak of it.

Nothing here may be imported from the broker: the table of a command's life is written down a second time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from tests.simulation.history import Commit, History, Row

# event: (states it may follow, state it gives); contract.md, section 2.
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
_NO_COMMANDS = ("system", "erasures")


class Facts:
    """A history, sorted for looking things up."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.streams: dict[str, list[Row]] = defaultdict(list)
        # What was erased was seen when it became durable: the other invariants hold for it as well.
        self.empty = {row["position"] for row in history.log if row["data"] is None}
        self.rows = [history.as_recorded(row) for row in history.log]
        for row in self.rows:
            self.streams[row["stream"]].append(row)
        self.commands = {
            name: rows for name, rows in self.streams.items() if "/" not in name and name not in _NO_COMMANDS
        }
        self.created = {name: rows[0] for name, rows in self.commands.items() if rows[0]["type"] == "created"}
        self.publishes = [record for record in history.wire if record.what == "publish"]
        self._commits: list[Commit] = []
        for commit in history.commits:
            if not self._commits or commit.head > self._commits[-1].head:
                self._commits.append(commit)
        self._heads = [commit.head for commit in self._commits]

    def commit_of(self, row: Row) -> Commit | None:
        """The first moment at which anybody could know that the row is durable."""
        index = bisect_left(self._heads, row["position"])
        return self._commits[index] if index < len(self._commits) else None

    def durable(self, row: Row) -> int:
        commit = self.commit_of(row)
        return commit.seq if commit else NEVER

    def state_at(self, command_id: str, position: int) -> str:
        """The state of a command when the event at this position was recorded."""
        state = "none"
        for row in self.commands.get(command_id, ()):
            if row["position"] < position and row["type"] in TABLE:
                state = TABLE[row["type"]][1]
        return state

    def deleted(self, device_id: str) -> int:
        """When it was durable that the device is gone."""
        rows = self.streams.get(f"device/{device_id}", ())
        return min((self.durable(row) for row in rows if row["type"] == "deleted"), default=NEVER)

    def covered(self, erased: Row) -> Iterator[str]:
        """The commands that an `erased` event names, or that were closed then and older than its cutoff."""
        said = data(erased)
        yield from said.get("ids", ())
        for command_id, row in self.created.items() if "cutoff" in said else ():
            rows = self.commands[command_id]
            before = [each["type"] for each in rows if each["position"] < erased["position"]]
            if row["recorded_at"] < said["cutoff"] and before and before[-1] in CLOSING:
                yield command_id

    @cached_property
    def gone(self) -> dict[str, Row]:
        """The event by which each command was erased."""
        rows = reversed(self.streams.get("erasures", []))  # a later purge covers it as well
        return {each: row for row in rows for each in self.covered(row)}

    def erased_at(self, command_id: str) -> int:
        """When it was durable that nobody may know of the command any more."""
        return self.durable(self.gone[command_id]) if command_id in self.gone else NEVER

    def first(self, command_id: str, event: str) -> Row | None:
        return next((row for row in self.commands.get(command_id, ()) if row["type"] == event), None)

    def definition(self, command_id: str) -> dict[str, Any]:
        """What the device type said of this command when it was accepted."""
        row = self.created.get(command_id)
        digest = data(row).get("definition") if row else None
        rows = self.streams.get(f"type/{digest}")
        return data(rows[0]).get("definition", {}) if rows else {}


def data(row: Row) -> dict[str, Any]:
    """Erased rows have none."""
    return row["data"] or {}
