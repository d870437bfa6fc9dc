"""`/v1/events`: the events of a project, in pages or as an endless stream.

Pages and streams use the same log positions, so a client can read pages first and then continue with a
stream. Only durable events are shown.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, JSONBody, QueryParameter
from msgspec import Meta

from broker.domain.cloudevents import BARE_TYPES, EVENTS, CloudEvent, Wanted, cloud_event
from broker.domain.errors import Refusal, invalid, not_found
from broker.engine.erasures import MAX_DAYS
from broker.engine.ids import check_name
from broker.http.edge import positions
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, header, needs
from broker.http.edge.errors import ErrorBody, documented
from broker.http.edge.pages import cut
from broker.http.edge.services import Services
from broker.http.edge.streams import Stream
from broker.http.v1.views import NAME, Time
from broker.log import sqlite as log
from broker.seams import Sql
from broker.subscriptions.feed import Feed
from devices.clock import rfc3339
from projections import devices as devices_view

STREAM = "text/event-stream"

POSITION = {"pattern": positions.PATTERN}
After = Annotated[
    str | None,
    QueryParameter(
        description="Only events after this position. The position of an event is its `id`. Written "
        "`<log id>:<position>`, it is refused (410) after the log was restored or replaced.",
        schema_extra=POSITION,
    ),
]
Cursor = Annotated[
    str | None,
    QueryParameter(
        description="The same as `after`: the `next_cursor` of the previous page.", schema_extra=POSITION
    ),
]
Limit = Annotated[int, QueryParameter(ge=1, le=1_000, description="The largest number of events in a page.")]
ByDevice = Annotated[
    str | None,
    QueryParameter(description="Only events of this device: id or hardware id.", schema_extra=NAME),
]
ByType = Annotated[
    str | None,
    QueryParameter(description="Only events of commands with this name.", schema_extra=NAME),
]
ByEvent = Annotated[
    str | None,
    QueryParameter(
        description="Only events of this type: `executed`, or in full `ordain.command.executed.v1`.",
        schema_extra={"enum": list(BARE_TYPES)},
    ),
]
ByCommand = Annotated[
    str | None, QueryParameter(description="Only events of the command with this id.", schema_extra=NAME)
]
ByProject = Annotated[
    str | None,
    QueryParameter(
        description="Only events of this project. Only an admin key may name another project than its own.",
        schema_extra=NAME,
    ),
]
# Described as a security scheme.
ByTicket = Annotated[str | None, QueryParameter(include_in_schema=False)]
LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID",
        description="For a stream: only events after this position. It takes precedence over `after`.",
        schema_extra=POSITION,
    ),
]
ANSWERS = documented(404, 410, 429) | {
    404: ResponseSpec(
        ErrorBody,
        generate_examples=False,
        description="`not_found`: a stream was asked for a device or command that does not exist.",
    ),
    410: ResponseSpec(
        ErrorBody,
        generate_examples=False,
        description="`gone`: the events after this position are no longer stored, or the position belongs "
        "to another log: the broker's log was restored or replaced.",
    ),
    429: ResponseSpec(
        ErrorBody,
        generate_examples=False,
        description="`rate_limit_exceeded`: the project has too many open streams.",
    ),
}


class CloudEventList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of events, ascending by position."""

    data: list[CloudEvent]
    has_more: bool
    next_cursor: Annotated[
        str | None, Meta(description="The position after which the next page begins; pass it as `after`.")
    ]


class TicketView(msgspec.Struct, frozen=True, kw_only=True):
    """A ticket for one event stream, valid for 60 seconds."""

    ticket: Annotated[str, Meta(description="`tkt_…`. For `GET /v1/events?ticket=`.")]
    expires_at: Time


