"""`/v1/app/command`: the routes that the SDKs call. Their fields are `name`, `device_ident`, `data`, `value`.

They create and read the same commands as all other routes, by the same code. Only the field names differ.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import Refusal, invalid
from broker.engine.commands import MAX_TTL_SEC, Order
from broker.engine.fanout import Outcome
from broker.engine.ids import check_name
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1.commands import (
    COLLAPSES,
    CollapseKey,
    CommandName,
    IdempotencyKey,
    KeyHeader,
    Wait,
    closed,
    collapse_key,
    fingerprints,
    one_key,
)
from broker.http.v1.fanout import BODY_BYTES, Devices, answers
from broker.http.v1.reading import find, shown
from broker.http.v1.views import STATUS, Command, Status
from broker.log import erasing
from broker.seams import Sql
from projections import commands as commands_view
from projections import devices as devices_view
from projections.commands import Sent

SEND = "POST /v1/app/command/send"
MOST_RECORDS = 10_000
# The texts that users of the SDK know. An invalid name or invalid data gets its full message instead.
ERRORS = {
    "not_found": "Device not found",
    "queue_full": "Queue full",
    "rate_limit_exceeded": "Rate limit exceeded",
    "too_large": "Data too large",
    "idempotency_conflict": "Idempotency key used for a different request",
    "gone": "Command was erased",
}
NAMES = {"type": "name", "params": "data"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class SendBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: CommandName
    device_ident: Annotated[Devices, Meta(description="Ids or hardware ids; each device only once.")]
    data: Annotated[Any, Meta(description="The parameters of the command: any JSON; `{}` if absent.")] = UNSET
    idempotency_key: Annotated[
        IdempotencyKey | UnsetType,
        Meta(description="A repeated request with the same key sends only the commands that are missing."),
    ] = UNSET
    ttl_sec: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_TTL_SEC, examples=[60])] | UnsetType | None,
        Meta(description="Seconds until it expires. Absent: what the device's type says; null: never."),
    ] = UNSET
    collapse_key: Annotated[CollapseKey | UnsetType, Meta(description=COLLAPSES)] = UNSET


class AppSent(msgspec.Struct, frozen=True, kw_only=True):
    sent: Annotated[
        bool, Meta(description="True: the command is durable and is delivered when the device is online.")
    ]
    command_id: str | UnsetType = UNSET
    error: Annotated[str | UnsetType, Meta(description="The reason why it was not sent, for people.")] = UNSET
    command: Annotated[
        Command | UnsetType, Meta(description="With `wait`: the command as it is at the end of the wait.")
    ] = UNSET


class HistoryBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: CommandName
    device_idents: Annotated[Devices, Meta(description="Ids or hardware ids, at most 10,000.")]
    start: Annotated[
        str,
        Meta(description="ISO 8601, inclusive; UTC if it has no offset.", examples=["2026-03-01T00:00:00Z"]),
    ]
    end: Annotated[str | None, Meta(description="ISO 8601, exclusive; now if absent.")] = None


class HistoryRecord(msgspec.Struct, frozen=True, kw_only=True):
    value: Annotated[Any, Meta(description="The data that was sent.")]
    timestamp: Annotated[int, Meta(description="When it was accepted; Unix time in milliseconds.")]
    command_id: str
    status: Status


@post(
    "/send",
    status_code=200,
    opt=needs("devices:write", body_bytes=BODY_BYTES, many="device_ident"),
    responses=documented(413, 415),
)
async def send_app_command(
    request: Call, data: JSONBody[SendBody], idempotency_key: KeyHeader = None, wait: Wait = None
) -> Response[dict[str, AppSent]]:
    """Send a command from an app

    Sends one command to each device; the answer has one member for each ident. Without `ttl_sec` the command
    never expires, unless the device's type sets an expiry: an offline device receives it when it comes back.

    With `wait`, for one device only, the answer comes when the command is closed, or after that time with
    202. It then has the member `command`.
    """
    check_name("name", data.name)
    if wait is not None and len(data.device_ident) != 1:
        raise invalid("wait", "is possible for one device only")
    order = Order(
        device="",
        type=data.name,
        params=data.data,
        ttl_sec=data.ttl_sec,
        collapse_key=collapse_key(data.collapse_key),
        idempotency_key=one_key(data.idempotency_key, idempotency_key),
    )
    same = fingerprints(SEND, msgspec.structs.replace(data, device_ident=UNSET, idempotency_key=UNSET))
    found = await request.services.fanout.send(request.user, data.device_ident, order, same)
    sent = await answers(request.services, found, _sent)
    [(ident, first), *_] = sent.items()
    if wait is None or first.command_id is UNSET:
        return Json(sent)
    state = await closed(request, await find(request, first.command_id), wait)
    answer = msgspec.structs.replace(first, command=shown(request, state))
    return Json({ident: answer}, status_code=200 if state.closed else 202)


@post(
    "/history",
    status_code=200,
    opt=needs("devices:read", body_bytes=BODY_BYTES, many="device_idents"),
    responses=documented(413, 415),
)
async def app_command_history(
    request: Call, data: JSONBody[HistoryBody]
) -> Response[dict[str, list[HistoryRecord]]]:
    """Read the commands that an app sent

    For each ident: the commands with this name that were accepted from `start` on and before `end`, in order.
    At most 10,000 in all. Commands older than the project's history retention are not included.
    """
    check_name("name", data.name)
    start = _instant("start", data.start)
    end = None if data.end is None else _instant("end", data.end)
    caller, commands = request.user, request.services.commands
    now = commands.writer.now()

    async def work(sql: Sql) -> dict[str, list[Sent]]:
        found: dict[str, list[Sent]] = {}
        before = None if end is None else (await erasing.bound(sql, end))
        firsts: dict[int, int] = {}  # history retention of a project in seconds: first position to read
        room = MOST_RECORDS
        for ident, device in (await devices_view.by_name(sql, data.device_idents)).items():
            if not caller.sees(device):
                continue
            kept_sec = commands.quotas.of(device.project).history_retention_sec
            if kept_sec not in firsts:
                firsts[kept_sec] = await erasing.bound(sql, max(start, now - kept_sec * 1_000))
            first = firsts[kept_sec]
            found[ident] = await commands_view.sent(sql, device.id, data.name, first, before, room + 1)
            room -= len(found[ident])
            if room < 0:
                raise invalid("start", f"matches more than {MOST_RECORDS} records: use a shorter time range")
        return found

    found = await commands.writer.storage.read(work)
    return Json({ident: [_record(each) for each in found.get(ident, ())] for ident in data.device_idents})


def _sent(outcome: Outcome) -> AppSent:
    if not isinstance(outcome, Refusal):
        return AppSent(sent=True, command_id=outcome)
    error = ERRORS.get(outcome.kind, outcome.message)
    if outcome.kind == "invalid_request" and outcome.details is not None:
        first, *rest = outcome.details["field"].split(".")
        error = f"{'.'.join([NAMES.get(first, first), *rest])}: {outcome.details['reason']}"
    return AppSent(sent=False, error=error)


def _record(found: Sent) -> HistoryRecord:
    return HistoryRecord(
        value=found.params,
        timestamp=found.created_at,
        command_id=found.id,
        status=STATUS[found.state],
    )


def _instant(field: str, text: str) -> int:
    """The first whole millisecond at or after an ISO 8601 time, as Unix time. A bare date means its midnight
    in UTC.

    Raises:
        Refusal: invalid_request.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise invalid(field, "must be ISO 8601, such as 2026-03-01T00:00:00Z or 2026-03-01", text) from None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return -((_EPOCH - at) // timedelta(milliseconds=1))


routes = Router(
    "/v1/app/command",
    route_handlers=[send_app_command, app_command_history],
    before_request=authorize,
    tags=["App"],
)
