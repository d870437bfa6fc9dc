"""Reading the log again: folding its events, compared with a bare scan that only decodes them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from broker.domain.events import decode
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.world import DATABASE
from projections import follower
from scripts.bench.append import through_the_writer

WAITING = 1_000

Figures = dict[str, list[float]]


async def replays(home: Path, rounds: int, count: int) -> Figures:
    """Folds, rebuilds and verifies a log of `count` events, four for each command."""
    count -= count % 4
    await through_the_writer(home, WAITING, count)
    figures: Figures = {}
    with closing(sqlite3.connect(home / DATABASE, isolation_level=None)) as sql:
        works: dict[str, Callable[[], object]] = {
            "bare scan and decode": lambda: _scan(sql),
            "fold": lambda: read_now(sql, follower.folded, _forget),
            "projections verify": lambda: _verify(sql),
            "projections rebuild": lambda: _rebuild(sql),
            "log verify": lambda: read_now(sql, log.verify),
        }
        _rebuild(sql)  # projections of this release, as `ordain serve` has them
        for _ in range(rounds):
            for name, work in works.items():
                since = time.perf_counter()
                work()
                rate = count / (time.perf_counter() - since)
                figures.setdefault(f"events/s, {name}", []).append(rate)
    pairs = zip(figures["events/s, fold"], figures["events/s, bare scan and decode"], strict=True)
    figures["fold / bare"] = [ours / bare for ours, bare in pairs]
    return figures


async def _forget(fold: follower.Fold) -> None:
    return


def _scan(sql: sqlite3.Connection) -> None:
    for kind, data in sql.execute("SELECT type, data FROM events ORDER BY position"):
        decode(kind, data)


def _verify(sql: sqlite3.Connection) -> None:
    fault = read_now(sql, follower.fault, lambda _: None)
    assert fault is None, fault


def _rebuild(sql: sqlite3.Connection) -> None:
    sql.execute("BEGIN IMMEDIATE")
    follower.renew(sql)
    sql.execute("COMMIT")
