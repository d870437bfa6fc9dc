"""One statement for many rows: every row once, in order, whatever their number."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from broker.log.many import AT_ONCE, many


@pytest.fixture
def sql() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as opened:
        yield opened


@pytest.mark.parametrize("count", [0, 1, 2, 3, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE + 7])
def test_every_row_is_inserted_once_and_in_order(sql: sqlite3.Connection, count: int) -> None:
    sql.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body BLOB, name TEXT)")
    rows = [(number, b"\0%d" % number, None if number % 3 else f"n{number}") for number in range(count)]

    many(sql, "INSERT INTO t VALUES {}", rows)

    assert sql.execute("SELECT * FROM t ORDER BY id").fetchall() == rows
    assert {kind for (kind,) in sql.execute("SELECT typeof(body) FROM t")} <= {"blob"}


def test_what_each_statement_gives_is_returned(sql: sqlite3.Connection) -> None:
    rows = [(number, number + 1) for number in range(2 * AT_ONCE + 5)]

    found = many(sql, "SELECT v.column1, v.column2 FROM (VALUES {}) v", rows)

    assert found == rows
