"""`/v1/keys`: admins create, list and revoke API keys."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from litestar import Router, delete, get, post
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import invalid
from broker.domain.fleet import DeviceSet
from broker.engine.keys import SCOPES, Key, Keys, Terms
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1.devices import Title
from broker.http.v1.views import Name, Time, time
from devices.clock import parse_rfc3339, rfc3339

Scope = Annotated[str, Meta(extra_json_schema={"enum": list(SCOPES)})]

MOST_EXPIRY_SEC = 3_153_600_000
Rate = Annotated[
    Annotated[int, Meta(ge=0, le=1_000_000_000)] | None,
    Meta(description="The key's own limit. 0: no limit. Null: the limit in the settings.", examples=[600]),
]


class KeyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key to create."""

    project: Annotated[Name, Meta(description="A new name creates the project.", examples=["acme"])]
    scopes: Annotated[
        tuple[Scope, ...],
        Meta(
            description="`admin` has all scopes, in all projects.", examples=[["devices:read"]], min_length=1
        ),
    ]
    name: Annotated[Title | None, Meta(description="What it is for.", examples=["night shift"])] = None
    expires_at: Annotated[Time | None, Meta(description="It stops working at this time; absent: never.")] = (
        None
    )
    expires_in_sec: Annotated[
        Annotated[int, Meta(ge=1, le=MOST_EXPIRY_SEC)] | None,
        Meta(description="Instead of `expires_at`: seconds from now.", examples=[86_400]),
    ] = None
    devices: Annotated[
        tuple[Name, ...] | UnsetType,
        Meta(
            description="Limits the key to these devices, by id or hardware id; absent: all of its project.",
            examples=[["door-7"]],
        ),
    ] = UNSET
    device_prefixes: Annotated[
        tuple[Name, ...] | UnsetType,
        Meta(description="Limits the key to devices whose hardware id begins so.", examples=[["door-"]]),
    ] = UNSET
    commands_per_minute: Rate = None
    requests_per_minute: Rate = None


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """An API key. `key` is the secret. Only the answer that created the key contains it.

    A key with `devices` or `device_prefixes` sees and commands only those devices.
    """

    id: str
    project: str
    scopes: tuple[str, ...]
    name: str | None
    created_at: Time
    revoked_at: Time | None
    expires_at: Time | None
    last_used_at: Annotated[
        Time | None, Meta(description="After a crash of the broker it may be a minute older.")
    ]
    state: Annotated[
        Literal["active", "revoked", "expired", "unusable"],
        Meta(description="`unusable`: the key was made with another pepper than the broker has now."),
    ]
    devices: Annotated[list[str] | None, Meta(description="If `device_prefixes` is null too: no limit.")]
    device_prefixes: list[str] | None
    commands_per_minute: Annotated[
        int | None, Meta(description="0: no limit. Null: the limit in the settings.")
    ]
    requests_per_minute: int | None
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
    keys = request.services.keys
    key, secret = await keys.create(
        data.project, data.scopes, data.name, _terms(keys, data), request.user.actor
    )
    return _shown(keys, key, secret)


@get("/keys", opt=needs("admin"), responses=documented())
async def list_keys(request: Call) -> KeyList:
    """List API keys

    All keys, revoked ones too, without their secrets.
    """
    keys = request.services.keys
    return KeyList(data=[_shown(keys, key) for key in keys.all()])


@get("/keys/{key_id:str}", opt=needs("admin"), responses=documented(404))
async def get_key(request: Call, key_id: FromPath[str]) -> KeyView:
    """Read an API key

    Its scopes, its limits, and when it was last used.
    """
    keys = request.services.keys
    return _shown(keys, keys.get(key_id))


@delete("/keys/{key_id:str}", status_code=200, opt=needs("admin"), responses=documented(404))
async def revoke_key(request: Call, key_id: FromPath[str]) -> KeyView:
    """Revoke an API key

    Requests with this key are refused at once; its event streams, waiting requests and connections to
    Ordain's own MQTT server end. A client of an external MQTT server keeps its session until that server
    ends it. The key's commands are not affected. A second call changes nothing.
    """
    keys = request.services.keys
    return _shown(keys, await keys.revoke(key_id, request.user.actor))


def _terms(keys: Keys, data: KeyBody) -> Terms:
    if data.expires_at is not None and data.expires_in_sec is not None:
        raise invalid("expires_in_sec", "cannot be combined with expires_at")
    expires_at = None
    if data.expires_at is not None:
        try:
            expires_at = parse_rfc3339(data.expires_at)
        except ValueError:
            raise invalid("expires_at", "must be an RFC 3339 time", data.expires_at) from None
    elif data.expires_in_sec is not None:
        expires_at = keys.writer.now() + data.expires_in_sec * 1_000
    devices = None
    if data.devices is not UNSET or data.device_prefixes is not UNSET:
        names = () if data.devices is UNSET else data.devices
        prefixes = () if data.device_prefixes is UNSET else data.device_prefixes
        if not names and not prefixes:
            raise invalid("devices", "must not be empty; leave it out for all devices of the project")
        devices = DeviceSet(names=frozenset(names), prefixes=tuple(sorted(set(prefixes))))
    return Terms(
        expires_at=expires_at,
        devices=devices,
        commands_per_minute=data.commands_per_minute,
        requests_per_minute=data.requests_per_minute,
    )


def _shown(keys: Keys, key: Key, secret: str | UnsetType = UNSET) -> KeyView:
    terms, devices = key.terms, key.terms.devices
    return KeyView(
        id=key.id,
        project=key.project,
        scopes=key.scopes,
        name=key.name,
        created_at=rfc3339(key.created_at),
        revoked_at=time(key.revoked_at),
        expires_at=time(terms.expires_at),
        last_used_at=time(keys.last_used(key)),
        state=keys.state(key),
        devices=None if devices is None else sorted(devices.names),
        device_prefixes=None if devices is None else list(devices.prefixes),
        commands_per_minute=terms.commands_per_minute,
        requests_per_minute=terms.requests_per_minute,
        key=secret,
    )


HANDLERS = [create_key, list_keys, get_key, revoke_key]
routes = Router("/v1", route_handlers=HANDLERS, before_request=authorize, tags=["System"])
