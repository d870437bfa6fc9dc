"""`/v1/keys`: admins create, list and revoke API keys."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Router, delete, get, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.engine.keys import SCOPES, Key
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1.devices import Title
from broker.http.v1.views import Name, Time
from devices.clock import rfc3339

Scope = Annotated[str, Meta(extra_json_schema={"enum": list(SCOPES)})]


class KeyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key to create."""

    project: Annotated[Name, Meta(description="A new name creates the project.", examples=["acme"])]
    scopes: Annotated[
        tuple[Scope, ...],
        Meta(description="`admin` is all scopes in all projects.", examples=[["devices:read"]], min_length=1),
    ]
    name: Annotated[Title | None, Meta(description="What it is for.", examples=["night shift"])] = None


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """An API key. `key` is the secret. Only the answer that created the key contains it."""

    id: str
    project: str
    scopes: tuple[str, ...]
    name: str | None
    created_at: Time
    revoked_at: Time | None
    key: Annotated[str | UnsetType, Meta(description="`sk_live_…`. Shown once.")] = UNSET


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    """All keys of all projects, the oldest first."""

    data: list[KeyView]
    has_more: bool = False
    next_cursor: str | None = None


@post("/keys", status_code=201, opt=needs("admin"), responses=documented(413, 415))
async def create_key(request: Call, data: JSONBody[KeyBody]) -> KeyView:
    """Create an API key

    A key of a new project creates the project. The secret is shown only once.
    """
    key, secret = await request.services.keys.create(data.project, data.scopes, data.name)
    return _shown(key, secret)


@get("/keys", opt=needs("admin"), responses=documented())
async def list_keys(request: Call) -> KeyList:
    """List API keys

    All keys, revoked ones too, without their secrets.
    """
    return KeyList(data=[_shown(key) for key in request.services.keys.all()])


@delete("/keys/{key_id:str}", status_code=200, opt=needs("admin"), responses=documented(404))
async def revoke_key(request: Call, key_id: FromPath[str]) -> KeyView:
    """Revoke an API key

    Requests with this key are refused at once and its event streams end. Its commands are not affected. A
    second call changes nothing.
    """
    return _shown(await request.services.keys.revoke(key_id))


def _shown(key: Key, secret: str | UnsetType = UNSET) -> KeyView:
    return KeyView(
        id=key.id,
        project=key.project,
        scopes=key.scopes,
        name=key.name,
        created_at=rfc3339(key.created_at),
        revoked_at=None if key.revoked_at is None else rfc3339(key.revoked_at),
        key=secret,
    )


HANDLERS = [create_key, list_keys, revoke_key]
routes = Router("/v1", route_handlers=HANDLERS, before_request=authorize, tags=["System"])
