"""Reads who changed what: the events that a key, a device over HTTP, or the operator caused. Read-only."""

from __future__ import annotations

from broker.log import sqlite as log
from broker.log.chain import Row
from broker.seams import Sql
from projections.commands import veiled

SCANNED = 20_000  # rows of one read, because it blocks the reading thread
MARKS = "(actor LIKE 'key:%' OR actor LIKE 'operator:%' OR type = 'started')"


async def page(
    sql: Sql, actor: str | None, since: int | None, after: int, limit: int
) -> tuple[list[Row], int | None]:
    """The next entries after a position, ascending, and the position after which the next page begins.

    The position is None at the end of the log. `actor`: only events of this actor. `since`: in ms. A page may
    be empty.
    """
    if since is not None:
        after = max(after, (await log.place(sql, since - 1)))
    head = (await log.head(sql)).position
    reached = min(head, after + SCANNED)
    mark, values = (MARKS, ()) if actor is None else ("actor = ?", (actor,))
    found = await sql.all(
        f"SELECT {log.COLUMNS} FROM events WHERE position > ? AND position <= ? AND {mark} "
        "ORDER BY position LIMIT ?",
        (after, reached, *values, limit),
    )
    rows = await veiled(sql, [Row(*row) for row in found])
    if len(rows) == limit:
        reached = rows[-1].position
    return rows, reached if reached < head else None
