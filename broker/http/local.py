"""Routes for the operator of this machine: API keys, grant signing keys, publishing an event again, and
what a purge would erase.

Only the app on the private socket has these routes.
"""

from __future__ import annotations

import msgspec
from litestar import Router, get, post
from litestar.params import FromPath, JSONBody

from broker.engine.grants import GrantKey
from broker.http.compat.iotee import PurgeBody
from broker.http.edge.auth import Call, authorize, needs
from broker.http.v1 import keys
from broker.http.v1.views import Time
from devices.clock import rfc3339


class GrantKeyView(msgspec.Struct, frozen=True, kw_only=True):
    kid: str
    signing: bool
    created_at: Time
    retired_at: Time | None


class GrantKeyList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[GrantKeyView]
    has_more: bool = False
    next_cursor: str | None = None


@get("/grants")
async def list_grant_keys(request: Call) -> GrantKeyList:
    return GrantKeyList(data=[_grant_key(request, key) for key in request.services.grants.all()])


@post("/grants/rotate", status_code=201)
async def rotate_grant_key(request: Call) -> GrantKeyView:
    return _grant_key(request, await request.services.grants.rotate(request.user.actor))


@post("/grants/{kid:str}/retire", status_code=200)
async def retire_grant_key(request: Call, kid: FromPath[str]) -> GrantKeyView:
    return _grant_key(request, await request.services.grants.retire(kid, request.user.actor))


class EventBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    position: int


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """`topic`: where the event was published; null if it is not an event of a command, which has no topic."""

    topic: str | None


@post("/events/publish", status_code=200)
async def publish_event(request: Call, data: JSONBody[EventBody]) -> EventView:
    return EventView(topic=await request.services.mqtt_events.again(data.position))


class PreviewView(msgspec.Struct, frozen=True, kw_only=True):
    """What a purge would erase: `commands` closed commands, all created before `cutoff_date`."""

    cutoff_date: Time
    commands: int


@post("/purge/preview", status_code=200)
async def preview_purge(request: Call, data: JSONBody[PurgeBody]) -> PreviewView:
    found = await request.services.erasures.purgeable(data.older_than_days)
    return PreviewView(cutoff_date=rfc3339(found.cutoff), commands=found.amount)


def _grant_key(request: Call, key: GrantKey) -> GrantKeyView:
    return GrantKeyView(
        kid=key.kid,
        signing=key is request.services.grants.signing,
        created_at=rfc3339(key.created_at),
        retired_at=None if key.retired_at is None else rfc3339(key.retired_at),
    )


routes = Router(
    "/local",
    route_handlers=[
        *keys.HANDLERS,
        list_grant_keys,
        rotate_grant_key,
        retire_grant_key,
        publish_event,
        preview_purge,
    ],
    before_request=authorize,
    opt=needs("admin"),
)
