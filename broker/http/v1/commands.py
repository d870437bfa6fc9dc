"""`/v1`: commands, their events, and the device types."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, delete, get, post
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import invalid, not_found
from broker.domain.lifecycle import CommandState, State
from broker.engine.commands import MAX_TTL_SEC, Order
from broker.engine.registry import check_name
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
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

CREATE = "POST /v1/devices/{device}/commands"

CommandName = Annotated[
    str,
    Meta(description="A command of the device's type.", examples=["unlock"], extra_json_schema=views.NAME),
]
IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=255, examples=["order-4711"])]
CollapseKey = Annotated[str, Meta(extra_json_schema=views.NAME)]
COLLAPSES = "Replaces the device's pending commands that have the same key: those are cancelled."
KeyHeader = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same as `idempotency_key` in a body.",
    ),
]
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
EventLimit = Annotated[
    int, QueryParameter(ge=1, le=1_000, description="The largest number of events in a page.")
]


class CommandBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to send."""

    type: CommandName
    params: Annotated[
        Any,
        Meta(description="The parameters of the command; `{}` if absent.", examples=[{"for_sec": 5}]),
    ] = UNSET
    idempotency_key: Annotated[
        IdempotencyKey | UnsetType,
        Meta(description="A repeated request with the same key returns the first command."),
    ] = UNSET
    ttl_sec: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_TTL_SEC, examples=[60])] | UnsetType | None,
        Meta(description="Seconds until it expires. Absent: the broker's default (300 s); null: never."),
    ] = UNSET
    collapse_key: Annotated[CollapseKey | UnsetType, Meta(description=COLLAPSES)] = UNSET


@post(
    "/devices/{device:str}/commands",
    status_code=201,
    opt=needs("devices:write"),
    responses=documented(404, 409, 410, 413, 415, 429),
    tags=["Commands"],
)
async def create_command(
    request: Call, device: FromPath[str], data: JSONBody[CommandBody], idempotency_key: KeyHeader = None
) -> Response[Command]:
    """Send a command

    The answer comes when the command is durable, whether the device is online or not. It shows the command
    as it was created. A repeated request with the same idempotency key and the same body gets 200 with the
    first command and the header `Idempotent-Replayed: true`.
    """
    commands, caller = request.services.commands, request.user
    key = one_key(data.idempotency_key, idempotency_key)
    fingerprint = b""
    if key is not None:
        await commands.ready([device])
        same = fingerprints(CREATE, msgspec.structs.replace(data, idempotency_key=UNSET))
        fingerprint = same(commands.device(caller, device).id)
    order = Order(
        device=device,
        type=data.type,
        params=data.params,
        ttl_sec=request.services.limits.default_ttl_sec if data.ttl_sec is UNSET else data.ttl_sec,
        idempotency_key=key,
        fingerprint=fingerprint,
        collapse_key=collapse_key(data),
    )
    accepted = await commands.create(caller, order)
    command = shown(request, accepted.state)
    if accepted.replayed:
        return Json(command, status_code=200, headers={"Idempotent-Replayed": "true"})
    return Json(command)


@get(
    "/devices/{device:str}/commands",
    opt=needs("devices:read"),
    responses=documented(404),
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
) -> CommandList:
    """List the commands of a device

    Newest first. Pages do not shift while new commands arrive.
    """
    return await _list(request, "device", device, status, in_state, type, limit, cursor, as_of)


@get(
    "/devices/{device:str}/commands/{command_id:str}",
    opt=needs("devices:read"),
    responses=documented(404),
    tags=["Commands"],
)
async def get_device_command(
    request: Call, device: FromPath[str], command_id: FromPath[str], as_of: AsOf = None
) -> Command:
    """Read a command of a device"""
    found = await find(request, command_id, device, as_of)
    return shown(request, found) if as_of is None else views.command(found, None)


@delete(
    "/devices/{device:str}/commands/{command_id:str}",
    status_code=200,
    opt=needs("devices:write"),
    responses=documented(404, 409),
    tags=["Commands"],
)
async def cancel_command(request: Call, device: FromPath[str], command_id: FromPath[str]) -> Command:
    """Cancel a command

    Possible only while `state` is `pending`: the command was never handed over. Later the answer is 409 and
    names the state, even if `status` is still `pending`. Cancelling a cancelled command gets 200.
    """
    await find(request, command_id, device)
    return shown(request, await request.services.commands.cancel(request.user, command_id))


@get("/commands", opt=needs("devices:read"), responses=documented(), tags=["Commands"])
async def list_commands(
    request: Call,
    device: ByDevice = None,
    status: ByStatus = None,
    in_state: ByState = None,
    type: ByType = None,
    limit: Limit = 20,
    cursor: Cursor = None,
    as_of: AsOf = None,
) -> CommandList:
    """List commands

    Commands of the key's project, newest first. An admin key gets the commands of all projects. With `as_of`
    and a filter a page can be shorter than `limit` without being the last; check `has_more`.
    """
    return await _list(request, "all", device, status, in_state, type, limit, cursor, as_of)


