"""`/v1`: reads of commands, of their events, and of the device types; also of past states."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated

from litestar import get
from litestar.params import FromPath, QueryParameter

from broker.domain.errors import not_found
from broker.domain.lifecycle import CommandState, State
from broker.engine.ids import check_name
from broker.http.edge.auth import Call, needs
from broker.http.edge.errors import documented
from broker.http.edge.pages import Cursor, Limit, Pager, cut
from broker.http.v1 import past, views
from broker.http.v1.devices import find_device
from broker.http.v1.past import AsOf, find_command
from broker.http.v1.views import STATUS, Command, CommandList, EventList, StateName, Status, TypeList
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.seams import Sql
from projections import commands as commands_view
from projections import devices as devices_view
from projections import past as past_view
from projections.commands import Filter

ByStatus = Annotated[Status | None, QueryParameter(description="Only commands with this status.")]
ByState = Annotated[
    StateName | None, QueryParameter(name="state", description="Only commands in this state.")
]
ByType = Annotated[
    str | None, QueryParameter(description="Only commands with this name.", schema_extra=views.NAME)
]
ByDevice = Annotated[
    str | None,
    QueryParameter(description="Only commands of this device: id or hardware id.", schema_extra=views.NAME),
]
WithGrant = Annotated[
    bool,
    QueryParameter(
        name="grant", description="`false`: every `grant_token` is null; this saves signing them."
    ),
]
AT_ONCE_BYTES = 32_768  # parameters of the commands that are shown before other requests get a turn
EventLimit = Annotated[
    int, QueryParameter(ge=1, le=1_000, description="The largest number of events in a page.")
]


@get(
    "/devices/{device:str}/commands",
    opt=needs("devices:read"),
    responses=documented(404, 410),
    tags=["Commands"],
)
async def list_device_commands(
    request: Call,
    device: FromPath[str],
    status: ByStatus = None,
    in_state: ByState = None,
    type: ByType = None,
    limit: Limit = 20,
    cursor: Cursor = None,
    as_of: AsOf = None,
    with_grant: WithGrant = True,
) -> CommandList:
    """List the commands of a device

    Newest first. Pages do not shift while new commands arrive.
    """
    show = shower(request, as_of, with_grant)
    return await _list(request, "device", device, status, in_state, type, limit, cursor, as_of, show)


@get(
    "/devices/{device:str}/commands/{command_id:str}",
    opt=needs("devices:read"),
    responses=documented(404, 410),
    tags=["Commands"],
)
async def get_device_command(
    request: Call,
    device: FromPath[str],
    command_id: FromPath[str],
    as_of: AsOf = None,
    with_grant: WithGrant = True,
) -> Command:
    """Read a command of a device

    The command as it is now, or, with `as_of`, as it was then. 404 if it belongs to another device.
    """
    return shower(request, as_of, with_grant)(await find(request, command_id, device, as_of))


@get("/commands", opt=needs("devices:read"), responses=documented(410), tags=["Commands"])
async def list_commands(
    request: Call,
    device: ByDevice = None,
    status: ByStatus = None,
    in_state: ByState = None,
    type: ByType = None,
    limit: Limit = 20,
    cursor: Cursor = None,
    as_of: AsOf = None,
    with_grant: WithGrant = True,
) -> CommandList:
    """List commands

    Commands of the key's project, newest first. An admin key gets the commands of all projects. With `as_of`
    and a filter a page can be shorter than `limit` without being the last; check `has_more`.
    """
    show = shower(request, as_of, with_grant)
    return await _list(request, "all", device, status, in_state, type, limit, cursor, as_of, show)


@get(
    "/commands/{command_id:str}", opt=needs("devices:read"), responses=documented(404, 410), tags=["Commands"]
)
async def get_command(
    request: Call, command_id: FromPath[str], as_of: AsOf = None, with_grant: WithGrant = True
) -> Command:
    """Read a command

    The command as it is now, or, with `as_of`, as it was then.
    """
    return shower(request, as_of, with_grant)(await find(request, command_id, as_of=as_of))


@get(
    "/commands/{command_id:str}/events",
    opt=needs("devices:read"),
    responses=documented(404),
    tags=["Commands"],
)
async def list_command_events(
    request: Call, command_id: FromPath[str], limit: EventLimit = 100, cursor: Cursor = None
) -> EventList:
    """List the events of a command

    All events that were recorded for it, in order.
    """
    caller = request.user
    pager = Pager(request.services.cursor_key, "events", caller.project, command_id)
    after = pager.after(cursor) or 0

    async def work(sql: Sql) -> list[Row]:
        (await find_command(sql, caller, command_id))
        return [row for row in (await log.stream(sql, command_id)) if row.version > after]

    page, more = cut(await request.services.commands.writer.storage.read(work), limit)
    return EventList(
        data=[views.event(row) for row in page],
        has_more=more,
        next_cursor=pager.seal(page[-1].version) if more else None,
    )


@get("/types", opt=needs("devices:read"), responses=documented(), tags=["Devices"])
async def list_types(request: Call) -> TypeList:
    """List the device types

    All device types with their commands, and the parameters of each command.
    """
    return views.types(request.services.commands.types)


async def find(
    request: Call, command_id: str, device: str | None = None, as_of: str | None = None
) -> CommandState:
    """Reads a durable command. With `device`, the command must belong to it; a deleted device is found too.

    Raises:
        Refusal: not_found.
    """
    caller = request.user
    place = None if as_of is None else await past.place_of(request, as_of)

    async def work(sql: Sql) -> CommandState:
        device_id = None
        if device is not None:
            known = (await devices_view.by_name(sql, [device])).get(device)
            if known is None or not caller.sees(known):
                raise not_found("device", device)
            device_id = known.id
        return await find_command(
            sql, caller, command_id, device_id, None if place is None else (await place(sql))
        )

    return await request.services.commands.writer.storage.read(work)


async def _list(
    request: Call,
    route: str,
    device: str | None,
    status: Status | None,
    state: StateName | None,
    type_name: str | None,
    limit: int,
    cursor: str | None,
    as_of: str | None,
    show: Callable[[CommandState], Command],
) -> CommandList:
    caller = request.user
    check_name("type", type_name)
    check_name("device", device)
    filters = device, status, state, type_name, *([] if as_of is None else [as_of])
    pager = Pager(request.services.cursor_key, "commands", route, caller.project, *filters)
    before = pager.after(cursor)
    place = None if as_of is None else await past.place_of(request, as_of)

    async def work(sql: Sql) -> tuple[Sequence[CommandState], int | None]:
        position = None if place is None else (await place(sql))
        device_id = None
        if route == "device" and device is not None:
            if position is None:
                device_id = (await find_device(sql, caller, device)).id
            else:
                device_id = (await past.find_device(sql, caller, device, position)).state.id
        elif device is not None:
            # An unknown device in a filter gives an empty list. A deleted device's commands are found.
            known = (await devices_view.by_name(sql, [device])).get(device)
            if known is None or not caller.sees(known):
                return [], None
            device_id = known.id
        wanted = Filter(
            project=caller.project,
            within=caller.devices,
            device_id=device_id,
            type=type_name,
            states=_states(status, state),
            before=before,
        )
        if position is not None:
            return await past_view.commands(sql, wanted, position, limit)
        page, more = cut((await commands_view.newest(sql, wanted, limit + 1)), limit)
        return page, (await commands_view.position(sql, page[-1].id)) if more else None

    page, resume = await request.services.commands.writer.storage.read(work)
    return CommandList(
        data=await _each(page, show),
        has_more=resume is not None,
        next_cursor=None if resume is None else pager.seal(resume),
    )


async def _each(page: Sequence[CommandState], show: Callable[[CommandState], Command]) -> list[Command]:
    """Shows all of them. Other requests run in between: the grant of a large command takes milliseconds."""
    found, spent = list[Command](), 0
    for state in page:
        found.append(show(state))
        spent += len(bytes(state.params))
        if spent > AT_ONCE_BYTES:
            spent = 0
            await asyncio.sleep(0)
    return found


def _states(status: Status | None, state: StateName | None) -> tuple[State, ...] | None:
    """The states that match both filters; None without a filter."""
    if status is None and state is None:
        return None
    return tuple(
        each for each, word in STATUS.items() if status in (None, word) and state in (None, each.value)
    )


def shower(request: Call, as_of: str | None, with_grant: bool) -> Callable[[CommandState], Command]:
    """Returns the function that shows a command: without its grant if the state is a past one, or if the
    caller does not want it."""
    if as_of is not None or not with_grant:
        return lambda state: views.command(state, None)
    return lambda state: shown(request, state)


def shown(request: Call, state: CommandState) -> Command:
    """A command, with its grant if the caller has the scope `devices:write`."""
    token = None
    if "devices:write" in request.user.scopes:
        services = request.services
        token = services.grants.shown(state, services.commands.writer.now())
    return views.command(state, token)
