"""`/v1`: retry a command, cancel many commands, abandon a command, explain a command.

The engine decides which commands may be retried or cancelled. Nothing in this module refuses a request
because of a command's state.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Response, Router, get, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import invalid
from broker.domain.explain import Explanation
from broker.domain.lifecycle import CommandState, State
from broker.domain.said import Said, with_answers
from broker.engine.ids import check_name
from broker.engine.repairs import Which
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import unmatched
from broker.http.v1.commands import IdempotencyKey, KeyHeader, one_key
from broker.http.v1.past import find_command
from broker.http.v1.reading import find, shown
from broker.http.v1.views import Command, Name
from broker.seams import Sql

# A retried command in one of these states had timed out before: a late answer can move it to the other two.
# Its device may have received it, so the retry can repeat it.
MAY_REPEAT = (State.TIMED_OUT, State.ACKNOWLEDGED, State.EXECUTED)


class RetryBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a retry."""

    idempotency_key: Annotated[
        IdempotencyKey | UnsetType,
        Meta(description="A repeated request with the same key returns the first retry."),
    ] = UNSET


class Retried(Command, frozen=True, kw_only=True):
    """The new command of a retry."""

    may_repeat: Annotated[
        bool,
        Meta(
            description="True if the old command timed out: the device may have executed it, or may still be "
            "executing it."
        ),
    ]


class AbandonBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reason to abandon a command."""

    reason: Annotated[
        Annotated[str, Meta(max_length=200)] | None,
        Meta(description="Stored in the event.", examples=["the door was replaced"]),
    ] = None


class CancelBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters that select the commands to cancel; a command must match all of them. Without any filter, `all`
    must be true."""

    device: Annotated[
        Name | None, Meta(description="The device's id or hardware id.", examples=["door-7"])
    ] = None
    type: Annotated[Name | None, Meta(description="The name of the commands.")] = None
    created_by: Annotated[str | None, Meta(description="The id of the key that created the commands.")] = None
    all: Annotated[bool, Meta(description="Must be true to cancel without any filter.")] = False
    reason: Annotated[
        Annotated[str, Meta(max_length=200)] | None,
        Meta(description="Stored in the events.", examples=["the key was stolen"]),
    ] = None


class CancelledCommands(msgspec.Struct, frozen=True, kw_only=True):
    """The cancelled commands."""

    cancelled: Annotated[list[str], Meta(description="Their ids, in order of creation.")]
    count: int


@post(
    "/devices/{device:str}/commands/{command_id:str}/retry",
    status_code=201,
    opt=needs("devices:write"),
    responses=documented(404, 409, 410, 413, 415, 429),
)
async def retry_device_command(
    request: Call,
    device: FromPath[str],
    command_id: FromPath[str],
    data: JSONBody[RetryBody | None] = None,
    idempotency_key: KeyHeader = None,
) -> Response[Retried]:
    """Retry a command of a device

    Creates a new command from one that failed, timed out, expired or was cancelled. It goes to the end of
    the lane and has the same time to live as the old one, counted from now. 409 if the command is in any
    other state, or if the device was deleted.
    """
    await find(request, command_id, device)
    return await _retry(request, command_id, data, idempotency_key)


@post(
    "/commands/{command_id:str}/retry",
    status_code=201,
    opt=needs("devices:write"),
    responses=documented(404, 409, 410, 413, 415, 429),
)
async def retry_command(
    request: Call,
    command_id: FromPath[str],
    data: JSONBody[RetryBody | None] = None,
    idempotency_key: KeyHeader = None,
) -> Response[Retried]:
    """Retry a command

    The same as `POST /v1/devices/{device}/commands/{command_id}/retry`, without naming the device.
    """
    return await _retry(request, command_id, data, idempotency_key)


@post(
    "/commands/cancel",
    status_code=200,
    opt=needs("devices:write"),
    responses=documented(404, 413, 415),
)
async def cancel_commands(request: Call, data: JSONBody[CancelBody]) -> CancelledCommands:
    """Cancel many commands

    Cancels every command that matches the filters and was never handed over. Other commands do not change.
    Without a filter, `all` must be true.
    """
    filters = (data.device, data.type, data.created_by)
    if filters == (None, None, None) and not data.all:
        raise invalid("all", "must be true if neither device, type nor created_by is given")
    if filters != (None, None, None) and data.all:
        raise invalid("all", "cannot be combined with device, type or created_by")
    check_name("device", data.device)
    check_name("type", data.type)
    created_by = data.created_by
    if created_by is not None and ":" not in created_by:
        created_by = f"key:{created_by}"
    which = Which(device=data.device, type=data.type, created_by=created_by)
    ids = await request.services.repairs.cancel_many(request.user, which, data.reason)
    return CancelledCommands(cancelled=ids, count=len(ids))


@post(
    "/commands/{command_id:str}/abandon",
    status_code=200,
    opt=needs("devices:write"),
    responses=documented(404, 409, 413, 415),
)
async def abandon_command(
    request: Call, command_id: FromPath[str], data: JSONBody[AbandonBody | None] = None
) -> Command:
    """Give up waiting for a command

    Ends a command that was handed over and can no longer be cancelled: it becomes `timed_out`. The device may
    still execute it, and a late answer still corrects the state.
    """
    reason = None if data is None else data.reason
    return shown(request, await request.services.commands.abandon(request.user, command_id, reason))


@get("/commands/{command_id:str}/explain", opt=needs("devices:read"), responses=documented(404))
async def explain_command(request: Call, command_id: FromPath[str]) -> Explanation:
    """Explain a command

    The reason for its current state, and what happens next.
    """
    services, caller = request.services, request.user
    writer = services.commands.writer

    async def work(sql: Sql) -> tuple[CommandState, list[Said]]:
        state = await find_command(sql, caller, command_id)
        return state, (await unmatched.of_command(sql, state))

    state, said = await writer.storage.read(work)
    explanation = with_answers(await services.dispatch.explain(state), said)
    await writer.barrier()
    return explanation


async def _retry(
    request: Call, command_id: str, data: RetryBody | None, header: str | None
) -> Response[Retried]:
    services = request.services
    key = one_key(UNSET if data is None else data.idempotency_key, header)
    accepted = await services.repairs.retry(request.user, command_id, key)
    old = services.commands.live.command(command_id)
    fields = msgspec.structs.asdict(shown(request, accepted.state))
    retried = Retried(**fields, may_repeat=old is not None and old.state in MAY_REPEAT)
    if accepted.replayed:
        return Json(retried, status_code=200, headers={"Idempotent-Replayed": "true"})
    return Json(retried)


routes = Router(
    "/v1",
    route_handlers=[retry_device_command, retry_command, cancel_commands, abandon_command, explain_command],
    before_request=authorize,
    tags=["Commands"],
)
