"""A projection of one's own: one Python file that is given every event of the log, into a file of its own.

It runs beside the broker and reads the log without touching it, so whatever it does, no command waits
for it. How far it has come is kept with what it made of it, in one transaction.
"""

from __future__ import annotations

import runpy
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from broker.domain.events import Recorded
from broker.log import sqlite as log
from projections.commands import veiled

PAGE = 5_000


class Wrong(Exception):
    """The file is no projection, or it failed; the message names the file and what is wrong."""


class OwnProjection:
    """What a file defines: `TABLES` (SQL), `apply(sql, recorded)`, `COLUMNS`, and `rows(sql)`."""

    def __init__(self, file: Path) -> None:
        """Runs the file.

        Raises:
            Wrong: it cannot be run, or lacks one of the four.
        """
        self.file = file
        try:
            defined = runpy.run_path(str(file))
        except Exception as error:
            raise Wrong(f"{file}: {type(error).__name__}: {error}") from error
        lacking = [name for name in ("TABLES", "apply", "COLUMNS", "rows") if name not in defined]
        if lacking:
            raise Wrong(f"{file}: it must define {', '.join(lacking)}")
        self.tables: str = defined["TABLES"]
        self.columns: tuple[str, ...] = tuple(defined["COLUMNS"])
        self._apply: Callable[[sqlite3.Connection, Recorded], object] = defined["apply"]
        self._rows: Callable[[sqlite3.Connection], Iterable[Iterable[Any]]] = defined["rows"]

    def open(self, into: Path) -> sqlite3.Connection:
        """Its own database, which knows how far it has come; made if it is not there.

        Raises:
            Wrong: its tables cannot be made, or the database is another's.
        """
        sql = sqlite3.connect(into, isolation_level=None)
        try:
            if sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'checkpoint'").fetchone() is None:
                sql.executescript(
                    f"BEGIN; {self.tables}; CREATE TABLE checkpoint (log_id TEXT, position INTEGER);"
                )
                sql.execute("INSERT INTO checkpoint VALUES (NULL, 0)")
                sql.execute("COMMIT")
        except sqlite3.Error as error:
            sql.close()
            raise Wrong(f"{self.file}: TABLES: {error}") from error
        return sql

    def follow(self, source: sqlite3.Connection, sql: sqlite3.Connection) -> int:
        """Takes in what the log has beyond the checkpoint, at most a page; gives how many rows that were.

        Events whose data was erased are left out: they are as if they never were.

        Raises:
            Wrong: `apply` failed at a position; nothing of that page was kept.
        """
        log_id, after = sql.execute("SELECT log_id, position FROM checkpoint").fetchone()
        if log_id not in (None, log.meta(source, "log_id")):
            raise Wrong(f"{self.file}: its database was made from another log ({log_id})")
        source.execute("BEGIN")  # one state of the rows and of what is to be erased of them
        page = veiled(source, log.rows(source, after, PAGE))
        source.execute("COMMIT")
        if not page:
            return 0
        sql.execute("BEGIN IMMEDIATE")
        try:
            for row in page:
                after = row.position
                if row.data is not None:
                    self._apply(sql, log.recorded(row))
            sql.execute("UPDATE checkpoint SET log_id = ?, position = ?", (log.meta(source, "log_id"), after))
            sql.execute("COMMIT")
        except Exception as error:
            sql.execute("ROLLBACK")
            raise Wrong(f"{self.file}: apply, position {after}: {type(error).__name__}: {error}") from error
        return len(page)

    def rows(self, sql: sqlite3.Connection) -> list[tuple[Any, ...]]:
        """What it shows.

        Raises:
            Wrong: `rows` failed.
        """
        try:
            return [tuple(row) for row in self._rows(sql)]
        except Exception as error:
            raise Wrong(f"{self.file}: rows: {type(error).__name__}: {error}") from error


def caught_up(projection: OwnProjection, source: sqlite3.Connection, into: Path) -> list[tuple[Any, ...]]:
    """Takes in all of history and gives what it shows."""
    with closing(projection.open(into)) as sql:
        while projection.follow(source, sql):
            pass
        return projection.rows(sql)
