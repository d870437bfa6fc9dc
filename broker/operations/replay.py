"""Replay: sends recorded events again to another place, at their original pace, scaled, or without pauses.

A replay changes nothing and sends no command to a device. It sends only the events, with their original ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

from broker.domain.cloudevents import Entry, Wanted
from broker.log import erasing
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.seams import Readable, Sqlite
from projections import follower, outgoing
from projections.commands import veiled

PAGE = 500

Send = Callable[[Entry], Awaitable[None]]


class Played(NamedTuple):
    """How many events of how many devices were sent. Times in ms; 0 if there were no events."""

    events: int
    devices: int
    first_at: int
    last_at: int


def entries(sql: Readable, wanted: Wanted, after: int, until: int) -> Iterator[Entry]:
    """The wanted events after one position and up to another, ascending, read page by page."""
    while after < until:
        page, after = read_now(sql, outgoing.page, wanted, after, until, PAGE)
        yield from page


def copy_log(source: Readable, target: Sqlite, until: int) -> None:
    """Copies a log up to a position, row by row, into a new file, and computes its projections.

    Call it inside one read transaction. Data that a purge has marked for erasure is not copied. The copy is
    marked as a replay, and no broker serves it, because its open commands belong to the original log. It also
    keeps the erasures after its end: rows that they made empty are empty in the copy.
    """
    log.create(target, read_now(source, log.meta, "log_id"), read_now(source, log.meta, "cursor_key"))
    target.execute("INSERT INTO meta VALUES ('replayed', ?)", (str(until),))
    erasing.keep_erasures(target, read_now(source, erasing.erased_later, until))
    after = 0
    while page := [row for row in read_now(source, log.rows, after, PAGE) if row.position <= until]:
        after = page[-1].position
        target.executemany(log.INSERT, read_now(source, veiled, page))
    follower.renew(target)


async def play(found: Iterator[Entry], send: Send, speed: float | None) -> Played:
    """Sends events one after the other; each `send` must finish before the next begins.

    `speed`: 1 keeps the recorded pauses, 10 divides them by ten, None removes them.
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
