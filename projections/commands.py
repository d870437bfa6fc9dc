"""The table `commands`: the current state of every command, one row each, and the queries on it.

A row is written from the folded state, in the transaction of the events that changed it. Folding the
log again gives the same rows. What the `created` event says, and result and error, are read from the events
and not copied here. That keeps the rows small. And SQLite moves a row that grows to another page and may
leave parts of it in the old one, where erased data could be found. Commands that a running purge will erase
are hidden from all queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from broker.domain.events import Executed, Failed, Pending, Transport, decode, subject_kind
from broker.domain.fleet import DeviceSet
from broker.domain.lifecycle import CommandState, State, evolve
from broker.log.chain import Row
from broker.log.erasing import Purge, bound, purges
from broker.seams import Sql, Sqlite
from projections.devices import in_set

# `position`: of the `created` event. The log finds it by the command's id: see `CREATED`.
TABLES = (
    """CREATE TABLE IF NOT EXISTS commands (
        position INTEGER PRIMARY KEY, project TEXT NOT NULL, device_id TEXT NOT NULL, type TEXT NOT NULL,
        state TEXT NOT NULL, version INTEGER NOT NULL, closed_at INTEGER, closed_position INTEGER,
        later BLOB NOT NULL)""",
    # With `type` in the index, a history skips other types without reading their rows. With
    # `closed_position`, `past.lane` finds a lane without reading every row of the device.
    "CREATE INDEX IF NOT EXISTS commands_device ON commands (device_id, position, type, closed_position)",
    "CREATE INDEX IF NOT EXISTS commands_project ON commands (project, position)",
    "CREATE INDEX IF NOT EXISTS commands_closed ON commands (closed_at) WHERE closed_at IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS commands_open ON commands (device_id, position) WHERE closed_at IS NULL",
)
KEYS = {"commands": "position"}
# The position of the `created` event of a command id.
CREATED = "(SELECT i.position FROM events i WHERE i.stream = {} AND i.version = 1)"
OPEN = "commands INDEXED BY commands_open WHERE closed_at IS NULL"  # it reads no row of a closed command
FIELDS = "position, project, device_id, type, state, version, closed_at, closed_position, later"
INSERT = f"INSERT INTO commands ({FIELDS}) VALUES {{}}"
UPDATE = f"""UPDATE commands SET state = ?, version = ?, closed_at = ?, closed_position = ?, later = ?
    WHERE position = {CREATED.format("?")} AND version = ?"""

# Condition on a row `c`: a running purge will erase this command (older than its cutoff, closed before it).
HIDDEN = "EXISTS (SELECT 1 FROM purges p WHERE c.position < p.bound AND c.closed_at < p.at)"
# The columns that `opened` reads, of a row `c` and its `created` event `f`.
OPENED = """c.later, c.state, c.version, c.closed_at,
    f.stream, coalesce(f.decided_at, f.recorded_at), f.project, f.device_id, f.actor, f.data"""
# The columns that `folded` reads. CROSS JOIN fixes the join order, because the filters are on `commands`.
COLUMNS = f"""CASE WHEN c.state IN ('executed', 'failed')
    THEN (SELECT l.data FROM events l WHERE l.stream = f.stream ORDER BY l.version DESC LIMIT 1) END,
    {OPENED}"""
FOUND = f"SELECT {COLUMNS} FROM commands c CROSS JOIN events f ON f.position = c.position"
ONE = f"""SELECT {COLUMNS} FROM events f CROSS JOIN commands c ON c.position = f.position
    WHERE f.stream = ? AND f.version = 1 AND NOT {HIDDEN}"""

LAST = 2**63 - 1
STATES = {state.value: state for state in State}


class Later(msgspec.Struct, array_like=True, gc=False):
    """The column `later`, an array in msgpack: what the events after `created` changed. The times are in ms
    since the creation: most take 1 to 3 bytes instead of 9."""

    updated_at: int
    published_at: int | None
    handed_over_at: int | None
    delivered_at: int | None
    acknowledged_at: int | None
    reported_at: int | None
    executed_at: int | None
    attempts: int
    counted: int
    counting: bool
    transport: Transport | None
    pulled: bool
    percent: int | float | None
    note: str | None
    progress_count: int
    reason: str | None
    by: str | None
    superseded_by: str | None
    late: bool
    reopened: bool
    numbers: tuple[int, ...]
    signed: bool | None
    seq: int | None


TIMES = 7  # the first fields
_values = attrgetter(*Later.__struct_fields__)
_encode = msgspec.msgpack.Encoder().encode
changes = msgspec.msgpack.Decoder(Later).decode


class _Created(msgspec.Struct):
    """The part of a `created` event that a history shows."""

    params: msgspec.Raw


_created = msgspec.json.Decoder(_Created).decode


def later(state: CommandState) -> bytes:
    """What the events after `created` changed, as the row stores it; without result and error."""
    values, since = _values(state), state.created_at
    return _encode((*[None if at is None else at - since for at in values[:TIMES]], *values[TIMES:]))


def folded(row: Any) -> CommandState:
    """The full state from a row of `COLUMNS`; equal to the fold of the command's events."""
    last, state = row[0], opened(row[1:])
    if last is not None:
        match decode(state.state, last):
            case Executed(result=result):
                return msgspec.structs.replace(state, result=result)
            case Failed(error=error):
                return msgspec.structs.replace(state, error=error)
    return state


