"""`/v1`: one command to many devices, each with an outcome of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from litestar import Response, Router, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import Refusal
from broker.engine import fanout
from broker.engine.commands import Order
from broker.engine.registry import check_name
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import ErrorDetail, documented, error_body
from broker.http.edge.services import Services
from broker.http.v1.commands import CommandBody, KeyHeader, collapse_key, fingerprints, list_commands, one_key

ROUTE = "POST /v1/commands"
MOST_DEVICES = 10_000
BODY_BYTES = 4_194_304  # ten thousand names of 64 characters, and the parameters

Devices = Annotated[list[str], Meta(min_length=1, max_length=MOST_DEVICES, examples=[["door-7", "door-8"]])]


class FanoutBody(CommandBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    devices: Annotated[Devices, Meta(description="Ids or hardware ids, at most 10,000; each device once.")]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it for one device: one of the two."""

    command_id: Annotated[
        str | UnsetType, Meta(description="`cmd_…`: accepted, now or by the first request.")
    ] = UNSET
    error: Annotated[ErrorDetail | UnsetType, Meta(description="Why there is no command.")] = UNSET


@post(
    "/commands",
    status_code=200,
    opt=needs("devices:write", body_bytes=BODY_BYTES),
    responses=documented(413, 415),
    tags=["Commands"],
)
async def send_commands(
    request: Call, data: JSONBody[FanoutBody], idempotency_key: KeyHeader = None
) -> Response[dict[str, Outcome]]:
    """Send a command to many devices

    The answer has one member for each device, by the name it was asked for; one that cannot be sent to
    never fails the rest. Repeated with the same idempotency key it names the commands that were made and
    makes those that were not: also for devices that are new in the list.
    """
    services = request.services
    check_name("type", data.type)
    order = Order(
        device="",
        type=data.type,
        params=data.params,
        ttl_sec=services.limits.default_ttl_sec if data.ttl_sec is UNSET else data.ttl_sec,
        idempotency_key=one_key(data.idempotency_key, idempotency_key),
        collapse_key=collapse_key(data),
    )
    same = fingerprints(ROUTE, msgspec.structs.replace(data, devices=UNSET, idempotency_key=UNSET))
    found = await services.fanout.send(request.user, data.devices, order, same)
    count_refusals(services, found)
    return Json({name: _sent(outcome) for name, outcome in found.items()})


def count_refusals(services: Services, found: Mapping[str, fanout.Outcome]) -> None:
    for outcome in found.values():
        if isinstance(outcome, Refusal):
            services.metrics.refused(outcome.kind)


def _sent(outcome: fanout.Outcome) -> Outcome:
    if isinstance(outcome, Refusal):
        return Outcome(error=error_body(outcome.kind, outcome.message, outcome.details).error)
    return Outcome(command_id=outcome)


# Both methods of one path must be in one router.
routes = Router("/v1", route_handlers=[send_commands, list_commands], before_request=authorize)
