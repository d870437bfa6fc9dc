"""Commands, lanes and devices as they were at an earlier position of the log, and the changes since then.

A state that has not changed since is read from the projections. The others are folded from their own
events, which are few, so that no snapshots are needed. Erased commands are not shown at any position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from broker.domain.events import SYSTEM, device_stream, subject_kind
from broker.domain.fleet import DeviceSet, DeviceState, evolve_device
from broker.domain.lifecycle import CommandState, State, evolve
from broker.log import sqlite as log
from broker.log.erasing import DECIDED
from broker.seams import Sql
from projections.commands import CREATED, HIDDEN, Filter, get
from projections.devices import in_set

# Limits of one read: rows that are scanned, and commands that are folded. A search for a rare state in a
# long history takes several pages.
SCANNED = 5_000
FOLDED = 500
ROW = "last_position, body"  # of a device

_device = msgspec.json.Decoder(DeviceState).decode


class Then(NamedTuple):
    """A device as it was. `void`: its `online` is not valid, because a broker started after it."""

    state: DeviceState
    void: bool


class CommandChange(NamedTuple):
    """A command at two positions; `before` None: it was not created yet."""

    before: CommandState | None
    after: CommandState


class DeviceChange(NamedTuple):
    before: Then | None
    after: Then


Change = CommandChange | DeviceChange


async def command(sql: Sql, command_id: str, position: int) -> CommandState | None:
    row = await sql.one(
        f"SELECT closed_position FROM commands c WHERE position = {CREATED.format('?')} AND NOT {HIDDEN}",
        (command_id,),
    )
    return None if row is None else (await _command_at(sql, command_id, row[0], position))


async def _command_at(sql: Sql, command_id: str, closed: int | None, position: int) -> CommandState | None:
    """`closed`: the position at which the command was closed, if it is closed now."""
    if closed is not None and closed <= position:
        return await get(sql, command_id)
    state = None
    for row in await log.stream(sql, command_id, position):
        if row.data is None:
            return None
        state = evolve(state, log.recorded(row))
    return state


async def commands(
    sql: Sql, wanted: Filter, position: int, limit: int
) -> tuple[list[CommandState], int | None]:
    """The commands as they were, newest first, and the position before which the next page starts.

    That position is None at the end. A page may have fewer than `limit` commands and not be the last.
    """
    where, values = _where(wanted.project, position, wanted.before)
    condition, more = in_set(wanted.within, "device_id")
    where, values = f"{where} AND {condition}", [*values, *more]
    if wanted.device_id is not None:
        where, values = (
            where.replace("project", "project || ''") + " AND device_id = ?",  # by the index of the device
            [*values, wanted.device_id],
        )
    states = tuple(State) if wanted.states is None else wanted.states
    most = limit + 1 if wanted.states is None and wanted.type is None else SCANNED
    rows = await sql.all(
        f"SELECT position, type, state, closed_position, {HIDDEN} FROM commands c "
        f"WHERE {where} ORDER BY position DESC LIMIT ?",
        (*values, most),
    )
    found: list[CommandState] = []
    folded, reached = 0, None
    for created, type_name, state, closed, hidden in rows:
        if len(found) == limit or folded == FOLDED:
            return found, reached
        reached = created
        ended = closed is not None and closed <= position
        if hidden or wanted.type not in (None, type_name) or (ended and state not in states):
            continue
        folded += not ended
        (command_id,) = await sql.one("SELECT stream FROM events WHERE position = ?", (created,))
        then = await _command_at(sql, command_id, closed, position)
        if then is not None and then.state in states:
            found.append(then)
    return found, reached if len(rows) == most else None


async def lane(sql: Sql, device_id: str, position: int) -> list[CommandState]:
    """The commands of a device that were open, in order of creation."""
    # The rows include commands that had timed out by then and were answered later: the fold filters them.
    rows = await sql.all(
        "SELECT f.stream, c.closed_position FROM commands c CROSS JOIN events f ON f.position = c.position "
        "WHERE c.position IN (SELECT position FROM commands WHERE device_id = ? AND position <= ? "
        f"AND (closed_position IS NULL OR closed_position > ?)) AND NOT {HIDDEN} ORDER BY c.position",
        (device_id, position, position),
    )
    states = [(await _command_at(sql, command_id, closed, position)) for command_id, closed in rows]
    return [state for state in states if state is not None and not state.closed]


async def device(sql: Sql, device_id: str, position: int) -> Then | None:
    """A device as it was, also one that was already deleted; None: it was not registered yet."""
    row = await sql.one(f"SELECT {ROW} FROM devices WHERE id = ?", (device_id,))
    if row is None:
        return None
    state = await _device_at(sql, row, position)
    return None if state is None else _then(state, (await _started(sql, position)))


async def devices(
    sql: Sql,
    project: str | None,
    position: int,
    before: int | None,
    limit: int,
    within: DeviceSet | None = None,
) -> list[Then]:
    """The devices that were registered and not deleted at that position, newest first."""
    where, values = _where(project, position, before)
    condition, more = in_set(within, "id")
    where, values = f"{where} AND {condition}", [*values, *more]
    rows = await sql.all(
        f"SELECT {ROW} FROM devices WHERE {where} AND (deleted = 0 OR deleted > ?) "
        "ORDER BY position DESC LIMIT ?",
        (*values, position, limit),
    )
    started = await _started(sql, position)
    states = [(await _device_at(sql, row, position)) for row in rows]
    return [_then(state, started) for state in states if state is not None]


def _where(project: str | None, position: int, before: int | None) -> tuple[str, list[Any]]:
    where, values = "position <= ?", [position if before is None else min(position, before - 1)]
    return (where, values) if project is None else (where + " AND project = ?", [*values, project])


async def _device_at(sql: Sql, row: Any, position: int) -> DeviceState | None:
    now = _device(row[1])
    if row[0] <= position:
        return now
    state = None
    for row in await log.device_stream(sql, device_stream(now.id), position):
        state = evolve_device(state, log.recorded(row))
    return state


async def _started(sql: Sql, position: int) -> int:
    """The time of the broker's last start before a position, ms; 0: it had not started."""
    row = await sql.one(
        f"SELECT {DECIDED} FROM events WHERE stream = ? AND type = 'started' AND position <= ? "
        "ORDER BY version DESC LIMIT 1",
        (SYSTEM, position),
    )
    return 0 if row is None else row[0]


