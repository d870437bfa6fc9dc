"""Events as subscribers get them: rows of the log with the names that belong to them.

Only reads. The broker's own rows (its starts, definitions, erasures) are no subscriber's business.
"""

from __future__ import annotations

from typing import Any, cast

from broker.cloudevents import Entry, Wanted
from broker.events import CommandEvent, DeviceEvent, decode
from broker.seams import Sql
from projections.commands import HIDDEN

# Rows looked at in one read: one that wants little of a long log must not hold up the others.
SCANNED = 5_000

PAGE = f"""SELECT e.position, e.stream, e.version, e.recorded_at, e.project, e.device_id, d.hardware_id,
    e.actor, e.type, e.schema, c.type, CASE WHEN {HIDDEN} THEN NULL ELSE e.data END
    FROM events e JOIN devices d ON d.id = e.device_id LEFT JOIN commands c ON c.id = e.stream
    WHERE e.position > ? AND e.position <= ? {{}} ORDER BY e.position"""


def page(sql: Sql, wanted: Wanted, after: int, until: int, limit: int) -> tuple[list[Entry], int]:
    """At most `limit` entries that are wanted, ascending, from those after `after` up to `until`; and the
    position up to which was looked: go on from there."""
    if wanted.command_id is not None:
        found = sql.execute(PAGE.format("AND e.stream = ?"), (after, until, wanted.command_id)).fetchall()
        reached = until
    else:
        reached = min(until, after + SCANNED)
        found = sql.execute(PAGE.format(""), (after, reached)).fetchall()
    entries: list[Entry] = []
    for row in found:
        # What is not wanted is not even decoded.
        if (wanted.project, wanted.device_id) != (
            wanted.project and row[4],
            wanted.device_id and row[5],
        ) or wanted.event not in (None, row[8]):
            continue
        if wanted.fits(made := _entry(row)):
            entries.append(made)
            if len(entries) == limit:
                return entries, made.position
    return entries, max(after, reached)


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
