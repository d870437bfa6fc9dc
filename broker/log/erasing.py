"""Erasing on SQLite: removes data and salt from rows of the log. The digests keep the chain valid.

Runs inside the caller's transaction. A row of a command may be erased only if an `erased` event names or
covers its command, and the command was closed when that event was recorded. A row of a device may be erased
only if an `erased` event names its position, and a newer event of its stream replaced it. `verify` checks
these rules with `Excused`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from broker.domain.events import ERASURES, Erased, decode, subject_kind
from broker.domain.lifecycle import CLOSED
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.seams import Sql, Sqlite

CLOSING = frozenset(state.value for state in CLOSED)
# The events of a device that newer ones can replace. The others are never erased.
PRESENCE = ("online", "offline")
ATTRIBUTES = "changed"
REPORTED = "reported"
REPLACEABLE = (*PRESENCE, ATTRIBUTES, REPORTED)
DECIDED = "coalesce(decided_at, recorded_at)"  # rows of format 1 have only recorded_at


class Purge(NamedTuple):
    """A purge whose erasing is not finished.

    It covers commands that were created before `cutoff` (Unix time in ms), which means before position
    `bound`, and closed before `at` (ms). `position`: its `erased` event; all earlier events are older
    than `at`.
    """

    position: int
    cutoff: int
    bound: int
    at: int


async def purges(sql: Sql) -> list[Purge]:
    """The unfinished purges, oldest first."""
    found = await sql.all("SELECT position, cutoff, bound, at FROM purges ORDER BY position")
    return [Purge(*row) for row in found]


async def bound(sql: Sql, cutoff: int) -> int:
    """The first position decided at or after a time (ms); all earlier positions are older."""
    return await first_at(sql, cutoff, DECIDED)


async def first_at(sql: Sql, cutoff: int, time: str) -> int:
    """The first position whose `time`, an SQL expression, is at or after `cutoff` (ms). Times never go back
    along the log. A binary search, because they have no index."""
    low, high = 1, 1 + (await sql.one("SELECT coalesce(max(position), 0) FROM events"))[0]
    while low < high:
        middle = (low + high) // 2
        at = (await sql.one(f"SELECT {time} FROM events WHERE position = ?", (middle,)))[0]
        low, high = (middle + 1, high) if at < cutoff else (low, middle)
    return low


def begin_purge(sql: Sqlite, position: int, cutoff: int, at: int) -> None:
    """Records a purge. From this transaction until `finish_purge`, reads hide the commands it covers."""
    sql.execute("INSERT INTO purges VALUES (?,?,?,?)", (position, cutoff, read_now(sql, bound, cutoff), at))


def finish_purge(sql: Sqlite, position: int) -> None:
    sql.execute("DELETE FROM purges WHERE position = ?", (position,))


def erase(sql: Sqlite, command_id: str) -> None:
    """Removes data and salt from every row of a command."""
    sql.execute("UPDATE events SET data = NULL, salt = NULL WHERE stream = ?", (command_id,))


def erase_positions(sql: Sqlite, positions: Sequence[int]) -> None:
    """Removes data and salt from these rows. An `erased` event of the same transaction must name them."""
    for position in positions:
        sql.execute("UPDATE events SET data = NULL, salt = NULL WHERE position = ?", (position,))


def forget_answers(sql: Sqlite, which: str, value: object) -> None:
    """Erases the unmatched answers for which `which`, an SQL expression with one parameter, is true."""
    if sql.execute(f"SELECT 1 FROM unmatched WHERE {which} LIMIT 1", (value,)).fetchone() is None:
        return
    # The whole table is rewritten: when SQLite deletes single rows it moves others, and can leave parts of
    # erased rows in the file.
    kept = sql.execute(
        f"SELECT * FROM unmatched WHERE ({which}) IS NOT TRUE ORDER BY id", (value,)
    ).fetchall()
    sql.execute("DELETE FROM unmatched")
    sql.executemany("INSERT INTO unmatched VALUES (?,?,?,?,?,?,?,?)", kept)


async def erased_later(sql: Sql, after: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """The erasures that a copy keeps because they come after its end: position and event. With `after`: also
    those of the log itself after that position, which a copy up to there must keep."""
    kept = await sql.one("SELECT value FROM meta WHERE key = 'erased_later'")
    found: list[tuple[int, dict[str, Any]]] = [] if kept is None else msgspec.json.decode(kept[0])
    if after is not None:
        rows = await sql.all(
            "SELECT position, data FROM events WHERE stream = ? AND position > ? ORDER BY position",
            (ERASURES, after),
        )
        found += [(position, msgspec.json.decode(data)) for position, data in rows]
    return found


def keep_erasures(sql: Sqlite, later: list[tuple[int, dict[str, Any]]]) -> None:
    """Puts erasures into a copy, for `Excused`."""
    if later:
        text = msgspec.json.encode(later).decode()
        sql.execute("INSERT INTO meta VALUES ('erased_later', ?)", (text,))


class Excused:
    """Tells which rows may have no data.

    A command's rows may have none if an `erased` event names the command, or the command was created before
    the event's cutoff; and the command was closed before that event. A presence, attribute or state event of
    a device may have none if an `erased` event names its position, and its stream has a newer one of the
    kind.
    """

    def __init__(self) -> None:
        self._named: dict[str, int] = {}  # command: position of the event
        self._cutoffs: list[tuple[int, int]] = []  # cutoff, position of the event
        self._positions: array[int] = array("q")  # of rows of devices, ascending
        self._known: dict[str, tuple[bool, int]] = {}
        self._read = 0  # version of the last `erased` event that was read
        self._later: list[Erased] | None = None
        self.later = 0  # rows that only a later erasure excuses

    async def read(self, sql: Sql) -> None:
        """Takes in the `erased` events that were recorded since the last call. Later calls use `sql`."""
        self._sql = sql
        if self._later is None:
            self._later = [msgspec.convert(each, Erased) for _, each in (await erased_later(sql))]
        found = await sql.all(
            "SELECT position, version, type, data, schema FROM events WHERE stream = ? AND version > ? "
            "ORDER BY version",
            (ERASURES, self._read),
        )
        for position, version, name, data, schema in found:
            self._read = version
            try:
                event = decode(name, data or b"{}", schema)
            except (ValueError, TypeError):
                continue  # someone changed this row; the check of the chain reports it
            if isinstance(event, Erased):
                self._named |= dict.fromkeys(event.ids, position)
                self._positions.extend(each for each in event.positions if 0 < each < position)
                if event.cutoff is not None:
                    self._cutoffs.append((event.cutoff, position))
        if found:
            self._positions = array("q", sorted(self._positions))
            self._known.clear()

    async def __call__(self, row: Row) -> bool:
        of_device = subject_kind(row.stream) == "device"
        excused = await (self._is_replaced(row) if of_device else self._is_of_erased(row))
        if not excused and await self._excused_later(row):
            excused, self.later = True, self.later + 1
        return excused

    async def _is_of_erased(self, row: Row) -> bool:
        if row.stream not in self._known:
            self._known[row.stream] = await self._judge(row.stream)
        excused, last = self._known[row.stream]
        if row.version >= last:
            del self._known[row.stream]  # after its last row a command is dropped, to keep memory small
        return excused

    async def _is_replaced(self, row: Row) -> bool:
        place = bisect_left(self._positions, row.position)
        if place == len(self._positions) or self._positions[place] != row.position:
            return False
        return await replaced(self._sql, row)

    async def _excused_later(self, row: Row) -> bool:
        """Whether an erasure after the end of a copy names or covers the row. Whether its command was closed
        by then, or a newer event had replaced it, is not in the copy."""
        if not self._later:
            return False
        if subject_kind(row.stream) == "device":
            return row.type in REPLACEABLE and any(row.position in each.positions for each in self._later)
        if subject_kind(row.stream) != "command":
            return False
        first = f"SELECT {DECIDED} FROM events WHERE stream = ? ORDER BY version LIMIT 1"
        created = (await self._sql.one(first, (row.stream,)))[0]
        return any(
            row.stream in each.ids or (each.cutoff is not None and created < each.cutoff)
            for each in self._later
        )

    async def _judge(self, stream: str) -> tuple[bool, int]:
        """Whether the rows of a stream may have no data, and the version of its last row."""
        versions = f"SELECT position, version, type, {DECIDED} FROM events WHERE stream = ? ORDER BY version"
        first = await self._sql.one(f"{versions} LIMIT 1", (stream,))
        last = await self._sql.one(f"{versions} DESC LIMIT 1", (stream,))
        if subject_kind(stream) != "command" or last[2] not in CLOSING:
            return False, last[1]
        erased_at = [position for cutoff, position in self._cutoffs if first[3] < cutoff]
        erased_at.append(self._named.get(stream, 0))
        return last[0] < max(erased_at), last[1]


async def replaced(sql: Sql, row: Row) -> bool:
    """Whether the row is a presence, attribute or state event of a device, and a newer one of its kind
    follows."""
    if row.type in PRESENCE:
        newer = "type IN ('online', 'offline')"
    elif row.type == ATTRIBUTES:
        newer = "type = 'changed' AND instr(data, '\"attributes\"')"
    elif row.type == REPORTED:
        newer = "type = 'reported'"
    else:
        return False
    query = f"SELECT 1 FROM events WHERE stream = ? AND version > ? AND {newer} LIMIT 1"
    return (await sql.one(query, (row.stream, row.version))) is not None
