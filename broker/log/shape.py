"""The form of a log file: what the hash chain itself cannot see.

The chain is walked from position 1 on, over the table `events`. A row before position 1, a view in place of
the table, or an index without an entry would show or hide events although every hash fits.
"""

from __future__ import annotations

from broker.seams import Sql


async def fault(sql: Sql, tables: str) -> str | None:
    """A sentence about what is wrong with the form of the file, or None. Takes the same time for any log.

    `tables`: the statements that create the tables of the log. `events` and its indexes must be exactly as
    they say; the others must be tables. There must be no trigger and no view: they change what is read.
    """
    wanted = [_plain(statement) for statement in tables.split(";") if statement.strip()]
    found = await sql.all("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master")
    for kind, name, _, _ in found:
        if kind in ("trigger", "view"):
            return f"the file has a {kind} named {str(name)[:64]!r}, and no log has one"
    there = {str(row[1]): _plain(str(row[3])) for row in found}
    for statement in wanted:
        name = statement.split(" (")[0].removeprefix("CREATE UNIQUE ").removeprefix("CREATE ").split()[1]
        if name not in there:
            return f"{name} is missing"
        if name.startswith("events") and there[name] != statement:
            return f"{name} is not as this release creates it"
    for kind, name, table, text in found:
        if kind == "index" and table == "events" and _plain(str(text)) not in wanted:
            return f"the table events has an index named {str(name)[:64]!r}, and no log has one"
    first = (await sql.one("SELECT min(position) FROM events"))[0]
    if first is not None and first < 1:
        return f"there is a row at position {first}, and the first position is 1"
    return None


async def integrity(sql: Sql) -> str | None:
    """What SQLite finds wrong with the table `events` and its indexes, or None. Reads all of them."""
    found = str((await sql.one("PRAGMA main.integrity_check(events)"))[0])
    return None if found == "ok" else f"the file is damaged: {found[:200]}"


def _plain(statement: str) -> str:
    return " ".join(statement.replace("IF NOT EXISTS ", "").split())
