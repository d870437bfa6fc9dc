"""Replays: recorded events once more, to somewhere else, as fast as they happened or as fast as it goes.

A replay changes nothing and commands no device: what is sent are the events, under the ids they have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

from broker.domain.cloudevents import Entry, Wanted
from broker.log import sqlite as log
from broker.seams import Sql
from projections import follower, outgoing
from projections.commands import veiled

PAGE = 500

Send = Callable[[Entry], Awaitable[None]]


class Played(NamedTuple):
    """How many events of how many devices; times in ms, 0 where there is none."""

    events: int
    devices: int
    first_at: int
    last_at: int


def entries(sql: Sql, wanted: Wanted, after: int, until: int) -> Iterator[Entry]:
    """What is wanted after one position and up to another, ascending, page by page."""
    while after < until:
        page, after = outgoing.page(sql, wanted, after, until, PAGE)
        yield from page


def copy_log(source: Sql, target: Sql, until: int) -> None:
    """Makes a log of its own up to a position, row by row as it is, and its projections, in a new file;
    inside one read transaction. What a purge has promised to erase is not in it.

    It is marked, and no broker serves it: its open commands belong to the log it was taken from.
    """
    log.create(target, log.meta(source, "log_id"), log.meta(source, "cursor_key"))
    target.execute("INSERT INTO meta VALUES ('replayed', ?)", (str(until),))
    after = 0
    while page := [row for row in log.rows(source, after, PAGE) if row.position <= until]:
        after = page[-1].position
        target.executemany(log.INSERT, veiled(source, page))
    follower.renew(target)


async def play(found: Iterator[Entry], send: Send, speed: float | None) -> Played:
    """Sends events one after the other, each after what follows from it was said.

    `speed`: 1 keeps the pauses between them as they were, 10 makes them a tenth, None leaves them out.
    """
    loop = asyncio.get_running_loop()
    events, devices, first_at, last_at, started = 0, set[str](), 0, 0, loop.time()
    for entry in found:
        first_at = first_at or entry.recorded_at
        if speed is not None:
            due = started + (entry.recorded_at - first_at) / 1_000 / speed
            await asyncio.sleep(max(0.0, due - loop.time()))
        await send(entry)
        events, last_at = events + 1, entry.recorded_at
        devices.add(entry.device_id)
    return Played(events, len(devices), first_at, last_at)
