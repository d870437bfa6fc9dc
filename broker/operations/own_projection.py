"""A user's own projection: a Python file that receives every event of the log and fills its own database.

It runs in its own process and only reads the log, so it never delays a command. Its checkpoint is written in
the same transaction as its rows.
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
from broker.log.driven import read_now
from broker.seams import Readable, Sqlite
from projections.commands import veiled

PAGE = 5_000


class Wrong(Exception):
    """The file is not a projection, or it failed. The message names the file and the problem."""


class OwnProjection:
    """A loaded file. It must define `TABLES` (SQL), `apply(sql, recorded)`, `COLUMNS` and `rows(sql)`."""

    def __init__(self, file: Path) -> None:
        """Runs the file.

        Raises:
            Wrong: the file cannot be run, or does not define all four.
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
        """Opens the projection's database, which holds its checkpoint; creates it if it does not exist.

        Raises:
            Wrong: the tables cannot be created.
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

    def follow(self, source: Readable, sql: sqlite3.Connection) -> int:
        """Applies at most PAGE events after the checkpoint. Returns how many rows it read; 0 at the head.

        Events whose data was erased are skipped.

        Raises:
            Wrong: the database belongs to another log, or `apply` failed; then the page is rolled back.
        """
        log_id, after = sql.execute("SELECT log_id, position FROM checkpoint").fetchone()
        if log_id not in (None, read_now(source, log.meta, "log_id")):
            raise Wrong(f"{self.file}: its database was made from another log ({log_id})")
        source.execute("BEGIN")  # one snapshot of the rows and of the pending erasures
        page = read_now(source, veiled, read_now(source, log.rows, after, PAGE))
        source.execute("COMMIT")
        if not page:
            return 0
        sql.execute("BEGIN IMMEDIATE")
        try:
            for row in page:
                after = row.position
                if row.data is not None:
                    self._apply(sql, log.recorded(row))
            sql.execute(
                "UPDATE checkpoint SET log_id = ?, position = ?",
                (read_now(source, log.meta, "log_id"), after),
            )
            sql.execute("COMMIT")
        except Exception as error:
            sql.execute("ROLLBACK")
            raise Wrong(f"{self.file}: apply, position {after}: {type(error).__name__}: {error}") from error
        return len(page)

    def rows(self, sql: sqlite3.Connection) -> list[tuple[Any, ...]]:
        """The projection's rows.

        Raises:
            Wrong: `rows` failed.
        """
        try:
            return [tuple(row) for row in self._rows(sql)]
        except Exception as error:
            raise Wrong(f"{self.file}: rows: {type(error).__name__}: {error}") from error


def caught_up(projection: OwnProjection, source: Sqlite, into: Path) -> list[tuple[Any, ...]]:
    """Applies all events of the log and returns the projection's rows."""
    with closing(projection.open(into)) as sql:
        while projection.follow(source, sql):
            pass
        return projection.rows(sql)
