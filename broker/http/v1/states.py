"""`/v1/devices/{device}/state`: the state that a device reported last, now or as it was."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Router, get
from litestar.params import FromPath
from msgspec import Meta

from broker.domain.fleet import DeviceState
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import past
from broker.http.v1.devices import find_device
from broker.http.v1.past import AsOf
from broker.http.v1.views import Time
from broker.seams import Sql
from devices.clock import rfc3339


class StateView(msgspec.Struct, frozen=True, kw_only=True):
    """The last known state of a device."""

    device_id: str
    hardware_id: str
    state: Annotated[
        dict[str, Any] | None,
        Meta(
            description="As the device reported it; null if it has reported none, or its type has no state topics.",
            examples=[{"state": "ON", "brightness": 254}],
        ),
    ]
    reported_at: Annotated[
        Time | None, Meta(description="When the broker recorded this state; the device may have sent it earlier.")
    ]


@get("/{device:str}/state", opt=needs("devices:read"), responses=documented(404, 410))
async def read_state(request: Call, device: FromPath[str], as_of: AsOf = None) -> StateView:
    """Read the last known state of a device

    Only device types with state topics have one. With `as_of` it is the state that was known then.
    """
    caller = request.user
    place = None if as_of is None else await past.place_of(request, as_of)

    def work(sql: Sql) -> DeviceState:
        if place is not None:
            return past.find_device(sql, caller, device, place(sql)).state
        return find_device(sql, caller, device)

    found = await request.services.commands.writer.storage.read(work)
    return StateView(
        device_id=found.id,
        hardware_id=found.hardware_id,
        state=found.reported,
        reported_at=None if found.reported_at is None else rfc3339(found.reported_at),
    )


routes = Router("/v1/devices", route_handlers=[read_state], before_request=authorize, tags=["Devices"])
