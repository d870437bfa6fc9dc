"""Carries out a batch in one transaction of SQLite: events, then states, then the rows beside the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, assert_never

from broker.domain.fleet import DeviceState
from broker.log import erasing, rows
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.log.many import many
from broker.seams import (
    Batch,
    Change,
    Conflict,
    Drop,
    Erase,
    EraseEvents,
    Fenced,
    New,
    Newest,
    Placed,
    Purge,
    Put,
    SideRow,
    Sqlite,
    Unmatched,
)
from projections import commands, devices

TERM = 1  # with SQLite one node owns everything


class Latest:
    """The last batch of a process and what the log gave it: the same batch is never carried out twice.

    With SQLite this need not be kept in the file, because no batch outlives its process.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._placed = Placed(1, ())
        self._number = 0

    def number(self) -> int:
        """The number for the next batch."""
        self._number += 1
        return self._number

    def find(self, batch: Batch) -> Placed | None:
        """What the log gave this batch; None if it is a new one.

        Raises:
            Conflict: its number was used for another batch.
        """
        if self._batch is None or batch.number > self._batch.number:
            return None
        if batch != self._batch:
            raise Conflict(f"batch {batch.number} was carried out before, with other content")
        return self._placed

    def keep(self, batch: Batch, placed: Placed) -> None:
        self._batch, self._placed = batch, placed

    def landed(self, number: int) -> Placed | None:
        """What the log gave the batch with this number; None if it is not the last one."""
        return self._placed if self._batch is not None and self._batch.number == number else None


def carry_out(sql: Sqlite, batch: Batch) -> Placed:
    """Carries out a batch in the caller's transaction.

    Raises:
        Fenced: the batch is of another term.
        Conflict: a state is not at the version that the batch expects, or an event is older than the last
            one. A unique index refuses what else is in the way, as an error of the driver.
    """
    if batch.term != TERM:
        raise Fenced(TERM)
    head = read_now(sql, log.head)
    first = head.position + 1
    if batch.events:
        log.append(sql, head, batch.events, batch.salts)
        put_states(sql, batch.states, first)
    for row in batch.rows:
        put(sql, row, first)
    return Placed(first, [event.decided_at for event in batch.events])


def put_states(sql: Sqlite, states: Iterable[Newest], first: int) -> None:
    """Writes states to the projections. `first`: the position of the event with the index 0."""
    new: list[tuple[Any, ...]] = []
    known: list[tuple[Any, ...]] = []
    new_devices: list[tuple[Any, ...]] = []
    known_devices: list[tuple[Any, ...]] = []
    for newest in states:
        state, last = newest.state, first + newest.last
        if isinstance(state, DeviceState):
            if newest.over == 0:
                new_devices.append(devices.added(state, first + newest.first, last))
            else:
                known_devices.append(devices.changed(state, last, newest.over))
        elif newest.over == 0:
            new.append(commands.added(state, first + newest.first, last))
        else:
            known.append(commands.changed(state, last, newest.over))
    many(sql, commands.INSERT, new)
    if new_devices:
        sql.executemany(devices.INSERT, new_devices)
    for text, values in ((commands.UPDATE, known), (devices.UPDATE, known_devices)):
        if values:
            _change(sql, text, values)


def _change(sql: Sqlite, text: str, values: list[tuple[Any, ...]]) -> None:
    before = sql.execute("SELECT total_changes()").fetchone()[0]
    sql.executemany(text, values)
    changed = sql.execute("SELECT total_changes()").fetchone()[0] - before
    if changed != len(values):
        raise Conflict(f"{len(values) - changed} states are not at the version that the batch follows")


def put(sql: Sqlite, row: SideRow, first: int) -> None:
    """Carries out one row. `first`: the position of the event with the index 0."""
    match row:
        case New() | Put() | Change() | Drop():
            sql.execute(*rows.statement(row, first))
        case Unmatched():
            log.add_unmatched(sql, row)
        case Erase():
            erasing.erase(sql, row.stream)
            erasing.forget_answers(sql, "command_id = ?", row.stream)
            commands.remove(sql, row.stream)
        case EraseEvents():
            erasing.erase_positions(sql, row.positions)
        case Purge():
            erasing.begin_purge(sql, first + row.position.index, row.cutoff, row.at)
            of_answer = commands.CREATED.format("command_id")
            hidden = f"EXISTS (SELECT 1 FROM commands c WHERE c.position = {of_answer} AND {commands.HIDDEN})"
            erasing.forget_answers(sql, f"at < ? OR {hidden}", row.cutoff)
        case _:
            assert_never(row)
