"""`/v1`: sends one command to many devices. Each device has its own outcome."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, TypeVar

import msgspec
from litestar import Response, Router, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import Refusal
from broker.engine import fanout
from broker.engine.commands import Order
from broker.engine.ids import check_name
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import ErrorDetail, documented, error_body
from broker.http.edge.services import Services
from broker.http.v1.commands import CommandBody, KeyHeader, collapse_key, fingerprints, one_key
from broker.http.v1.reading import list_commands

T = TypeVar("T")

AT_ONCE = 500
ROUTE = "POST /v1/commands"
MOST_DEVICES = 10_000
BODY_BYTES = 4_194_304  # enough for 10,000 names of 64 characters and the parameters

Devices = Annotated[list[str], Meta(min_length=1, max_length=MOST_DEVICES, examples=[["door-7", "door-8"]])]


class FanoutBody(CommandBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    devices: Annotated[
        Devices, Meta(description="At most 10,000 ids or hardware ids; each device only once.")
    ]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome for one device: either `command_id` or `error`."""

    command_id: Annotated[
        str | UnsetType,
        Meta(description="`cmd_…`: the command, accepted now or by an earlier request with the same key."),
    ] = UNSET
    error: Annotated[ErrorDetail | UnsetType, Meta(description="The reason why no command was created.")] = (
        UNSET
    )


@post(
    "/commands",
    status_code=200,
    opt=needs("devices:write", body_bytes=BODY_BYTES, many="devices"),
    responses=documented(413, 415),
    tags=["Commands"],
)
async def send_commands(
    request: Call, data: JSONBody[FanoutBody], idempotency_key: KeyHeader = None
) -> Response[dict[str, Outcome]]:
    """Send a command to many devices

    The answer has one member for each device, under the name from the request. An error for one device does
    not affect the others. A repeated request with the same idempotency key returns the commands that exist
    and creates the missing ones, also for devices that were added to the list.
    """
    services = request.services
    check_name("type", data.type)
    order = Order(
        device="",
        type=data.type,
        params=data.params,
        ttl_sec=services.limits.default_ttl_sec if data.ttl_sec is UNSET else data.ttl_sec,
        idempotency_key=one_key(data.idempotency_key, idempotency_key),
        collapse_key=collapse_key(data.collapse_key),
    )
    same = fingerprints(ROUTE, msgspec.structs.replace(data, devices=UNSET, idempotency_key=UNSET))
    found = await services.fanout.send(request.user, data.devices, order, same)
    return Json(await answers(services, found, _sent))


async def answers(
    services: Services, found: Mapping[str, fanout.Outcome], shown: Callable[[fanout.Outcome], T]
) -> dict[str, T]:
    """The answer for each device. Counts the refusals. Other requests run in between: it can be long."""
    refused = Counter(outcome.kind for outcome in found.values() if isinstance(outcome, Refusal))
    for kind, count in refused.items():
        services.metrics.refused(kind, count)
    made: dict[str, T] = {}
    for number, (name, outcome) in enumerate(found.items(), 1):
        made[name] = shown(outcome)
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
    return made


def _sent(outcome: fanout.Outcome) -> Outcome:
    if isinstance(outcome, Refusal):
        return Outcome(error=error_body(outcome.kind, outcome.message, outcome.details).error)
    return Outcome(command_id=outcome)


# Litestar needs both methods of a path in one router.
routes = Router("/v1", route_handlers=[send_commands, list_commands], before_request=authorize)