@post("/events/ticket", status_code=201, opt=needs("events:read"), responses=documented(), tags=["Events"])
async def create_ticket(request: Call) -> TicketView:
    """Get a ticket for an event stream

    The browser's `EventSource` cannot send a key. It opens `GET /v1/events?ticket=…` with a ticket instead. A
    ticket has the rights of the key that got it, for one connection. To reconnect, get a new ticket and
    continue with `after` and the last id.
    """
    ticket, expires_at = request.services.tickets.issue(request.user)
    return TicketView(ticket=ticket, expires_at=rfc3339(expires_at))


@get("/events", opt=needs("events:read") | {"ticket": True}, responses=ANSWERS, tags=["Events"])
async def list_events(
    request: Call,
    after: After = None,
    cursor: Cursor = None,
    limit: Limit = 100,
    device: ByDevice = None,
    type: ByType = None,
    event: ByEvent = None,
    command: ByCommand = None,
    project: ByProject = None,
    last_event_id: LastEventId = None,
    ticket: ByTicket = None,
) -> Response[CloudEventList]:
    """Follow events

    Events of the devices that the key may see; of all projects for an admin key. Each event is a CloudEvent.
    Events come in log order and only after they are durable. A page begins after `after`, or with the first
    event. With a filter a page can be short or even empty although `has_more` is true.

    With `Accept: text/event-stream` the answer is an endless stream: `id` is `<log id>:<position>`, `data` is
    the CloudEvent, and a comment comes every 15 seconds. The stream begins after `Last-Event-ID`, else after
    `after`, else with the next event that is recorded. It first sends an `id` without data: the position
    where it begins. After a lost connection, continue from the last `id`: no event is missed, and none comes
    twice.
    A client that does not read its stream is disconnected.
    """
    wanted = _wanted(request, device, type, event, command, project)
    services = request.services
    places = [
        None if text is None else _parsed(services, field, text)
        for field, text in (("Last-Event-ID", last_event_id), ("after", after), ("cursor", cursor))
    ]
    if not _wants_stream(request):
        start = _place(services.feed, *places[1:])
        return Json(await _page(request, wanted, services.feed.kept_after if start is None else start, limit))
    if places[0] is not None:
        start = _seen(services.feed, "Last-Event-ID", places[0])
    else:
        start = _place(services.feed, *places[1:])
    await _check_exists(request, wanted)
    return Stream(
        services.streams,
        request.user,
        wanted,
        services.feed.head if start is None else start,
        lambda: _check_again(request, ticket),
    )


async def _check_again(request: Call, ticket: str | None) -> None:
    """Checks the key again just before the stream opens. A ticket is used up by then, so its key is checked.

    Raises:
        Refusal: unauthorized.
    """
    if ticket is None:
        await authorize(request)
    elif not request.services.tickets.good(request.user):
        raise Refusal("unauthorized", "ticket: its key was revoked")


async def _page(request: Call, wanted: Wanted, after: int, limit: int) -> CloudEventList:
    services = request.services
    head = services.feed.head
    found, reached = await services.feed.page(wanted, after, limit + 1)
    page, more = cut(found, limit)
    if more:
        reached = page[-1].position
    return CloudEventList(
        data=[cloud_event(services.log_id, entry) for entry in page],
        has_more=reached < head,
        next_cursor=positions.full(services.log_id, reached) if reached < head else None,
    )


def _wanted(
    request: Call,
    device: str | None,
    type_name: str | None,
    event: str | None,
    command: str | None,
    project: str | None,
) -> Wanted:
    own = request.user.project
    if own is not None and project not in (None, own):
        raise Refusal("forbidden", "project: only a key with the scope admin may ask for another project")
    names = {"device": device, "type": type_name, "command": command, "project": project}
    for field, value in names.items():
        check_name(field, value)
    bare = None if event is None else BARE_TYPES.get(event)
    if event is not None and bare is None:
        raise invalid("event", f"must be one of {', '.join(EVENTS)}", event)
    return Wanted(
        project=own or project,
        within=request.user.devices,
        device=device,
        command_id=command,
        command=type_name,
        event=bare,
    )


