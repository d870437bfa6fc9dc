"""The queries on big tables use the index that they were written for, without naming it."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from broker.domain.fleet import DeviceSet
from broker.log import sqlite as log
from broker.log.driven import Driven, drive
from broker.seams import Sql
from projections import commands, figures, follower, past
from projections.commands import Filter

SOME = DeviceSet(names=frozenset({"lamp-1"}))
DEVICE = Filter(project="acme", device_id="dev_1")


class Explaining(Driven):
    """Notes how SQLite would carry out each query."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self.plans: list[str] = []

    async def all(self, text: str, values: Sequence[Any] = (), /) -> list[Any]:
        self._explain(text, values)
        return await super().all(text, values)

    async def one(self, text: str, values: Sequence[Any] = (), /) -> Any:
        self._explain(text, values)
        return await super().one(text, values)

    def _explain(self, text: str, values: Sequence[Any]) -> None:
        found = self.connection.execute(f"EXPLAIN QUERY PLAN {text}", values).fetchall()
        self.plans.append("\n".join(row[3] for row in found))


@pytest.fixture
def sql() -> Iterator[Explaining]:
    with closing(sqlite3.connect(":memory:")) as connection:
        follower.open_log(connection, "log_1", "00")
        yield Explaining(connection)


Read = Callable[[Sql], Awaitable[object]]
CASES: dict[str, tuple[Read, str]] = {
    "a device's own events": (lambda sql: log.device_stream(sql, "device/d", 9), "INDEX events_devices"),
    "its last presence": (lambda sql: log.device_stream(sql, "device/d", 9), "INDEX events_stream"),
    "a lane of the past": (lambda sql: past.lane(sql, "d", 9), "COVERING INDEX commands_device"),
    "commands of the past of a device": (
        lambda sql: past.commands(sql, DEVICE, 9, 9),
        "INDEX commands_device",
    ),
    "commands that a purge would erase": (
        lambda sql: commands.closed_before(sql, 9),
        "COVERING INDEX commands_closed",
    ),
    "figures of all": (lambda sql: figures.figures(sql, None, 0, 9, 3), "INDEX commands_closed"),
    "figures of a project": (lambda sql: figures.figures(sql, "acme", 0, 9, 3), "INDEX commands_closed"),
    "figures of a set": (lambda sql: figures.figures(sql, "acme", 0, 9, 3, SOME), "INDEX commands_closed"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_query_uses_its_index(sql: Explaining, case: str) -> None:
    read, index = CASES[case]
    drive(read(sql))

    assert any(index in plan for plan in sql.plans), sql.plans
    if "figures" in case:  # both queries by time, and neither sorts
        by_time = [plan for plan in sql.plans if index in plan]
        assert len(by_time) == 2
        assert not any("FOR ORDER BY" in plan for plan in by_time), by_time
