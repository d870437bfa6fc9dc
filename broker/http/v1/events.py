"""`/v1/events`: the events of a project, in pages or as an endless stream.

Pages and streams use the same log positions, so a client can read pages first and then continue with a
stream. Only durable events are shown.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter
from msgspec import Meta

from broker.domain.cloudevents import BARE_TYPES, EVENTS, CloudEvent, Wanted, cloud_event
from broker.domain.errors import Refusal, invalid
from broker.engine.registry import check_name
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, header, needs
from broker.http.edge.errors import ErrorBody, documented
from broker.http.edge.pages import cut
from broker.http.edge.streams import Stream
from broker.http.v1.views import NAME
from broker.subscriptions.feed import Feed

STREAM = "text/event-stream"

After = Annotated[
    int | None,
    QueryParameter(
        ge=0, description="Only events after this position. The position of an event is its `id`."
    ),
]
Cursor = Annotated[
    int | None,
    QueryParameter(ge=0, description="The same as `after`: the `next_cursor` of the previous page."),
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
LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID",
        description="For a stream: only events after this position. It takes precedence over `after`.",
        schema_extra={"pattern": "^[0-9]{1,19}$"},
    ),
]
ANSWERS = documented(410, 429) | {
    410: ResponseSpec(
        ErrorBody,
        generate_examples=False,
        description="`gone`: the events after this position are no longer stored.",
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


@get("/events", opt=needs("events:read"), responses=ANSWERS, tags=["Events"])
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
) -> Response[CloudEventList]:
    """Follow events

    Events of the key's project, or of all projects for an admin key. Each event is a CloudEvent. Events come
    in log order and only after they are durable. A page begins after `after`, or with the first event. With a
    filter a page can be short or even empty although `has_more` is true.

    With `Accept: text/event-stream` the answer is an endless stream: `id` is the position, `data` is the
    CloudEvent, and a comment comes every 15 seconds. The stream begins after `Last-Event-ID`, else after
    `after`, else with the next event that is recorded. It first sends an `id` without data: the position
    where it begins. After a lost connection, continue from the last `id`: no event is missed, and none comes
    twice.
    A client that does not read its stream is disconnected.
    """
    wanted = _wanted(request, device, type, event, command, project)
    services = request.services
    seen = None if last_event_id is None else _position(last_event_id)
    if not _wants_stream(request):
        start = _place(services.feed, after, cursor)
        return Json(await _page(request, wanted, services.feed.kept_after if start is None else start, limit))
    if seen is not None:
        start = _seen(services.feed, "Last-Event-ID", seen)
    else:
        start = _place(services.feed, after, cursor)
    return Stream(
        services.streams,
        request.user,
        wanted,
        services.feed.head if start is None else start,
        lambda: authorize(request),
    )


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
        next_cursor=str(reached) if reached < head else None,
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
    return Wanted(project=own or project, device=device, command_id=command, command=type_name, event=bare)


def _wants_stream(request: Request[Any, Any, Any]) -> bool:
    ranges = header(request, b"accept").decode("latin-1").lower().split(",")
    return any(each.partition(";")[0].strip() == STREAM for each in ranges)


def _place(feed: Feed, after: int | None, cursor: int | None) -> int | None:
    if after is not None and cursor not in (None, after):
        raise invalid("cursor", "differs from `after`; give only one of them", cursor)
    field = "after" if cursor is None else "cursor"
    start = cursor if after is None else after
    return None if start is None else _seen(feed, field, start)


def _position(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise invalid("Last-Event-ID", "must be the id of an event: its position, a whole number", text)
    return int(text)


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


routes = Router("/v1", route_handlers=[list_events], before_request=authorize)
