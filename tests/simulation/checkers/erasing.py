"""The invariants of erasing: durable before it is answered, invisible afterwards, and carried out.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.simulation.facts import Facts, data

SEEING = ("create", "read", "list", "retry", "cancel", "abandon", "erase")
DONE = (200, 201)


def e1(facts: Facts) -> Iterator[str]:
    """E1: an erasure that was answered 200 is durable before the answer, as an event that names the command
    or the cutoff."""
    for call in facts.history.calls:
        if call.kind not in ("erase", "purge") or call.status != 200:
            continue
        said = [
            data(row)
            for row in facts.streams.get("erasures", ())
            if facts.durable(row) < (call.returned or 0)
        ]
        if call.kind == "erase" and not any(call.ids[0] in each.get("ids", ()) for each in said):
            yield f"the delete of {call.ids[0]} was answered 200 before it was durable"
        if call.kind == "purge" and not any("cutoff" in each for each in said):
            yield "a purge was answered 200 before it was durable"


def e2(facts: Facts) -> Iterator[str]:
    """E2: once an erasure is durable, no answer to a later request shows the command, and no later command is
    a retry of it."""
    for command_id, row in facts.created.items():
        old = data(row).get("retry_of")
        if old in facts.gone and facts.gone[old]["position"] < row["position"]:
            yield f"{command_id} retries {old}, which was erased"
    for call in facts.history.calls:
        if call.kind not in SEEING or call.status not in DONE:
            continue
        for command_id in _shown(call.kind, call.ids, call.answer):
            if facts.erased_at(command_id) < call.invoked:
                yield f"{call.kind} answered {call.status} with {command_id}, which was erased"


def e3(facts: Facts) -> Iterator[str]:
    """E3: at the end all data of erased commands is gone, no other command lost data, and no event follows an
    erasure."""
    for command_id, rows in facts.commands.items():
        empty = [row["position"] for row in rows if row["position"] in facts.empty]
        row = facts.gone.get(command_id)
        if row is None and empty:
            yield f"{command_id} has lost its data without an erasure"
        if row is None:
            continue
        if rows[-1]["position"] > row["position"]:
            yield f"{command_id} has a {rows[-1]['type']} after it was erased"
        if facts.history.ended_at is not None and len(empty) < len(rows):
            yield f"{command_id} was erased and still has data"


def _shown(kind: str, ids: tuple[str, ...], answer: Any) -> tuple[str, ...]:
    return tuple(each["id"] for each in answer["data"]) if kind == "list" else ids
