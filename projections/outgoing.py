"""Reads events for subscribers: rows of the log, joined with the names of the device and the command.

Read-only. Events of the broker itself (starts, definitions, erasures) are left out.
"""

from __future__ import annotations

from typing import Any, cast

from broker.domain.cloudevents import Entry, Wanted
from broker.domain.events import CommandEvent, DeviceEvent, decode
from broker.seams import Sql
from projections.commands import HIDDEN
from projections.devices import in_set

# Limits of one read, because it blocks the reading thread: rows that are scanned, and bytes of data.
SCANNED = 5_000
TAKEN_BYTES = 262_144

# CROSS JOIN makes SQLite scan `events` in log order, whatever its query planner estimates.
PAGE = f"""SELECT e.position, e.stream, e.version, e.recorded_at, e.project, e.device_id, d.hardware_id,
    e.actor, e.type, e.schema, c.type, CASE WHEN {HIDDEN} THEN NULL ELSE e.data END
    FROM events e CROSS JOIN devices d ON d.id = e.device_id
    LEFT JOIN events i ON i.stream = e.stream AND i.version = 1
    LEFT JOIN commands c ON c.position = i.position
    WHERE e.position > ? AND e.position <= ?{{}} ORDER BY e.position LIMIT ?"""


async def kept_after(sql: Sql) -> int:
    """Every event after this position is still in the log. 0, because nothing removes rows today."""
    row = await sql.one("SELECT value FROM meta WHERE key = 'kept_after'")
    return int(row[0]) if row else 0


async def page(sql: Sql, wanted: Wanted, after: int, until: int, limit: int) -> tuple[list[Entry], int]:
    """The next matching entries after position `after`, up to `until`, ascending; at most `limit`.

    Also returns the last scanned position; the next page starts after it. A page may be empty.
    """
    reached = until if wanted.command_id is not None else min(until, after + SCANNED)
    clauses, values = _where(wanted)
    condition, more = in_set(wanted.within, "e.device_id")
    query = PAGE.format(f"{clauses} AND {condition}")
    entries: list[Entry] = []
    taken = 0
    async for row in sql.each(query, (after, reached, *values, *more, limit)):
        entries.append(_entry(row))
        taken += len(row[11] or b"")
        if len(entries) == limit or taken > TAKEN_BYTES:
            return entries, entries[-1].position
    return entries, max(after, reached)


def _where(wanted: Wanted) -> tuple[str, list[str]]:
    clauses = {
        " AND e.project = ?": wanted.project,
        " AND e.stream = ?": wanted.command_id,
        " AND e.type = ?": wanted.event,
        " AND c.type = ?": wanted.command,
        " AND (e.device_id = ? OR d.hardware_id = ?)": wanted.device,
    }
    chosen = {clause: value for clause, value in clauses.items() if value is not None}
    return "".join(chosen), [value for clause, value in chosen.items() for _ in range(clause.count("?"))]


def _entry(row: Any) -> Entry:
    event = None if row[11] is None else cast(CommandEvent | DeviceEvent, decode(row[8], row[11], row[9]))
    return Entry(
        position=row[0],
        stream=row[1],
        version=row[2],
        recorded_at=row[3],
        project=row[4],
        device_id=row[5],
        hardware_id=row[6],
        actor=row[7],
        type=row[8],
        schema=row[9],
        command=row[10],
        event=event,
    )
