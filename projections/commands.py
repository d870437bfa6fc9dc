"""The table `commands`: the current state of every command, one row each, and the queries on it.

A row is written from the folded state, in the transaction of the events that changed it. Folding the
log again gives the same rows. Parameters, results and errors are read from their events, not copied
here: SQLite moves a row that grows to another page and may leave parts of it in the old one, where
erased data could be found. Commands that a running purge will erase are hidden from all queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from broker.domain.events import Executed, Failed, decode, subject_kind
from broker.domain.fleet import DeviceSet
from broker.domain.lifecycle import NO_RESULT, CommandState, State
from broker.log.chain import Row
from broker.log.erasing import Purge, bound, purges
from broker.seams import Sql, Sqlite
from projections.devices import in_set

TABLES = (
    """CREATE TABLE IF NOT EXISTS commands (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, project TEXT NOT NULL, device_id TEXT NOT NULL,
        type TEXT NOT NULL, state TEXT NOT NULL, version INTEGER NOT NULL,
        closed_at INTEGER, closed_position INTEGER, summary BLOB NOT NULL)""",
    # With `type` in the index, a history skips other types without reading their rows. With
    # `closed_position`, `past.lane` finds a lane without reading every row of the device.
    "CREATE INDEX IF NOT EXISTS commands_device ON commands (device_id, position, type, closed_position)",
    "CREATE INDEX IF NOT EXISTS commands_project ON commands (project, position)",
    "CREATE INDEX IF NOT EXISTS commands_closed ON commands (closed_at) WHERE closed_at IS NOT NULL",
)
KEYS = {"commands": "position"}
INSERT = """INSERT INTO commands
    (position, id, project, device_id, type, state, version, closed_at, closed_position, summary)
    VALUES (?,?,?,?,?,?,?,?,?,?)"""
UPDATE = """UPDATE commands SET state = ?, version = ?, closed_at = ?, closed_position = ?, summary = ?
    WHERE id = ? AND version = ?"""

# Condition on a row `c`: a running purge will erase this command (older than its cutoff, closed before it).
HIDDEN = "EXISTS (SELECT 1 FROM purges p WHERE c.position < p.bound AND c.closed_at < p.at)"
# The columns that `folded` reads. CROSS JOIN fixes the join order, because the filters are on `commands`.
COLUMNS = """c.summary, f.data, c.state, CASE WHEN c.state IN ('executed', 'failed')
    THEN (SELECT l.data FROM events l WHERE l.stream = c.id ORDER BY l.version DESC LIMIT 1) END"""
FOUND = f"SELECT {COLUMNS} FROM commands c CROSS JOIN events f ON f.position = c.position"

LAST = 2**63 - 1
NO_PARAMS = msgspec.Raw(b"{}")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(CommandState).decode


class _Created(msgspec.Struct):
    """The part of a `created` event that is not in the row of its command."""

    params: msgspec.Raw


_created = msgspec.json.Decoder(_Created).decode


def summary(state: CommandState) -> bytes:
    """The state as its row stores it: without parameters, result and error."""
    return _encode(msgspec.structs.replace(state, params=NO_PARAMS, result=NO_RESULT, error=None))


def folded(row: Any) -> CommandState:
    """The full state from a row of `COLUMNS`; equal to the fold of the command's events."""
    known, first, name, last = row
    state = opened(known, first)
    if last is not None:
        match decode(name, last):
            case Executed(result=result):
                return msgspec.structs.replace(state, result=result)
            case Failed(error=error):
                return msgspec.structs.replace(state, error=error)
    return state


def opened(known: bytes, first: bytes) -> CommandState:
    """The full state of a command without result and error. `known`: its summary; `first`: the data of its
    `created`."""
    state = _decode(known)
    msgspec.structs.force_setattr(state, "params", _created(first).params.copy())  # nobody else has it yet
    return state


