"""`/v1/devices/{device}`: heartbeat, claim, and reports: how commands reach devices without MQTT.

Whoever may write to a device may relay to it; a device's own token is good for that device alone, which may
call itself `me`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, get, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.lifecycle import CommandState
from broker.engine.pull import Fetched
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import views
from broker.http.v1.devices import check_levels
from broker.http.v1.views import Command

OPTIONS = needs("devices:write", device=True)


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    """What was due, in order of creation. Each is held for whoever asked until its lease ends."""

    commands: Annotated[list[Command], Meta(description="Each with a fresh `grant_token`.")]


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What was due, in order of creation."""

    status: Literal["ok"] = "ok"
    commands: Annotated[list[Command], Meta(description="As for a relay; only of types that use it.")]


class AckBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing is asked for."""


class ResultBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of a command."""

    status: Literal["executed", "failed"]
    result: Annotated[Any, Meta(description="Of an executed one: kept as an object.")] = UNSET
    error: Annotated[
        dict[str, Any] | str | UnsetType | None,
        Meta(description="Of a failed one: `{code, message, details?}`, or a text."),
    ] = UNSET


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
    """Say that a device lives

    Answers with the commands that are due to it, if its type takes them this way. Whatever fields the body
    has (`battery_percent`, …) are kept among the attributes of the device.
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

    For a relay, such as a phone next to a BLE device: hands over what is due, under a lease. While it runs
    the same commands are given again, and nobody else gets them. When it ends without an answer they are due
    again. Commands that may be sent only once are given once.
    """
    return await _claim(request, device)


@get("/{device:str}/commands/pending", opt=OPTIONS, responses=documented(404), tags=["Commands"])
async def pending_commands(request: Call, device: FromPath[str]) -> Fetch:
    """Claim commands, by GET

    The same as `claim`: what it answers counts as handed over.
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
    """Report that the device has a command

    It is not handed over again. For the device itself, or for a relay of what went by heartbeat or relay.
    """
    return _shown(
        request, await request.services.pull.report(request.user, device, command_id, "acknowledged")
    )


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
    """Report what became of a command

    The same report again answers 200. Another one than the first is 409, and so is one for a command that
    was never handed over.
    """
    result, error = (None if value is UNSET else value for value in (data.result, data.error))
    pull = request.services.pull
    return _shown(request, await pull.report(request.user, device, command_id, data.status, result, error))


async def _claim(request: Call, device: str) -> Fetch:
    found = await request.services.pull.fetch(request.user, device, "relay")
    return Fetch(commands=[_handed(fetched) for fetched in found])


def _handed(fetched: Fetched) -> Command:
    return views.command(fetched.state, fetched.grant)


def _shown(request: Call, state: CommandState) -> Command:
    """With a grant: whoever may report may have it."""
    services = request.services
    return views.command(state, services.grants.shown(state, services.commands.writer.now()))


routes = Router(
    "/v1/devices",
    route_handlers=[heartbeat, claim_commands, pending_commands, acknowledge_command, report_result],
    before_request=authorize,
)