def _then(state: DeviceState, started: int) -> Then:
    return Then(state, state.online and state.seen_at is not None and state.seen_at < started)


async def changes(
    sql: Sql,
    project: str | None,
    start: int,
    end: int,
    after: int,
    limit: int,
    within: DeviceSet | None = None,
) -> tuple[list[Change], int | None]:
    """The commands and devices that have events after `start` up to `end`, in order of their first one.

    Also returns the position after which the next page starts; None at the end. `after`: that position
    of the page before, or `start` for the first page.
    """
    reached = min(end, after + SCANNED)
    condition, values = in_set(within, "device_id")
    rows = await sql.all(
        "SELECT position, stream, version, project FROM events WHERE position > ? AND position <= ? "
        f"AND {condition} ORDER BY position",
        (after, reached, *values),
    )
    found: list[Change] = []
    for position, stream, version, of in rows:
        if project not in (None, of) or subject_kind(stream) == "broker":
            continue
        if version > 1 and (await _position(sql, stream, version - 1)) > start:
            continue  # not its first event in this range
        if (change := (await _change(sql, stream, start, end))) is not None:
            found.append(change)
        if len(found) == limit:
            return found, position if position < end else None
    return found, reached if reached < end else None


async def _position(sql: Sql, stream: str, version: int) -> int:
    found = await sql.all("SELECT position FROM events WHERE stream = ? AND version = ?", (stream, version))
    return int(found[0][0])


async def _change(sql: Sql, stream: str, start: int, end: int) -> Change | None:
    if subject_kind(stream) == "command":
        after = await command(sql, stream, end)
        return None if after is None else CommandChange((await command(sql, stream, start)), after)
    device_id = stream.removeprefix("device/")
    then = await device(sql, device_id, end)
    return None if then is None else DeviceChange((await device(sql, device_id, start)), then)
