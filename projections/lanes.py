"""The table `lanes`: the open commands of each device, in order of creation. A starting broker reads it.

Rows are written in the transaction of the events that open and close commands.
"""

from __future__ import annotations

from typing import Any

from broker.domain.lifecycle import CommandState
from broker.seams import Sql
from projections.commands import COLUMNS, folded

TABLES = (
    """CREATE TABLE IF NOT EXISTS lanes (
        device_id TEXT NOT NULL, position INTEGER NOT NULL,
        PRIMARY KEY (device_id, position)) WITHOUT ROWID""",
)
KEYS = {"lanes": "device_id, position"}
INSERT = "INSERT INTO lanes (device_id, position) VALUES (?, ?)"
REOPEN = """INSERT INTO lanes (device_id, position) SELECT device_id, position FROM commands WHERE id = ?
    ON CONFLICT DO NOTHING"""
CLOSE = "DELETE FROM lanes WHERE device_id = ? AND position = (SELECT position FROM commands WHERE id = ?)"


async def open_commands(sql: Sql, device_id: str | None = None) -> list[CommandState]:
    """All open commands, or those of one device; lane by lane, each lane in order of creation."""
    where, values = ("WHERE l.device_id = ?", (device_id,)) if device_id is not None else ("", ())
    found = sql.each(
        f"SELECT {COLUMNS} FROM lanes l CROSS JOIN commands c ON c.position = l.position "
        f"CROSS JOIN events f ON f.position = l.position {where} ORDER BY l.device_id, l.position",
        values,
    )
    return [folded(row) async for row in found]


async def dump(sql: Sql) -> list[tuple[Any, ...]]:
    found = await sql.all("SELECT device_id, position FROM lanes ORDER BY device_id, position")
    return [tuple(row) for row in found]