def opened(row: Any) -> CommandState:
    """The full state of a command without result and error, from a row of `OPENED`."""
    known, name, version, closed_at, command_id, created_at, project, device_id, actor, data = row
    created = Pending(
        stream=command_id,
        version=1,
        decided_at=created_at,
        project=project,
        device_id=device_id,
        actor=actor,
        event=decode("created", data),
    )
    state = evolve(None, created)
    # Nobody else has the state yet. Parameters are copied: the original holds the whole event in memory.
    msgspec.structs.force_setattr(state, "params", state.params.copy())
    if version == 1:
        return state
    now = changes(known)

    def time(since: int | None) -> int | None:
        return None if since is None else created_at + since

    return msgspec.structs.replace(
        state,
        state=STATES[name],
        version=version,
        closed_at=closed_at,
        updated_at=created_at + now.updated_at,
        published_at=time(now.published_at),
        handed_over_at=time(now.handed_over_at),
        delivered_at=time(now.delivered_at),
        acknowledged_at=time(now.acknowledged_at),
        reported_at=time(now.reported_at),
        executed_at=time(now.executed_at),
        attempts=now.attempts,
        counted=now.counted,
        counting=now.counting,
        transport=now.transport,
        pulled=now.pulled,
        percent=now.percent,
        note=now.note,
        progress_count=now.progress_count,
        reason=now.reason,
        by=now.by,
        superseded_by=now.superseded_by,
        late=now.late,
        reopened=now.reopened,
        numbers=now.numbers,
        signed=now.signed,
        seq=now.seq,
    )


def added(s: CommandState, position: int, last: int) -> tuple[Any, ...]:
    """The values of `INSERT` for a new command. `position`: of its first event; `last`: of its last one."""
    return (position, s.project, s.device_id, s.type, *_latest(s, last))


def changed(s: CommandState, last: int, over: int) -> tuple[Any, ...]:
    """The values of `UPDATE` for a command whose row has the version `over`."""
    return (*_latest(s, last), s.id, over)


def _latest(s: CommandState, last: int) -> tuple[Any, ...]:
    return s.state.value, s.version, s.closed_at, last if s.closed else None, later(s)


async def get(sql: Sql, command_id: str) -> CommandState | None:
    row = await sql.one(ONE, (command_id,))
    return folded(row) if row else None


