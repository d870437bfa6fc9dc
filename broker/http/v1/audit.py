"""`/v1/audit`: who changed what, when and from where. For admins only: it shows network addresses."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Router, get
from litestar.params import QueryParameter
from msgspec import Meta

from broker.domain.cloudevents import event_data
from broker.domain.errors import invalid
from broker.domain.events import Caused, Operated, decode, subject_kind
from broker.engine.ids import check_name
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.edge.pages import Cursor, Limit, Pager
from broker.http.v1.views import NAME, Time
from broker.log.chain import Row
from devices.clock import parse_rfc3339, rfc3339
from projections import audit

ByKey = Annotated[
    str | None, QueryParameter(description="Only what the key with this id did.", schema_extra=NAME)
]
Since = Annotated[
    str | None,
    QueryParameter(description="Only from this RFC 3339 time on.", schema_extra={"format": "date-time"}),
]


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change."""

    position: int
    at: Time
    actor: Annotated[str, Meta(description="`key:<id>`, `operator:local`, or `broker` for a start.")]
    action: Annotated[
        str, Meta(description="`command.created`, `device.changed`, `key.revoked`, `webhook.deleted`, …")
    ]
    subject: Annotated[str, Meta(description="The id of what was changed.")]
    project: Annotated[str | None, Meta(description="Null: the change belongs to no project.")]
    request_id: Annotated[
        str | None, Meta(description="As in the answer's `X-Request-Id`. Null: unknown, or erased.")
    ]
    peer: Annotated[
        str | None, Meta(description="The address that the request came from; `local`: the private socket.")
    ]
    data: dict[str, Any]


class AuditList(msgspec.Struct, frozen=True, kw_only=True):
    """Changes, the oldest first."""

    data: list[AuditEntry]
    has_more: bool
    next_cursor: str | None


@get("/audit", opt=needs("admin"), responses=documented())
async def read_audit(
    request: Call, key: ByKey = None, since: Since = None, limit: Limit = 100, cursor: Cursor = None
) -> AuditList:
    """Read who changed what

    Every change that a key or the operator made, and every start of the broker, in order of the log. A page
    can be shorter than `limit` or empty without being the last; check `has_more`.
    """
    check_name("key", key)
    begin = None
    if since is not None:
        try:
            begin = parse_rfc3339(since)
        except ValueError:
            raise invalid("since", "must be an RFC 3339 time", since) from None
    actor = None if key is None else f"key:{key}"
    pager = Pager(request.services.cursor_key, "audit", actor, since)
    after = pager.after(cursor) or 0
    storage = request.services.commands.writer.storage
    rows, resume = await storage.read(lambda sql: audit.page(sql, actor, begin, after, limit))
    return AuditList(
        data=[_entry(row) for row in rows],
        has_more=resume is not None,
        next_cursor=None if resume is None else pager.seal(resume),
    )


def _entry(row: Row) -> AuditEntry:
    kind, subject = subject_kind(row.stream), row.stream.removeprefix("device/")
    action, data, via = f"{kind}.{row.type}", dict[str, Any](), None
    if row.data is not None:
        event = decode(row.type, row.data, row.schema)
        data = event_data(event)
        if isinstance(event, Caused):
            via = event.via
        if isinstance(event, Operated):
            action, subject, data = event.action, event.subject, event.details
    return AuditEntry(
        position=row.position,
        at=rfc3339(row.recorded_at),
        actor=row.actor,
        action=action,
        subject=subject,
        project=row.project or None,
        request_id=None if via is None else via.request,
        peer=None if via is None else via.peer,
        data=data,
    )


routes = Router("/v1", route_handlers=[read_audit], before_request=authorize, tags=["System"])