def added(s: CommandState, position: int, last: int) -> tuple[Any, ...]:
    """The values of `INSERT` for a new command. `position`: of its first event; `last`: of its last one."""
    return (position, s.id, s.project, s.device_id, s.type, *_latest(s, last))


def changed(s: CommandState, last: int, over: int) -> tuple[Any, ...]:
    """The values of `UPDATE` for a command whose row has the version `over`."""
    return (*_latest(s, last), s.id, over)


def _latest(s: CommandState, last: int) -> tuple[Any, ...]:
    return s.state.value, s.version, s.closed_at, last if s.closed else None, summary(s)


async def get(sql: Sql, command_id: str) -> CommandState | None:
    row = await sql.one(f"{FOUND} WHERE c.id = ? AND NOT {HIDDEN}", (command_id,))
    return folded(row) if row else None


async def position(sql: Sql, command_id: str) -> int:
    """The position of the first event of a command; 0 if it was erased meanwhile."""
    row = await sql.one("SELECT position FROM commands WHERE id = ?", (command_id,))
    return 0 if row is None else int(row[0])


async def get_many(sql: Sql, command_ids: Iterable[str]) -> dict[str, CommandState]:
    """The commands that exist and are not hidden, by id."""
    found = {}
    for command_id in command_ids:
        if (state := (await get(sql, command_id))) is not None:
            found[command_id] = state
    return found


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a list; None means any. `before`: only commands created before this position (cursor).
    `within`: only commands of these devices."""

    project: str | None = None
    within: DeviceSet | None = None
    device_id: str | None = None
    type: str | None = None
    states: tuple[State, ...] | None = None
    before: int | None = None


async def newest(sql: Sql, wanted: Filter, limit: int, offset: int = 0) -> list[CommandState]:
    """Commands by position of creation, newest first. New commands do not change the following pages."""
    condition, of_set = in_set(wanted.within, "c.device_id")
    where, values = [condition], list[Any](of_set)
    for column, value in (
        ("project", wanted.project),
        ("device_id", wanted.device_id),
        ("type", wanted.type),
    ):
        if value is not None:
            where.append(f"c.{column} = ?")
            values.append(value)
    if wanted.states is not None:
        where.append(f"c.state IN ({','.join('?' * len(wanted.states))})")
        values += [state.value for state in wanted.states]
    if wanted.before is not None:
        where.append("c.position < ?")
        values.append(wanted.before)
    query = f"""SELECT c.position, {COLUMNS} FROM commands c
        CROSS JOIN events f ON f.position = c.position WHERE {" AND ".join(where)}"""
    newest, oldest = await sql.one("SELECT max(bound), min(at) FROM purges")
    if newest is not None:
        # A purge is running. Below its bound there may be a million hidden rows, which a scan would read.
        # So rows below the bound are found through the open commands and the commands closed since.
        query = f"""{query} AND c.position >= ? UNION ALL {query} AND NOT {HIDDEN} AND c.position IN (
            SELECT position FROM lanes WHERE position < ? UNION
            SELECT position FROM commands WHERE closed_at >= ? AND position < ?)"""
        values = [*values, newest, *values, newest, oldest, newest]
    found = await sql.all(f"{query} ORDER BY 1 DESC LIMIT ? OFFSET ?", (*values, limit, offset))
    return [folded(row[1:]) for row in found]


class Sent(NamedTuple):
    """The part of a command that a history shows. `created_at` in ms."""

    id: str
    state: State
    created_at: int
    params: msgspec.Raw


async def sent(sql: Sql, device_id: str, type: str, first: int, before: int | None, limit: int) -> list[Sent]:
    """Commands of one name to one device, in order of creation.

    `first`: the first position. `before`: the position to stop before; None: the end of the log.
    """
    found = await sql.all(
        "SELECT c.id, c.state, coalesce(f.decided_at, f.recorded_at), f.data "
        "FROM commands c CROSS JOIN events f ON f.position = c.position "
        "WHERE c.device_id = ? AND c.type = ? AND c.position >= ? "
        f"AND c.position < ? AND NOT {HIDDEN} ORDER BY c.position LIMIT ?",
        (device_id, type, first, LAST if before is None else before, limit),
    )
    return [Sent(row[0], State(row[1]), row[2], _created(row[3]).params) for row in found]


async def timed_out_since(sql: Sql, at: int) -> list[CommandState]:
    """Commands that timed out at or after `at` (ms), oldest first. They may still get a late answer."""
    found = await sql.all(
        f"{FOUND} WHERE c.state = 'timed_out' AND c.closed_at >= ? AND NOT {HIDDEN} ORDER BY c.closed_at",
        (at,),
    )
    return [folded(row) for row in found]


async def answered_since(sql: Sql, at: int) -> list[CommandState]:
    """Commands executed or failed at or after `at` (ms), without parameters, results and errors.

    Includes commands that a running purge will erase.
    """
    found = await sql.all(
        "SELECT summary FROM commands WHERE closed_at >= ? AND state IN ('executed', 'failed')", (at,)
    )
    return [_decode(row[0]) for row in found]


async def forgotten_since(sql: Sql, at: int) -> list[tuple[str, int]]:
    """Device id and time (ms) of each command that timed out at or after `at` (ms) and was then erased."""
    found = await sql.all(
        "SELECT e.device_id, coalesce(e.decided_at, e.recorded_at) FROM events e WHERE e.position >= ? "
        "AND e.type = 'timed_out' "
        f"AND NOT EXISTS (SELECT 1 FROM commands c WHERE c.id = e.stream AND NOT {HIDDEN})",
        ((await bound(sql, at)),),
    )
    return [(row[0], row[1]) for row in found]


# --- erasing -------------------------------------------------------------------------------------


async def veiled(sql: Sql, rows: list[Row]) -> list[Row]:
    """Removes the data of commands that a running purge will erase from rows of the log.

    Code that shows or folds events for a reader calls this in the transaction that read them. Rows that
    are already erased have no data. Without a running purge the cost is one query on an empty table.
    """
    if not (pending := (await purges(sql))):
        return rows
    last = max(purge.position for purge in pending)
    streams = {row.stream for row in rows if row.position < last and subject_kind(row.stream) == "command"}
    hidden = {
        stream
        for stream in streams
        if (await sql.one(f"SELECT 1 FROM commands c WHERE c.id = ? AND {HIDDEN}", (stream,)))
    }
    return [row._replace(data=None, salt=None) if row.stream in hidden else row for row in rows]


async def closed_before(sql: Sql, cutoff: int) -> int:
    """How many closed commands were created before `cutoff` (ms) and are not in a running purge."""
    found = await sql.all(
        # The bound of `closed_at` makes SQLite read only the index of the closed commands.
        f"SELECT count(*) FROM commands c WHERE c.closed_at >= 0 AND c.position < ? AND NOT {HIDDEN}",
        ((await bound(sql, cutoff)),),
    )
    return int(found[0][0])


class Purgeable(NamedTuple):
    """A command that a purge erases. `version`: the number of its events."""

    position: int
    id: str
    version: int


async def purgeable(sql: Sql, purge: Purge, after: int, limit: int) -> list[Purgeable]:
    """The next commands that a purge erases, ascending, from position `after` + 1."""
    found = await sql.all(
        "SELECT position, id, version FROM commands WHERE position > ? AND position < ? AND closed_at < ? "
        "ORDER BY position LIMIT ?",
        (after, purge.bound, purge.at, limit),
    )
    return [Purgeable(*row) for row in found]


def remove(sql: Sqlite, command_id: str) -> None:
    sql.execute("DELETE FROM commands WHERE id = ?", (command_id,))


async def dump(sql: Sql) -> list[tuple[Any, ...]]:
    """Every row; used to compare a rebuilt projection with the maintained one."""
    found = await sql.all("SELECT * FROM commands ORDER BY position")
    return [tuple(row) for row in found]
