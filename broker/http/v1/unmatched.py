"""`/v1/unmatched`: answers of devices that matched no command, stored for the operator.

Read only. These answers are not part of the log, so no decision may depend on them.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, get
from litestar.params import QueryParameter
from msgspec import Meta

from broker.domain.lifecycle import CommandState
from broker.domain.said import UNUSABLE, Said
from broker.engine.ids import check_name
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.edge.pages import Cursor, Limit, Pager, cut
from broker.http.v1.views import NAME, Time
from broker.seams import Sql
from devices.clock import rfc3339
from projections import devices as devices_view

Reason = Literal[
    "unknown",
    "never_handed_over",
    "promise_broken",
    "contradiction",
    "wrong_device",
    "unknown_device",
    "nothing_in_flight",
    "ambiguous",
    "malformed",
    "no_rule",
    "unsigned",
    "bad_signature",
    "no_key",
    "unfit_at",
    "unfit_progress",
    "unfit_session",
]
ByDevice = Annotated[
    str | None,
    QueryParameter(description="Only answers of this device: id or hardware id.", schema_extra=NAME),
]
ByReason = Annotated[Reason | None, QueryParameter(description="Only answers kept for this reason.")]


class Unmatched(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that matched no command."""

    id: int
    at: Time
    device_id: Annotated[str | None, Meta(description="Null if the device is unknown.")]
    reason: Reason
    topic: str
    command_id: Annotated[str | None, Meta(description="The command that the answer named, if any.")]
    payload: Annotated[str, Meta(description="The first 1,024 bytes of the answer.")]
    encoding: Literal["utf-8", "base64"]


class UnmatchedList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of unmatched answers."""

    data: list[Unmatched]
    has_more: bool
    next_cursor: str | None


@get("/unmatched", opt=needs("devices:read"), responses=documented())
async def list_unmatched(
    request: Call, device: ByDevice = None, reason: ByReason = None, limit: Limit = 20, cursor: Cursor = None
) -> UnmatchedList:
    """List unmatched answers

    Answers of devices that matched no command, in the key's project, newest first. An answer that counted,
    but of which a part was left out (`unfit_…`), is listed too. The last 100 of each
    device are kept. An admin key gets those of all projects and of unknown devices.
    """
    caller = request.user
    project = caller.project
    check_name("device", device)
    pager = Pager(request.services.cursor_key, "unmatched", project, device, reason)
    before = pager.after(cursor)

    async def work(sql: Sql) -> list[Any]:
        wanted: dict[str, Any] = {"project = ?": project, "reason = ?": reason, "id < ?": before}
        condition, values = devices_view.in_set(caller.devices, "device_id")
        if device is not None:
            known = (await devices_view.by_name(sql, [device])).get(device)
            if known is None or not caller.sees(known):
                return []
            wanted["device_id = ?"] = known.id
        where = {clause: value for clause, value in wanted.items() if value is not None}
        return await sql.all(
            "SELECT id, at, device_id, reason, topic, command_id, payload FROM unmatched "
            f"WHERE {' AND '.join([*where, condition])} ORDER BY id DESC LIMIT ?",
            (*where.values(), *values, limit + 1),
        )

    page, more = cut(await request.services.commands.writer.storage.read(work), limit)
    return UnmatchedList(
        data=[_shown(row) for row in page],
        has_more=more,
        next_cursor=pager.seal(page[-1][0]) if more else None,
    )


async def of_command(sql: Sql, state: CommandState) -> list[Said]:
    """The kept messages of the command's own device that explain its state, oldest first.

    These are the messages that named the command, and the unusable ones since it was handed over. If it was
    not handed over: since the device's presence last changed, because one may have been a wrong `online`.
    """
    since = state.handed_over_at
    if since is None:
        device = (await devices_view.by_name(sql, [state.device_id])).get(state.device_id)
        since = 0 if device is None or device.seen_at is None else device.seen_at
    reasons = tuple(UNUSABLE)
    rows = await sql.all(
        "SELECT at, reason, topic FROM unmatched WHERE device_id = ? AND (command_id = ? OR (at >= ? AND "
        f"reason IN ({', '.join('?' for _ in reasons)}))) ORDER BY id",
        (state.device_id, state.id, since, *reasons),
    )
    return [Said(at=at, reason=reason, topic=topic) for at, reason, topic in rows]


def _shown(row: Any) -> Unmatched:
    payload, encoding = bytes(row[6]), "utf-8"
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        text, encoding = base64.b64encode(payload).decode(), "base64"
    return Unmatched(
        id=row[0],
        at=rfc3339(row[1]),
        device_id=row[2],
        reason=row[3],
        topic=row[4],
        command_id=row[5],
        payload=text,
        encoding=encoding,  # type: ignore[arg-type]
    )


routes = Router("/v1", route_handlers=[list_unmatched], before_request=authorize, tags=["Devices"])
