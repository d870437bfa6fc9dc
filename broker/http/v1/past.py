"""`as_of`: reads of a past state; and `/v1/diff`: the changes between two points of the log.

A point is a position or a time. It stands for the state after all events recorded at or before it. The
answer is computed only from the log, so the same question always gets the same answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from litestar import Router, get
from litestar.params import QueryParameter
from msgspec import Meta

from broker.domain.errors import invalid, not_found
from broker.domain.lanes import Presence
from broker.domain.lifecycle import CommandState
from broker.engine.commands import Caller
from broker.http.edge import positions
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.edge.pages import Cursor, Limit, Pager
from broker.http.v1 import views
from broker.http.v1.views import Command, Device
from broker.log import sqlite as log
from broker.seams import Sql
from devices.clock import parse_rfc3339
from projections import commands as commands_view
from projections import devices as devices_view
from projections import past
from projections.past import Then

# A position, or a time that exists: a pattern alone would also allow the 31st of February.
PLACE = {
    "anyOf": [
        {"type": "string", "pattern": positions.PATTERN},
        {
            "type": "string",
            "format": "date-time",
            "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{1,9})?"
            "(Z|[+-][0-9]{2}:[0-9]{2})$",
        },
    ]
}
AsOf = Annotated[
    str | None,
    QueryParameter(
        description="Read a past state: after this log position, or after all events recorded at or before "
        "this RFC 3339 time. 400 if it lies beyond the end of the log or in the future. Grants are not "
        "shown.",
        schema_extra=PLACE,
    ),
]
POINT = "A log position or an RFC 3339 time"
Start = Annotated[
    str | None,
    QueryParameter(
        name="from", description=f"{POINT}; the beginning of the log if absent.", schema_extra=PLACE
    ),
]
End = Annotated[str | None, QueryParameter(description=f"{POINT}; now if absent.", schema_extra=PLACE)]
Place = Callable[[Sql], Awaitable[int]]


class ChangedCommand(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="command"):
    """A command that differs between the two points."""

    id: str
    device_id: str
    before: Annotated[Command | None, Meta(description="Null if it was not created yet.")]
    after: Command


class ChangedDevice(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="device"):
    """A device that differs between the two points. A deleted device has `deleted_at`."""

    id: str
    device_id: str
    before: Annotated[Device | None, Meta(description="Null if it was not registered yet.")]
    after: Device


class ChangeList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[ChangedCommand | ChangedDevice]
    has_more: bool
    next_cursor: str | None


async def place_of(request: Call, text: str, field: str = "as_of") -> Place:
    """Returns a function that finds the position of a point inside the reading transaction.

    Raises:
        Refusal: invalid_request, if the text is neither a position nor a time, or the time lies in the
            future; gone, if the position belongs to another log. The returned function raises
            invalid_request if the position lies beyond the end of the log.
    """
    services = request.services
    position = positions.parsed(field, text, services.log_id, services.feed.head)
    if position is not None:
        return lambda sql: _reached(sql, position, field)
    try:
        at = parse_rfc3339(text)
    except ValueError:
        raise invalid(field, "must be a log position or an RFC 3339 time", text) from None
    writer = request.services.commands.writer
    if at > writer.now():
        raise invalid(field, "lies in the future", text)
    await writer.barrier()  # events recorded before that time may not be on disk yet
    return lambda sql: log.place(sql, at)


async def _head(sql: Sql) -> int:
    return (await log.head(sql)).position


async def _reached(sql: Sql, position: int, field: str) -> int:
    head = await _head(sql)
    if position > head:
        raise invalid(field, f"the log ends at position {head}", position)
    return position


async def find_command(
    sql: Sql, caller: Caller, command_id: str, device_id: str | None = None, position: int | None = None
) -> CommandState:
    """A command. With `device_id`, it must belong to that device; with `position`, its state at that point.

    Raises:
        Refusal: not_found, also if the caller may not see it, or it was created after `position`.
    """
    if position is None:
        state = await commands_view.get(sql, command_id)
    else:
        state = await past.command(sql, command_id, position)
    if state is None or not caller.sees(state) or device_id not in (None, state.device_id):
        raise not_found("command", command_id)
    return state


async def find_device(sql: Sql, caller: Caller, name: str, position: int) -> Then:
    """A device in its state at a position, by its id or hardware id.

    Raises:
        Refusal: not_found, also if the caller may not see it, or at that position it was not yet
            registered or already deleted.
    """
    now = (await devices_view.by_name(sql, [name])).get(name)
    then = None if now is None or not caller.sees(now) else (await past.device(sql, now.id, position))
    if then is None or then.state.deleted_at is not None:
        raise not_found("device", name)
    return then


def known(then: Then) -> Presence | None:
    """The presence of a device according to the log at that point."""
    return None if not then.state.online else Presence.UNKNOWN if then.void else Presence.ONLINE


def device(then: Then) -> Device:
    return views.device(then.state, known(then))


@get("/diff", opt=needs("devices:read"), responses=documented(410))
async def read_diff(
    request: Call,
    since: Start = None,
    to: End = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> ChangeList:
    """Read what changed

    Commands and devices that differ between two points of the log, in order of their first change. A page can
    be shorter than `limit` without being the last; check `has_more`.
    """
    project, within = request.user.project, request.user.devices
    start_of = await place_of(request, "0" if since is None else since, "from")
    end_of = _head if to is None else await place_of(request, to, "to")
    pager = Pager(request.services.cursor_key, "diff", project, since, to)
    after = pager.after(cursor)

    async def work(sql: Sql) -> tuple[list[past.Change], int | None]:
        start, end = await start_of(sql), await end_of(sql)
        if start > end:
            raise invalid("from", f"must not lie after `to`, which is position {end}", since)
        return await past.changes(sql, project, start, end, start if after is None else after, limit, within)

    found, resume = await request.services.commands.writer.storage.read(work)
    shown = [_change(change) for change in found]
    return ChangeList(
        data=[change for change in shown if change.before != change.after],
        has_more=resume is not None,
        next_cursor=None if resume is None else pager.seal(resume),
    )


def _change(change: past.CommandChange | past.DeviceChange) -> ChangedCommand | ChangedDevice:
    if isinstance(change, past.DeviceChange):
        device_id = change.after.state.id
        before = None if change.before is None else device(change.before)
        return ChangedDevice(id=device_id, device_id=device_id, before=before, after=device(change.after))
    return ChangedCommand(
        id=change.after.id,
        device_id=change.after.device_id,
        before=None if change.before is None else views.command(change.before, None),
        after=views.command(change.after, None),
    )


routes = Router("/v1", route_handlers=[read_diff], before_request=authorize, tags=["System"])
