"""`/v1/devices/{device}`: heartbeat, claim and reports. Commands reach devices without MQTT this way.

A key with `devices:write` may relay commands to a device. A device's own token is valid only for that device;
the device may use `me` as its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, get, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import invalid
from broker.domain.lifecycle import CommandState
from broker.engine.pull import Fetched
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import views
from broker.http.v1.devices import check_levels
from broker.http.v1.views import Command
from devices.wire import MAX_ANSWER_BYTES

OPTIONS = needs("devices:write", device=True)


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    """The commands that were due, in order of creation. Each is leased to the caller until its lease ends."""

    commands: Annotated[list[Command], Meta(description="Each command has a fresh `grant_token`.")]


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The commands that were due, in order of creation."""

    status: Literal["ok"] = "ok"
    commands: Annotated[
        list[Command],
        Meta(description="As for `claim`; empty if the device's type does not use heartbeats."),
    ]


Signed = Annotated[
    str,
    Meta(
        max_length=MAX_ANSWER_BYTES,
        description="The answer as the device signed it (a JWS), if its type has signed answers. Then "
        "`result` and `error` must be absent.",
    ),
]


class AckBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Empty, or the device's signed answer."""

    signed: Signed | UnsetType = UNSET


class ResultBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcome of a command."""

    status: Literal["executed", "failed"]
    result: Annotated[Any, Meta(description="For `executed`: the result; stored as an object.")] = UNSET
    error: Annotated[
        dict[str, Any] | str | UnsetType | None,
        Meta(description="For `failed`: `{code, message, details?}`, or a text."),
    ] = UNSET
    signed: Signed | UnsetType = UNSET


@post(
    "/{device:str}/heartbeat",
    status_code=200,
    opt=OPTIONS,
    responses=documented(404, 413, 415),
    tags=["Devices"],
)
async def heartbeat(
    request: Call, device: FromPath[str], data: JSONBody[dict[str, Any] | None] = None
) -> Heartbeat:
    """Send a heartbeat of a device

    The answer contains the commands that are due, if the device's type receives commands by heartbeat. The
    fields of the body (`battery_percent`, …) are stored in the device's attributes.
    """
    if data:
        check_levels(data)
    found = await request.services.pull.fetch(request.user, device, "heartbeat", data)
    return Heartbeat(commands=[_handed(fetched) for fetched in found])


@post(
    "/{device:str}/commands/claim", status_code=200, opt=OPTIONS, responses=documented(404), tags=["Commands"]
)
async def claim_commands(request: Call, device: FromPath[str]) -> Fetch:
    """Claim commands for a device nearby

    For a relay, such as a phone next to a BLE device. The commands that are due are handed over under a
    lease. While the lease runs, a repeated call by the same caller gets the same commands, and no other
    caller gets them. If the lease ends without an answer, the commands are due again. A command that may be
    sent only once is returned only once.
    """
    return await _claim(request, device)


@get("/{device:str}/commands/pending", opt=OPTIONS, responses=documented(404), tags=["Commands"])
async def pending_commands(request: Call, device: FromPath[str]) -> Fetch:
    """Claim commands, by GET

    The same as `claim`: the returned commands count as handed over.
    """
    return await _claim(request, device)


@post(
    "/{device:str}/commands/{command_id:str}/ack",
    status_code=200,
    opt=OPTIONS,
    responses=documented(404, 409, 413, 415),
    tags=["Commands"],
)
async def acknowledge_command(
    request: Call, device: FromPath[str], command_id: FromPath[str], data: JSONBody[AckBody | None] = None
) -> Command:
    """Report that the device has received a command

    The command is then not handed over again. The device may report for all its commands; other keys only
    for commands that were handed over by heartbeat or relay.
    """
    signed = None if data is None or data.signed is UNSET else data.signed
    pull = request.services.pull
    return _shown(request, await pull.report(request.user, device, command_id, "acknowledged", signed=signed))


@post(
    "/{device:str}/commands/{command_id:str}/result",
    status_code=200,
    opt=OPTIONS,
    responses=documented(404, 409, 413, 415),
    tags=["Commands"],
)
async def report_result(
    request: Call, device: FromPath[str], command_id: FromPath[str], data: JSONBody[ResultBody]
) -> Command:
    """Report the outcome of a command

    Repeating the same report gets 200. A report that differs from the first one gets 409, and so does a
    report for a command that was never handed over.
    """
    result, error = (None if value is UNSET else value for value in (data.result, data.error))
    signed = None if data.signed is UNSET else data.signed
    if signed is not None and (data.result is not UNSET or data.error is not UNSET):
        raise invalid("signed", "it has the result or the error: leave those out")
    report = request.services.pull.report
    return _shown(request, await report(request.user, device, command_id, data.status, result, error, signed))


async def _claim(request: Call, device: str) -> Fetch:
    found = await request.services.pull.fetch(request.user, device, "relay")
    return Fetch(commands=[_handed(fetched) for fetched in found])


def _handed(fetched: Fetched) -> Command:
    return views.command(fetched.state, fetched.grant)


def _shown(request: Call, state: CommandState) -> Command:
    """A command with its grant: a caller that may report on the command may also have its grant."""
    services = request.services
    return views.command(state, services.grants.shown(state, services.commands.writer.now()))


routes = Router(
    "/v1/devices",
    route_handlers=[heartbeat, claim_commands, pending_commands, acknowledge_command, report_result],
    before_request=authorize,
)
