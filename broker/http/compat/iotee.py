"""The unversioned paths: the API of iotee systems, with its field names and status words.

They show the same commands as `/v1`, with the same ids, and decide nothing themselves. Only these paths can
erase commands.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from litestar import Response, Router, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import Refusal, invalid
from broker.domain.lifecycle import CommandState, State
from broker.engine.commands import Order
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import views
from broker.http.v1.commands import CommandName, KeyHeader, one_key
from broker.http.v1.devices import find_device
from broker.http.v1.events import WholeDays
from broker.http.v1.reading import find
from broker.http.v1.repairs import MAY_REPEAT
from broker.http.v1.views import CommandError, Time
from broker.seams import Sql
from devices.clock import rfc3339
from projections import commands as commands_view
from projections.commands import Filter

CREATE = "POST /devices/{device}/commands"
MOST = 2**53 - 1

Status = Literal[
    "pending", "published", "acknowledged", "failed", "completed", "timeout", "expired", "cancelled"
]
STATUS: dict[State, Status] = {
    State.PENDING: "pending",
    State.PUBLISHED: "published",
    State.ACKNOWLEDGED: "acknowledged",
    State.FAILED: "failed",
    State.EXECUTED: "completed",
    State.TIMED_OUT: "timeout",
    State.EXPIRED: "expired",
    State.CANCELLED: "cancelled",
}
Limit = Annotated[
    int, QueryParameter(ge=1, le=1_000, description="The largest number of commands in a page.")
]
Offset = Annotated[int, QueryParameter(ge=0, le=MOST, description="The number of newest commands to skip.")]


class NewCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to send."""

    command: CommandName
    device_type: Annotated[
        views.TypeName | UnsetType,
        Meta(description="Encode the command as this device type does; absent: the device's own type."),
    ] = UNSET
    params: Annotated[
        dict[str, Any] | UnsetType,
        Meta(description="The parameters of the command.", examples=[{"for_sec": 5}]),
    ] = UNSET


class SentCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it was accepted."""

    command_id: str
    hardware_id: str
    device_id: str
    device_type: str
    topic: Annotated[str, Meta(description="The MQTT topic for this command, if it is sent by MQTT.")]
    command: str
    status: Annotated[Status, Meta(description="`timeout`: it was handed over, and no answer came in time.")]
    created_at: Time


class CommandRecord(SentCommand, frozen=True, kw_only=True):
    """A command as it is now."""

    params: Annotated[Any, Meta(description="The parameters, with all defaults filled in.")]
    published_at: Annotated[Time | None, Meta(description="When it was first handed over.")]
    acknowledged_at: Annotated[Time | None, Meta(description="When the device acknowledged it.")]
    completed_at: Annotated[Time | None, Meta(description="When the device reported that it executed it.")]
    error: CommandError | None


class Pagination(msgspec.Struct, frozen=True, kw_only=True):
    limit: int
    offset: int
    returned: Annotated[int, Meta(description="The number of commands in this answer.")]


class CommandRecords(msgspec.Struct, frozen=True, kw_only=True):
    """Commands, newest first."""

    commands: list[CommandRecord]
    pagination: Pagination


class DeletedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The command was erased."""

    success: bool
    deleted: Annotated[str, Meta(description="The command's id.")]


class Renewed(msgspec.Struct, frozen=True, kw_only=True):
    """The new command of a retry."""

    command_id: str
    status: Status
    may_repeat: Annotated[
        bool | UnsetType,
        Meta(description="Present and true if the old command timed out: the device may execute it twice."),
    ] = UNSET


class RetriedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The command was sent again as a new command."""

    success: bool
    original_command_id: str
    new_command: Renewed


class PurgeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The age of the commands to erase."""

    older_than_days: WholeDays


class PurgedCommands(msgspec.Struct, frozen=True, kw_only=True):
    """The commands were erased."""

    success: bool
    cutoff_date: Annotated[
        Time, Meta(description="Closed commands that were created before this time are erased.")
    ]
    deleted: Annotated[int, Meta(description="The number of erased commands.")]


@post(
    "/devices/{device:str}/commands",
    status_code=201,
    opt=needs("devices:write"),
    responses=documented(404, 409, 410, 413, 415, 429),
)
async def send_device_command(
    request: Call, device: FromPath[str], data: JSONBody[NewCommand], idempotency_key: KeyHeader = None
) -> Response[SentCommand]:
    """Send a command to a device

    It expires only if the device's type sets an expiry. A repeated request with the same idempotency key and
    the same body gets 200 with the first command and the header `Idempotent-Replayed: true`.
    """
    commands, caller = request.services.commands, request.user
    key, fingerprint = one_key(UNSET, idempotency_key), b""
    if key is not None:
        await commands.ready([device], project=caller.project)
        device_id = commands.device(caller, device).id
        body = msgspec.json.encode(data, order="sorted")
        fingerprint = hashlib.sha256(b"\0".join([CREATE.encode(), device_id.encode(), body])).digest()
    order = Order(
        device=device,
        type=data.command,
        params=data.params,
        device_type=None if data.device_type is UNSET else data.device_type,
        idempotency_key=key,
        fingerprint=fingerprint,
    )
    try:
        accepted = await commands.create(caller, order)
    except Refusal as error:
        details = error.details or {}
        if details.get("field") == "type":  # this API calls the field `command`
            raise invalid("command", details["reason"]) from error
        raise
    sent = _sent(accepted.state)
    if accepted.replayed:
        return Json(sent, status_code=200, headers={"Idempotent-Replayed": "true"})
    return Json(sent)