async def position(sql: Sql, command_id: str) -> int:
    """The position of the first event of a command; 0 if it was erased meanwhile."""
    row = await sql.one(
        f"SELECT position FROM commands WHERE position = {CREATED.format('?')}", (command_id,)
    )
    return 0 if row is None else int(row[0])


async def get_many(sql: Sql, command_ids: Iterable[str]) -> dict[str, CommandState]:
    """The commands that exist and are not hidden, by id."""
    found = {}
    for command_id in command_ids:
        if (state := (await get(sql, command_id))) is not None:
            found[command_id] = state
    return found


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a list; None: any. `before`: a position (cursor). `within`: only of these devices."""

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
            SELECT position FROM {OPEN} AND position < ? UNION
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
        "SELECT f.stream, c.state, coalesce(f.decided_at, f.recorded_at), f.data "
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
    """Commands executed or failed at or after `at` (ms), without results and errors.

    Includes commands that a running purge will erase.
    """
    found = await sql.all(
        f"SELECT {OPENED} FROM commands c CROSS JOIN events f ON f.position = c.position "
        "WHERE c.closed_at >= ? AND c.state IN ('executed', 'failed')",
        (at,),
    )
    return [opened(row) for row in found]


async def forgotten_since(sql: Sql, at: int) -> list[tuple[str, int]]:
    """Device id and time (ms) of each command that timed out at or after `at` (ms) and was then erased."""
    found = await sql.all(
        "SELECT e.device_id, coalesce(e.decided_at, e.recorded_at) FROM events e WHERE e.position >= ? "
        "AND e.type = 'timed_out' "
        f"AND NOT EXISTS (SELECT 1 FROM commands c WHERE c.position = {CREATED.format('e.stream')} "
        f"AND NOT {HIDDEN})",
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
    first = CREATED.format("?")
    hidden = {
        stream
        for stream in streams
        if (await sql.one(f"SELECT 1 FROM commands c WHERE c.position = {first} AND {HIDDEN}", (stream,)))
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
        "SELECT c.position, f.stream, c.version "
        "FROM commands c CROSS JOIN events f ON f.position = c.position "
        "WHERE c.position > ? AND c.position < ? AND c.closed_at < ? ORDER BY c.position LIMIT ?",
        (after, purge.bound, purge.at, limit),
    )
    return [Purgeable(*row) for row in found]


def remove(sql: Sqlite, command_id: str) -> None:
    sql.execute(f"DELETE FROM commands WHERE position = {CREATED.format('?')}", (command_id,))


async def at(sql: Sql, positions: list[int]) -> list[tuple[Any, ...]]:
    """The rows that these positions have, ascending."""
    found = await sql.all(
        f"SELECT {FIELDS} FROM commands "
        "WHERE position IN (SELECT CAST(value AS BIGINT) FROM json_each(?)) ORDER BY position",
        (msgspec.json.encode(positions).decode(),),
    )
    return [*map(tuple, found)]


async def stray(sql: Sql, right: int) -> str | None:
    """A sentence about the first row that belongs to none of the log's `right` commands, or None. The rows of
    these are all there."""
    if (count := (await sql.one("SELECT count(*) FROM commands"))[0]) == right:
        return None
    found = await sql.one(
        "SELECT c.position FROM commands c WHERE NOT EXISTS (SELECT 1 FROM events f "
        "WHERE f.position = c.position AND f.type = 'created' AND f.data IS NOT NULL) "
        "ORDER BY c.position LIMIT 1"
    )
    if found is None:  # an event was changed so that it looks like that of the row
        return f"commands has {count} rows, and the log has {right} commands; see ordain log verify"
    return f"commands, the row of position {found[0]} does not follow from the log"


async def dump(sql: Sql) -> list[tuple[Any, ...]]:
    """Every row; used to compare a rebuilt projection with the maintained one."""
    found = await sql.all("SELECT * FROM commands ORDER BY position")
    return [tuple(row) for row in found]
