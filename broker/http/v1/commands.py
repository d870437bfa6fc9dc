"""`/v1`: creating and cancelling a command."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, delete, post
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import invalid
from broker.domain.lifecycle import CommandState
from broker.engine.commands import MAX_TTL_SEC, Order
from broker.engine.ids import check_name
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import views
from broker.http.v1.reading import (
    find,
    get_command,
    get_device_command,
    list_command_events,
    list_device_commands,
    list_types,
    shown,
)
from broker.http.v1.views import Command

CREATE = "POST /v1/devices/{device}/commands"

CommandName = Annotated[
    str,
    Meta(description="A command of the device's type.", examples=["unlock"], extra_json_schema=views.NAME),
]
IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=255, examples=["order-4711"])]
CollapseKey = Annotated[str, Meta(extra_json_schema=views.NAME)]
COLLAPSES = "Replaces the device's pending commands that have the same key: those are cancelled."
KeyHeader = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same as `idempotency_key` in a body.",
    ),
]


Wait = Annotated[
    int | None,
    QueryParameter(
        ge=1,
        le=60,
        description="Seconds to wait until the command is closed. It does not change what happens to it.",
    ),
]


class CommandBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to send."""

    type: CommandName
    params: Annotated[
        Any,
        Meta(description="The parameters of the command; `{}` if absent.", examples=[{"for_sec": 5}]),
    ] = UNSET
    idempotency_key: Annotated[
        IdempotencyKey | UnsetType,
        Meta(description="A repeated request with the same key returns the first command."),
    ] = UNSET
    ttl_sec: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_TTL_SEC, examples=[60])] | UnsetType | None,
        Meta(description="Seconds until it expires. Absent: the broker's default (300 s); null: never."),
    ] = UNSET
    collapse_key: Annotated[CollapseKey | UnsetType, Meta(description=COLLAPSES)] = UNSET


@post(
    "/devices/{device:str}/commands",
    status_code=201,
    opt=needs("devices:write"),
    responses=documented(404, 409, 410, 413, 415, 429),
    tags=["Commands"],
)
async def create_command(
    request: Call,
    device: FromPath[str],
    data: JSONBody[CommandBody],
    idempotency_key: KeyHeader = None,
    wait: Wait = None,
) -> Response[Command]:
    """Send a command

    The answer comes when the command is durable, whether the device is online or not. It shows the command
    as it was created. A repeated request with the same idempotency key and the same body gets 200 with the
    first command and the header `Idempotent-Replayed: true`.

    With `wait` the answer comes when the command is closed (201, or 200 if repeated), or after that time with
    202: it is still open then. It shows the command as it is at that moment.
    """
    commands, caller = request.services.commands, request.user
    key = one_key(data.idempotency_key, idempotency_key)
    fingerprint = b""
    if key is not None:
        await commands.ready([device], project=caller.project)
        same = fingerprints(CREATE, msgspec.structs.replace(data, idempotency_key=UNSET))
        fingerprint = same(commands.device(caller, device).id)
    order = Order(
        device=device,
        type=data.type,
        params=data.params,
        ttl_sec=request.services.limits.default_ttl_sec if data.ttl_sec is UNSET else data.ttl_sec,
        idempotency_key=key,
        fingerprint=fingerprint,
        collapse_key=collapse_key(data.collapse_key),
    )
    accepted = await commands.create(caller, order)
    state = accepted.state if wait is None else await closed(request, accepted.state, wait)
    status = 202 if wait is not None and not state.closed else 200 if accepted.replayed else 201
    headers = {"Idempotent-Replayed": "true"} if accepted.replayed else None
    return Json(shown(request, state), status_code=status, headers=headers)


@delete(
    "/devices/{device:str}/commands/{command_id:str}",
    status_code=200,
    opt=needs("devices:write"),
    responses=documented(404, 409),
    tags=["Commands"],
)
async def cancel_command(request: Call, device: FromPath[str], command_id: FromPath[str]) -> Command:
    """Cancel a command

    Possible only while `state` is `pending`: the command was never handed over. Later the answer is 409 and
    names the state, even if `status` is still `pending`. Cancelling a cancelled command gets 200.
    """
    await find(request, command_id, device)
    return shown(request, await request.services.commands.cancel(request.user, command_id))


def one_key(body: str | UnsetType, header: str | None) -> str | None:
    """The idempotency key of a request, from its body or its header.

    Raises:
        Refusal: invalid_request, if body and header differ, or the header is not UTF-8.
    """
    if header is not None:
        try:
            # Litestar reads headers as Latin-1, but a key in a body is UTF-8; both must compare equal.
            header = header.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise invalid("Idempotency-Key", "is not UTF-8") from None
    if body is UNSET:
        return header
    if header is not None and header != body:
        raise invalid("idempotency_key", "differs from the key in the header Idempotency-Key")
    return body


async def closed(request: Call, state: CommandState, sec: int) -> CommandState:
    """The command when it is closed, or as it is after `sec` seconds."""
    waits = request.services.waits
    return await waits.closed(request.user, state, sec, lambda: find(request, state.id))


def collapse_key(given: str | UnsetType) -> str | None:
    """The collapse key of a request, or None.

    Raises:
        Refusal: invalid_request, if it is not a name.
    """
    key = None if given is UNSET else given
    check_name("collapse_key", key)
    return key


def fingerprints(route: str, body: msgspec.Struct) -> Callable[[str], bytes]:
    """Returns a function from device id to SHA-256 digest (32 bytes). Two requests are the same if the
    digests are equal.

    The digest covers the route, the device id, and the digest of the body as sent, before defaults. The body
    is encoded again with sorted fields, so white space and the order of fields do not matter. The caller
    leaves the idempotency key and the device names out of `body`.
    """
    # The body is hashed once, not once per device: a fan-out has up to 10,000.
    hashed = hashlib.sha256(msgspec.json.encode(body, order="sorted")).digest()
    return lambda device_id: hashlib.sha256(b"\0".join([route.encode(), device_id.encode(), hashed])).digest()


routes = Router(
    "/v1",
    route_handlers=[
        create_command,
        list_device_commands,
        get_device_command,
        cancel_command,
        get_command,
        list_command_events,
        list_types,
    ],
    before_request=authorize,
)