@get("/devices/{device:str}/commands", opt=needs("devices:read"), responses=documented(404))
async def list_commands_of_device(
    request: Call, device: FromPath[str], limit: Limit = 100, offset: Offset = 0
) -> CommandRecords:
    """List the commands of a device

    Newest first. The `offset` counts from the newest command, so pages shift while new commands arrive.
    """
    caller = request.user

    async def work(sql: Sql) -> list[CommandState]:
        wanted = Filter(project=caller.project, device_id=(await find_device(sql, caller, device)).id)
        return await commands_view.newest(sql, wanted, limit, offset)

    return _records(await request.services.commands.writer.storage.read(work), limit, offset)


@get("/commands", opt=needs("admin"), responses=documented())
async def list_all_commands(request: Call, limit: Limit = 100, offset: Offset = 0) -> CommandRecords:
    """List the commands of all devices

    Newest first, of all projects.
    """
    wanted = Filter(project=request.user.project)
    storage = request.services.commands.writer.storage
    found = await storage.read(lambda sql: commands_view.newest(sql, wanted, limit, offset))
    return _records(found, limit, offset)


@get("/commands/{command_id:str}", opt=needs("devices:read"), responses=documented(404))
async def get_command_record(request: Call, command_id: FromPath[str]) -> CommandRecord:
    """Read a command by its id

    Ids are the same as under `/v1`.
    """
    return _record(await find(request, command_id))


@delete("/commands/{command_id:str}", status_code=200, opt=needs("admin"), responses=documented(404, 409))
async def delete_command(request: Call, command_id: FromPath[str]) -> DeletedCommand:
    """Erase a command

    A pending command is cancelled first; 409 while the command is with the device. After the answer nobody
    can read it. Its parameters and results are erased from the log, and an `erased` event records this.
    """
    await request.services.erasures.delete(request.user, command_id)
    return DeletedCommand(success=True, deleted=command_id)


@post(
    "/commands/{command_id:str}/retry",
    status_code=200,
    opt=needs("admin"),
    responses=documented(404, 409, 410, 413, 429),
)
async def send_again(
    request: Call, command_id: FromPath[str], idempotency_key: KeyHeader = None
) -> Response[RetriedCommand]:
    """Send a command again

    Creates a new command from one that failed, timed out, expired or was cancelled. 409 if the command is in
    any other state.
    """
    key = one_key(UNSET, idempotency_key)
    accepted = await request.services.repairs.retry(request.user, command_id, key)
    old = request.services.commands.live.command(command_id)
    may_repeat = old is not None and old.state in MAY_REPEAT
    retried = RetriedCommand(
        success=True,
        original_command_id=command_id,
        new_command=Renewed(
            command_id=accepted.state.id,
            status=STATUS[accepted.state.state],
            may_repeat=may_repeat or UNSET,
        ),
    )
    return Json(retried, headers={"Idempotent-Replayed": "true"} if accepted.replayed else None)


@post("/commands/purge", status_code=200, opt=needs("admin"), responses=documented(413, 415))
async def purge_commands(request: Call, data: JSONBody[PurgeBody]) -> PurgedCommands:
    """Erase all old commands

    Erases the closed commands of all projects that were created before midnight (UTC), `older_than_days` days
    ago. After the answer nobody can read them. The erasing itself can take minutes and continues after a
    restart.
    """
    purged = await request.services.erasures.purge(request.user, data.older_than_days)
    return PurgedCommands(success=True, cutoff_date=rfc3339(purged.cutoff), deleted=purged.amount)


def _sent(state: CommandState) -> SentCommand:
    return SentCommand(
        command_id=state.id,
        hardware_id=state.hardware_id,
        device_id=state.device_id,
        device_type=state.device_type,
        topic=state.topic,
        command=state.type,
        status=STATUS[state.state],
        created_at=rfc3339(state.created_at),
    )


def _record(state: CommandState) -> CommandRecord:
    return CommandRecord(
        **msgspec.structs.asdict(_sent(state)),
        params=state.params,
        published_at=views.time(state.published_at),
        acknowledged_at=views.time(state.acknowledged_at),
        completed_at=views.time(state.executed_at),
        error=views.error(state),
    )


def _records(found: list[CommandState], limit: int, offset: int) -> CommandRecords:
    return CommandRecords(
        commands=[_record(state) for state in found],
        pagination=Pagination(limit=limit, offset=offset, returned=len(found)),
    )


routes = Router(
    "/",
    route_handlers=[
        send_device_command,
        list_commands_of_device,
        list_all_commands,
        get_command_record,
        delete_command,
        send_again,
        purge_commands,
    ],
    before_request=authorize,
    tags=["Unversioned"],
)
