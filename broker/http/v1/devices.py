"""`/v1/devices`: registering, listing and changing devices, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import invalid, not_found
from broker.domain.events import Changed
from broker.domain.fleet import DeviceState
from broker.engine.commands import Caller
from broker.engine.registry import Issued, NewDevice
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.edge.pages import Cursor, Limit, Pager
from broker.http.v1 import past, views
from broker.http.v1.past import AsOf
from broker.http.v1.views import Device, DeviceList, Name, TypeName
from broker.seams import Sql
from projections import devices as devices_view
from projections import past as past_view
from projections.past import Then

Title = Annotated[str, Meta(max_length=200)]
Force = Annotated[bool, QueryParameter(description="Delete it even if it has open commands.")]
Attributes = Annotated[
    dict[str, Any], Meta(description="Any JSON object that you want to keep.", examples=[{"floor": 2}])
]
AnswerKey = Annotated[
    str,
    Meta(
        max_length=64,
        description="The Ed25519 public key that the device signs its answers with: `x` of its JWK.",
    ),
]
# Attributes are decoded again later, perhaps deep in a call stack; deep nesting could then exceed the
# recursion limit.
ATTRIBUTE_LEVELS = 16
LOCAL_PROJECT = "default"


class DeviceBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device to register."""

    hardware_id: Annotated[
        Name,
        Meta(
            description="At most 64 letters, digits, `_` and `-`; not `me` or `pending`.",
            examples=["door-7"],
        ),
    ]
    type: TypeName
    id: Annotated[Name | UnsetType, Meta(description="Generated (`dev_…`) if absent.")] = UNSET
    name: Annotated[Title | None, Meta(examples=["Front door"])] = None
    attributes: Attributes = {}
    answer_key: AnswerKey | None = None
    gateway: Annotated[
        Name | None, Meta(description="The gateway that speaks for it: its id or hardware id.")
    ] = None
    project: Annotated[
        Name | UnsetType, Meta(description="For admin keys only: another project than the key's.")
    ] = UNSET


class DeviceChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The changes to a device. An absent field keeps its value."""

    type: TypeName | UnsetType = UNSET
    name: Annotated[Title | UnsetType | None, Meta(examples=["Back door"])] = UNSET
    attributes: Attributes | UnsetType = UNSET
    answer_key: AnswerKey | UnsetType | None = UNSET
    gateway: Annotated[
        Name | UnsetType | None, Meta(description="The gateway to which it moves; null: it connects itself.")
    ] = UNSET


@post("/", status_code=201, opt=needs("devices:write"), responses=documented(409, 413, 415))
async def register(request: Call, data: JSONBody[DeviceBody]) -> Device:
    """Register a device

    Registers a device and returns its token. The token is shown only in this answer. An `id` or `hardware_id`
    can be used only once in the whole broker, also after the device was deleted: 409 if it is taken.

    With `gateway`, the device does not connect itself: its gateway uses its topics over its own connection. A
    gateway is a device whose type says `gateway = true`.
    """
    if data.id == "":
        raise invalid("id", "must not be empty; leave it out and the broker generates one")
    check_levels(data.attributes)
    new = NewDevice(
        hardware_id=data.hardware_id,
        type=data.type,
        project=project_for(request, data.project),
        id=None if data.id is UNSET else data.id,
        name=data.name,
        attributes=data.attributes,
        answer_key=data.answer_key,
        gateway=data.gateway,
    )
    return _issued(request, await request.services.registry.register(request.user, new))


@get("/", opt=needs("devices:read"), responses=documented(410))
async def list_devices(
    request: Call, limit: Limit = 20, cursor: Cursor = None, as_of: AsOf = None
) -> DeviceList:
    """List devices

    Devices of the key's project, newest first. An admin key gets the devices of all projects.
    """
    project, within = request.user.project, request.user.devices
    pager = Pager(request.services.cursor_key, "devices", project, *([] if as_of is None else [as_of]))
    before = pager.after(cursor)
    place = None if as_of is None else await past.place_of(request, as_of)

    async def work(sql: Sql) -> tuple[Sequence[DeviceState | Then], int | None]:
        found: Sequence[DeviceState | Then]
        if place is not None:
            found = await past_view.devices(sql, project, (await place(sql)), before, limit + 1, within)
        else:
            found = await devices_view.newest(sql, project, before, limit + 1, within)
        page = found[:limit]
        return page, (await devices_view.position(sql, _state(page[-1]).id)) if len(found) > limit else None

    page, resume = await request.services.commands.writer.storage.read(work)
    return DeviceList(
        data=[_shown(request, device) for device in page],
        has_more=resume is not None,
        next_cursor=None if resume is None else pager.seal(resume),
    )


@get("/{device:str}", opt=needs("devices:read"), responses=documented(404, 410))
async def get_device(request: Call, device: FromPath[str], as_of: AsOf = None) -> Device:
    """Read a device

    `{device}` is its id or its hardware id.
    """
    caller = request.user
    place = None if as_of is None else await past.place_of(request, as_of)

    async def work(sql: Sql) -> DeviceState | Then:
        if place is not None:
            return await past.find_device(sql, caller, device, (await place(sql)))
        return await find_device(sql, caller, device)

    return _shown(request, await request.services.commands.writer.storage.read(work))


@patch("/{device:str}", opt=needs("devices:write"), responses=documented(404, 409, 413, 415))
async def change_device(request: Call, device: FromPath[str], data: JSONBody[DeviceChange]) -> Device:
    """Change a device

    Changes its type, name, attributes, gateway or the key of its answers. Commands that were accepted before
    keep the definition of the old type. Attributes are replaced as a whole. A move to another gateway is an
    event of its own; open commands are then sent through the new one.
    """
    if data.attributes is not UNSET:
        check_levels(data.attributes)
    change = Changed(
        device_type=data.type,
        name=data.name,
        attributes=data.attributes,
        answer_key=data.answer_key,
        gateway=data.gateway,
    )
    return _shown(request, await request.services.registry.change(request.user, device, change))


@post("/{device:str}/token", status_code=201, opt=needs("devices:write"), responses=documented(404))
async def rotate_token(request: Call, device: FromPath[str]) -> Device:
    """Give a device a new token

    The token is shown only in this answer. The old token stops working immediately. If grants or answers of
    the device are signed with HMAC, it also gets a new `device_secret`.
    """
    return _issued(request, await request.services.registry.rotate_token(request.user, device))


@delete("/{device:str}", status_code=200, opt=needs("devices:write"), responses=documented(404, 409))
async def delete_device(request: Call, device: FromPath[str], force: Force = False) -> Device:
    """Delete a device

    This cannot be undone, and its names cannot be used again. A device with open commands can only be deleted
    with `force`: commands that were never handed over are cancelled; the others become `timed_out`, because
    the device may have executed them. A gateway can only be deleted once its devices have moved.

    Its connection to Ordain's own MQTT server ends at once. At an external MQTT server an open connection
    lasts until that server ends it, for example by its dynamic security.
    """
    return _shown(request, await request.services.registry.delete(request.user, device, force=force))


async def find_device(sql: Sql, caller: Caller, name: str) -> DeviceState:
    """A device by its id or hardware id.

    Raises:
        Refusal: not_found, also if the device was deleted or the caller may not see it.
    """
    device = (await devices_view.by_name(sql, [name])).get(name)
    if device is None or not caller.sees(device) or device.deleted_at is not None:
        raise not_found("device", name)
    return device


def _state(device: DeviceState | Then) -> DeviceState:
    return device.state if isinstance(device, Then) else device


def _shown(request: Call, device: DeviceState | Then) -> Device:
    if isinstance(device, Then):
        return past.device(device)
    return views.device(device, request.services.commands.live.presence.get(device.id))


def _issued(request: Call, issued: Issued) -> Device:
    secret = UNSET if issued.secret is None else issued.secret
    shown = _shown(request, issued.device)
    return msgspec.structs.replace(shown, device_token=issued.token, device_secret=secret)


def project_for(request: Call, wanted: str | UnsetType) -> str:
    """The project of a new device or webhook: an admin key may choose, all other keys use their own.

    Raises:
        Refusal: invalid_request.
    """
    caller = request.user
    own = caller.project or request.services.keys.project_of(caller.actor) or LOCAL_PROJECT
    if wanted is UNSET or wanted == own:
        return own
    if caller.project is not None:
        raise invalid("project", "this key can only use its own project")
    return wanted


def check_levels(attributes: dict[str, Any]) -> None:
    level: list[Any] = [attributes]
    for _ in range(ATTRIBUTE_LEVELS):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise invalid("attributes", f"must not be nested deeper than {ATTRIBUTE_LEVELS} levels")


routes = Router(
    "/v1/devices",
    route_handlers=[register, list_devices, get_device, change_device, rotate_token, delete_device],
    before_request=authorize,
    tags=["Devices"],
)