@get("/commands/{command_id:str}", opt=needs("devices:read"), responses=documented(404), tags=["Commands"])
async def get_command(request: Call, command_id: FromPath[str], as_of: AsOf = None) -> Command:
    """Read a command"""
    found = await find(request, command_id, as_of=as_of)
    return shown(request, found) if as_of is None else views.command(found, None)


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

    def work(sql: Sql) -> list[Row]:
        find_command(sql, caller, command_id)
        return [row for row in log.stream(sql, command_id) if row.version > after]

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

    def work(sql: Sql) -> CommandState:
        device_id = None
        if device is not None:
            known = devices_view.by_name(sql, [device]).get(device)
            if known is None or not caller.sees(known.project):
                raise not_found("device", device)
            device_id = known.id
        return find_command(sql, caller, command_id, device_id, None if place is None else place(sql))

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
) -> CommandList:
    caller = request.user
    check_name("type", type_name)
    check_name("device", device)
    filters = device, status, state, type_name, *([] if as_of is None else [as_of])
    pager = Pager(request.services.cursor_key, "commands", route, caller.project, *filters)
    before = pager.after(cursor)
    place = None if as_of is None else await past.place_of(request, as_of)

    def work(sql: Sql) -> tuple[Sequence[CommandState], int | None]:
        position = None if place is None else place(sql)
        device_id = None
        if route == "device" and device is not None:
            if position is None:
                device_id = find_device(sql, caller, device).id
            else:
                device_id = past.find_device(sql, caller, device, position).state.id
        elif device is not None:
            # An unknown device in a filter gives an empty list. A deleted device's commands are found.
            known = devices_view.by_name(sql, [device]).get(device)
            if known is None or not caller.sees(known.project):
                return [], None
            device_id = known.id
        wanted = Filter(
            project=caller.project,
            device_id=device_id,
            type=type_name,
            states=_states(status, state),
            before=before,
        )
        if position is not None:
            return past_view.commands(sql, wanted, position, limit)
        page, more = cut(commands_view.newest(sql, wanted, limit + 1), limit)
        return page, page[-1].position if more else None

    page, resume = await request.services.commands.writer.storage.read(work)
    return CommandList(
        data=[shown(request, each) if as_of is None else views.command(each, None) for each in page],
        has_more=resume is not None,
        next_cursor=None if resume is None else pager.seal(resume),
    )


def _states(status: Status | None, state: StateName | None) -> tuple[State, ...] | None:
    """The states that match both filters; None without a filter."""
    if status is None and state is None:
        return None
    return tuple(
        each for each, word in STATUS.items() if status in (None, word) and state in (None, each.value)
    )


def shown(request: Call, state: CommandState) -> Command:
    """A command, with a fresh grant if the caller has the scope `devices:write`."""
    token = None
    if "devices:write" in request.user.scopes:
        services = request.services
        token = services.grants.shown(state, services.commands.writer.now())
    return views.command(state, token)


def one_key(body: str | UnsetType, header: str | None) -> str | None:
    """The idempotency key of a request, from its body or its header.

    Raises:
        Refusal: invalid_request, if body and header differ, or the header is not UTF-8.
    """
    if header is not None:
        try:
            # Litestar reads headers as Latin-1, but a key in a body is UTF-8; both must compare equal.
            header = header.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise invalid("Idempotency-Key", "is not UTF-8") from None
    if body is UNSET:
        return header
    if header is not None and header != body:
        raise invalid("idempotency_key", "differs from the key in the header Idempotency-Key")
    return body


def collapse_key(data: CommandBody) -> str | None:
    """The collapse key of a request, or None.

    Raises:
        Refusal: invalid_request, if it is not a name.
    """
    key = None if data.collapse_key is UNSET else data.collapse_key
    check_name("collapse_key", key)
    return key


def fingerprints(route: str, body: msgspec.Struct) -> Callable[[str], bytes]:
    """Returns a function from device id to SHA-256 digest (32 bytes). Two requests are the same if the
    digests are equal.

    The digest covers the route, the device id, and the digest of the body as sent, before defaults. The body
    is encoded again with sorted fields, so white space and the order of fields do not matter. The caller
    leaves the idempotency key and the device names out of `body`.
    """
    # The body is hashed once, not once per device: a fan-out has up to 10,000.
    hashed = hashlib.sha256(msgspec.json.encode(body, order="sorted")).digest()
    return lambda device_id: hashlib.sha256(b"\0".join([route.encode(), device_id.encode(), hashed])).digest()


routes = Router(
    "/v1",
    route_handlers=[
        create_command,
        list_device_commands,
        get_device_command,
        cancel_command,
        get_command,
        list_command_events,
        list_types,
    ],
    before_request=authorize,
)
