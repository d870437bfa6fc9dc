"""The form of a log on PostgreSQL: what the hash chain itself cannot see.

The chain is walked over the table `events`. A row before position 1, a rule, a trigger, a policy, or a
missing index would show or hide events although every hash fits.
"""

from __future__ import annotations

from broker.log.postgresql.connection import Connection
from broker.log.postgresql.tables import SCHEMA

KINDS = """SELECT c.relname, c.relkind::text, c.relrowsecurity
        OR EXISTS (SELECT 1 FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal)
        OR EXISTS (SELECT 1 FROM pg_rewrite r WHERE r.ev_class = c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY c.relname"""
INDEXES = """SELECT i.relname, pg_get_indexdef(x.indexrelid, 1, true), pg_get_indexdef(x.indexrelid, 2, true),
        x.indisunique, x.indisvalid AND x.indisready, pg_get_expr(x.indpred, x.indrelid) IS NOT NULL
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
        JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = $1 AND t.relname = 'events' ORDER BY i.relname"""
WANTED = [
    ("events_devices", "stream", "version", False, True, True),
    ("events_pkey", '"position"', "", True, True, False),
    ("events_stream", "stream", "version", True, True, False),
]


async def fault(connection: Connection) -> str | None:
    """A sentence about what is wrong with the form of the log, or None."""
    kinds = await connection.fetch(KINDS, SCHEMA)
    for name, kind, extra in kinds:
        if kind != "r":
            return f"there is a view or another kind of table named {str(name)[:64]!r}, and no log has one"
        if extra:
            return f"the table {str(name)[:64]!r} has a trigger, a rule or a policy, and no log has one"
    if "events" not in [row[0] for row in kinds]:
        return "the table events is missing"
    if [tuple(row) for row in await connection.fetch(INDEXES, SCHEMA)] != WANTED:
        return "the indexes of the table events are not as this release creates them"
    first = await connection.fetchval("SELECT min(position) FROM events")
    if first is not None and first < 1:
        return f"there is a row at position {first}, and the first position is 1"
    return None
