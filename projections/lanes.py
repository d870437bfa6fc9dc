"""The open commands of each device, in order of creation. A starting broker reads them."""

from __future__ import annotations

from array import array
from itertools import pairwise

import msgspec

from broker.domain.lifecycle import CommandState
from broker.seams import Sql
from projections.commands import LAST, OPEN, OPENED, opened

COMMON = (
    "project",
    "device_id",
    "hardware_id",
    "type",
    "device_type",
    "definition",
    "topic",
    "actor",
    "ttl_ms",
)


async def open_commands(sql: Sql, device_id: str | None = None) -> list[CommandState]:
    """All open commands, or those of one device, in order of creation."""
    where, values = ("AND device_id = ?", (device_id,)) if device_id is not None else ("", ())
    # PostgreSQL would sort the rows of 100,000 commands on its disk. With their positions sorted first, it
    # reads the rows in nearly this order. SQLite reads them in exactly this one: LIMIT keeps it from
    # dropping the inner ORDER BY.
    rows = sql.each(
        f"SELECT l.position, {OPENED} "
        f"FROM (SELECT position FROM {OPEN} {where} ORDER BY position LIMIT {LAST}) l "
        "CROSS JOIN commands c ON c.position = l.position CROSS JOIN events f ON f.position = l.position",
        values,
    )
    states: list[CommandState] = []
    positions = array("q")  # a list of pairs would take a tenth of the memory of a million open commands
    known: dict[object, object] = {}
    async for row in rows:
        states.append(opened(row[1:]))
        _share(states[-1], known)
        positions.append(row[0])
    if all(before < after for before, after in pairwise(positions)):
        return states
    return [states[index] for index in sorted(range(len(states)), key=positions.__getitem__)]


def _share(state: CommandState, known: dict[object, object]) -> None:
    """Values that many commands have in common are kept once: they are half of what one takes in memory.

    `state`: one that nobody else has yet. `known`: those of the commands that are read together with it.
    """
    for field in COMMON:
        value = getattr(state, field)
        msgspec.structs.force_setattr(state, field, known.setdefault(value, value))