def _wants_stream(request: Request[Any, Any, Any]) -> bool:
    ranges = header(request, b"accept").decode("latin-1").lower().split(",")
    return any(each.partition(";")[0].strip() == STREAM for each in ranges)


def _place(feed: Feed, after: int | None, cursor: int | None) -> int | None:
    if after is not None and cursor not in (None, after):
        raise invalid("cursor", "differs from `after`; give only one of them", cursor)
    field = "after" if cursor is None else "cursor"
    start = cursor if after is None else after
    return None if start is None else _seen(feed, field, start)


def _parsed(services: Services, field: str, text: str) -> int:
    position = positions.parsed(field, text, services.log_id, services.feed.head)
    if position is None:
        raise invalid(field, positions.RULE, text)
    return position


async def _check_exists(request: Call, wanted: Wanted) -> None:
    """Checks that the device and the command in a stream's filters exist: otherwise the stream would wait for
    ever without an event. A page without events ends at once, so its filters are not checked.

    Raises:
        Refusal: not_found, also if the caller may not see them.
    """
    caller = request.user

    async def work(sql: Sql) -> None:
        if wanted.device is not None:
            device = (await devices_view.by_name(sql, [wanted.device])).get(wanted.device)
            if device is None or not caller.sees(device):
                raise not_found("device", wanted.device)
        if wanted.command_id is not None:
            first = next(iter(await log.stream(sql, wanted.command_id)), None)
            device_id = "" if first is None else first.device_id or ""
            device = (await devices_view.by_name(sql, [device_id])).get(device_id)
            if device is None or not caller.sees(device):
                raise not_found("command", wanted.command_id)

    if wanted.device is not None or wanted.command_id is not None:
        await request.services.commands.writer.storage.read(work)


def _seen(feed: Feed, field: str, position: int) -> int:
    """Checks a position that the client gave as its last seen event, and returns it.

    Raises:
        Refusal: invalid_request, if the log does not reach this position yet; gone, if the events after it
            are no longer stored.
    """
    if position > feed.head:
        raise invalid(field, f"is beyond the end of the log, which is {feed.head}", position)
    if position < feed.kept_after:
        raise Refusal("gone", f"{field}: events are kept from position {feed.kept_after + 1} on")
    return position


WholeDays = Annotated[
    int,
    Meta(
        ge=0,
        le=MAX_DAYS,
        description="Whole days before today (UTC); 0 means everything before today.",
        examples=[90],
    ),
]


class EventPurgeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The age of the device events to erase."""

    older_than_days: WholeDays
    dry_run: Annotated[bool, Meta(description="Only count them.")] = False


class PurgedEvents(msgspec.Struct, frozen=True, kw_only=True):
    """`erased`: how many device events lost their data; with `dry_run`, how many would."""

    cutoff_date: Time
    erased: int


@post("/events/purge", status_code=200, opt=needs("admin"), responses=documented(413, 415), tags=["Events"])
async def purge_device_events(request: Call, data: JSONBody[EventPurgeBody]) -> PurgedEvents:
    """Erase old device events

    Erases the data of presence, attribute and state events, of all projects, that a newer event had replaced
    before midnight (UTC), `older_than_days` days ago. What a device is now does not change. Registrations and
    tokens stay, and so does the presence on which a hand-over relied. That the events happened stays in the
    log.

    The answer comes when all of it is done: minutes for a large log. If the broker stops meanwhile, what was
    erased stays erased; ask again for the rest.
    """
    purged = await request.services.erasures.purge_events(
        request.user, data.older_than_days, dry_run=data.dry_run
    )
    return PurgedEvents(cutoff_date=rfc3339(purged.cutoff), erased=purged.amount)


routes = Router(
    "/v1", route_handlers=[list_events, create_ticket, purge_device_events], before_request=authorize
)
