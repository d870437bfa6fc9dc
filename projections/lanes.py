"""The table `lanes`: the open commands of each device, in order of creation. A starting broker reads it.

Rows are written in the transaction of the events that open and close commands.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from broker.domain.lifecycle import CommandState
from broker.seams import Sql
from projections.commands import CREATED, OPENED, opened

TABLES = (
    """CREATE TABLE IF NOT EXISTS lanes (
        device_id TEXT NOT NULL, position INTEGER NOT NULL,
        PRIMARY KEY (device_id, position)) WITHOUT ROWID""",
)
KEYS = {"lanes": "device_id, position"}
INSERT = "INSERT INTO lanes (device_id, position) VALUES (?, ?)"
REOPEN = """INSERT INTO lanes (device_id, position)
    SELECT device_id, position FROM events WHERE stream = ? AND version = 1 ON CONFLICT DO NOTHING"""
CLOSE = f"DELETE FROM lanes WHERE device_id = ? AND position = {CREATED.format('?')}"


async def open_commands(sql: Sql, device_id: str | None = None) -> list[CommandState]:
    """All open commands, or those of one device, in order of creation."""
    where, values = ("WHERE device_id = ?", (device_id,)) if device_id is not None else ("", ())
    # PostgreSQL would sort the rows of 100,000 commands on its disk. With their positions sorted first, it
    # reads the rows in nearly this order. SQLite reads them lane by lane. So they are sorted here as well.
    rows = sql.each(
        f"SELECT l.position, {OPENED} FROM (SELECT position FROM lanes {where} ORDER BY position) l "
        "CROSS JOIN commands c ON c.position = l.position CROSS JOIN events f ON f.position = l.position",
        values,
    )
    found = [(row[0], opened(row[1:])) async for row in rows]
    found.sort(key=itemgetter(0))
    return [state for _, state in found]


async def dump(sql: Sql) -> list[tuple[Any, ...]]:
    found = await sql.all("SELECT device_id, position FROM lanes ORDER BY device_id, position")
    return [tuple(row) for row in found]
