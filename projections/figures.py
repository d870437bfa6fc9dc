"""Figures of the last minutes: how many commands were created, how they ended, and how long they took.

They are read from the projection of commands. The number of rows read is bounded: with more rows the figures
cover a shorter time, and `since` says which.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from broker.domain.fleet import DeviceSet
from broker.domain.lifecycle import CLOSED, State
from broker.log import sqlite as log
from broker.seams import Sql
from projections.commands import HIDDEN, changes
from projections.devices import in_set

MOST_POSITIONS = 500_000  # of the log
MOST_CLOSED = 50_000  # closed commands that are counted
MOST_TIMED = 2_000  # executed commands whose latency is read, the newest
# All projects that have commands. It steps along the index from one project to the next, because there are
# few projects and many commands.
PROJECTS = """WITH RECURSIVE p (project) AS (SELECT min(project) FROM commands UNION ALL SELECT
    (SELECT min(project) FROM commands WHERE project > p.project) FROM p WHERE p.project IS NOT NULL)"""


class Figures(NamedTuple):
    """`since`: the start, ms. `states`: the number of open commands now, and of commands closed since then.
    `created`, `closed`: one entry for each piece of the time. `acknowledged`, `executed`: latencies in ms
    from the first hand-over, ascending."""

    since: int
    states: dict[str, int]
    created: list[int]
    closed: list[Counter[str]]
    acknowledged: list[int]
    executed: list[int]


class _Of(NamedTuple):
    """The commands that are counted: those of one project (None: all), with a condition on their devices."""

    project: str | None
    condition: str
    values: list[str]

    def where(self) -> tuple[str, list[str]]:
        if self.project is None:
            return self.condition, self.values
        return f"c.project = ? AND {self.condition}", [self.project, *self.values]

    def beside_time(self) -> tuple[str, list[str]]:
        """The same for a query by `closed_at`: written so that no index of project or device is used."""
        where, values = self.where()
        return where.replace("c.project =", "c.project || '' =").replace(
            "c.device_id IN", "c.device_id || '' IN"
        ), values


async def figures(
    sql: Sql, project: str | None, since: int, until: int, pieces: int, within: DeviceSet | None = None
) -> Figures:
    """The figures of one project; None: of all. `since` and `until` in ms; `pieces`: how many equal parts.
    `within`: of these devices only."""
    of = _Of(project, *in_set(within, "c.device_id"))
    first = max((await log.place(sql, since - 1)), (await log.head(sql)).position - MOST_POSITIONS)
    if first > 0:
        row = await sql.one("SELECT recorded_at FROM events WHERE position = ?", (first,))
        since = max(since, row[0])
    within_set, _ = _Of(None, of.condition, of.values).beside_time()
    ends = await sql.all(
        "SELECT c.state, c.closed_at, c.project FROM commands c "
        f"WHERE c.closed_at >= ? AND {within_set} AND NOT {HIDDEN} ORDER BY c.closed_at DESC LIMIT ?",
        (since, *of.values, MOST_CLOSED),
    )
    if len(ends) == MOST_CLOSED:
        since = ends[-1][1]
    length = max(1, until - since)
    closed = [Counter[str]() for _ in range(pieces)]
    for state, at, whose in ends:
        if project in (None, whose):
            closed[min(pieces - 1, max(0, at - since) * pieces // length)][state] += 1
    states = dict.fromkeys((state.value for state in State if state is not State.NONE), 0) | (
        await _open(sql, of)
    )
    for state in CLOSED:
        states[state.value] = sum(counts[state.value] for counts in closed)
    return Figures(
        since,
        states,
        (await _created(sql, of, since, length, pieces)),
        closed,
        *(await _took(sql, of, since)),
    )


async def _open(sql: Sql, of: _Of) -> dict[str, int]:
    whose, values = of.where()
    found = await sql.all(
        "SELECT c.state, count(*) FROM commands c INDEXED BY commands_open "
        f"WHERE c.closed_at IS NULL AND {whose} GROUP BY c.state",
        values,
    )
    return dict(found)


async def _created(sql: Sql, of: _Of, since: int, length: int, pieces: int) -> list[int]:
    edges = [(await log.place(sql, since - 1 + length * piece // pieces)) for piece in range(pieces)]
    edges.append((await log.head(sql)).position)
    values: list[str] = []
    if of.project is None:
        query = f"{PROJECTS} SELECT count(*) FROM p JOIN commands c ON c.project = p.project"
        query = f"{query} AND c.position > ? AND c.position <= ?"
    else:
        whose, values = of.where()
        query = f"SELECT count(*) FROM commands c WHERE {whose} AND c.position > ? AND c.position <= ?"
    return [
        (await sql.one(query, (*values, low, high)))[0] if low < high else 0 for low, high in pairwise(edges)
    ]


async def _took(sql: Sql, of: _Of, since: int) -> tuple[list[int], list[int]]:
    whose, values = of.beside_time()
    found = await sql.all(
        "SELECT c.later FROM commands c WHERE c.closed_at >= ? "
        f"AND c.state = 'executed' AND {whose} AND NOT {HIDDEN} ORDER BY c.closed_at DESC LIMIT ?",
        (since, *values, MOST_TIMED),
    )
    acknowledged, executed = [], []
    for (later,) in found:
        times = changes(later)
        if times.published_at is None:
            continue
        if times.delivered_at is not None:
            acknowledged.append(times.delivered_at - times.published_at)
        if times.executed_at is not None:
            executed.append(times.executed_at - times.published_at)
    return sorted(acknowledged), sorted(executed)
