"""The invariants of fan-outs (one command to many devices) and of commands that replace others.

Nothing here may be imported from the broker.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.simulation.facts import Facts, data
from tests.simulation.history import Row


def one_each(facts: Facts) -> Iterator[str]:
    """Part of R3: one key gives one command per device, and each answer names that device's own command."""
    seen: dict[tuple[str | None, str], str] = {}
    for call in facts.history.calls:
        if call.kind != "fan_out" or call.status != 200:
            continue
        for name, outcome in call.answer.items():
            command_id = outcome.get("command_id")
            if command_id is None:
                continue
            created = facts.created.get(command_id)
            if created is not None and data(created).get("hardware_id", name) != name:
                yield f"{command_id} was answered for {name} but belongs to another device"
            if call.key is not None and seen.setdefault((call.key, name), command_id) != command_id:
                yield f"key {call.key} gave {name} two commands: {seen[call.key, name]} and {command_id}"


def r10(facts: Facts) -> Iterator[str]:
    """A successor and the end of the command it replaces are in one commit; no replaceable command stays
    pending."""
    collapsing: dict[tuple[str | None, str], list[str]] = {}
    for command_id, row in facts.created.items():
        key = data(row).get("collapse_key")
        if key is None:
            continue
        before = collapsing.setdefault((row["device_id"], key), [])
        for old in before:
            if facts.state_at(old, row["position"]) == "pending":
                yield f"{old} was still pending when {command_id} replaced it"
        before.append(command_id)
    for command_id, rows in facts.commands.items():
        successor = data(rows[-1]).get("superseded_by")
        if successor is None:
            continue
        created = facts.created.get(successor)
        if created is None:
            yield f"{command_id} was replaced by {successor}, which is not in the log"
        elif not _may_replace(created, rows[0]):
            yield f"{command_id} was replaced by {successor}, which may not replace it"
        elif facts.durable(created) != facts.durable(rows[-1]):
            yield f"{command_id} was replaced by {successor} in another commit"


def _may_replace(successor: Row, row: Row) -> bool:
    """Whether `successor` may replace the command of `row`. An erased command has lost its key."""
    keyed = successor["data"] is None or data(successor).get("collapse_key") is not None
    return keyed and successor["device_id"] == row["device_id"]
