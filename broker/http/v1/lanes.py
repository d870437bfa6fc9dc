"""`/v1/devices/{device}/lane` and `/state`: the open commands of a device, what happens next to each of them,
and the state that the device reported last.

Reads the live state. It must never block or change that state.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Router, get
from litestar.params import FromPath
from msgspec import Meta

from broker.domain.fleet import DeviceState
from broker.domain.lanes import Member, Presence
from broker.domain.lifecycle import CommandState
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1 import past
from broker.http.v1.devices import find_device
from broker.http.v1.past import AsOf
from broker.http.v1.views import PresenceName, StateName, Time, presence_of
from broker.seams import Sql
from devices.clock import rfc3339
from projections import commands as commands_view
from projections import past as past_view
from projections.past import Then


class LaneCommand(msgspec.Struct, frozen=True, kw_only=True):
    """One open command, and what happens next to it."""

    id: str
    type: str
    state: StateName
    position: Annotated[
        int, Meta(description="The log position of its `created` event. The lane has this order.")
    ]
    attempts: int
    created_at: Time
    expires_at: Time | None
    next: Annotated[
        dict[str, Any] | None, Meta(description="The same as `next` of its `explain`; null with `as_of`.")
    ]


class LaneView(msgspec.Struct, frozen=True, kw_only=True):
    """The open commands of one device, in order of creation."""

    device_id: str
    hardware_id: str
    presence: PresenceName
    offline_since: Annotated[
        Time | None, Meta(description="Null if the device is not offline, or the time is not known.")
    ]
    open: list[LaneCommand]
    window: Annotated[
        int, Meta(description="The largest number of commands that can be with the device at once.")
    ]
    in_flight: Annotated[int, Meta(description="The number of commands that are with the device now.")]
    shut_until: Annotated[
        Time | None,
        Meta(
            description="No command is sent before this time: an answer without an id could belong to an "
            "earlier command."
        ),
    ]


@get("/{device:str}/lane", opt=needs("devices:read"), responses=documented(404, 410))
async def read_lane(request: Call, device: FromPath[str], as_of: AsOf = None) -> LaneView:
    """Read the lane of a device

    Its open commands, oldest first, and what happens next to each. With `as_of` it shows the commands that
    were open then; `next` and `shut_until` are null, because the log does not contain them.
    """
    if as_of is not None:
        return await _lane_then(request, device, as_of)
    caller, commands = request.user, request.services.commands
    live, writer = commands.live, commands.writer
    durable = await writer.storage.read(lambda sql: find_device(sql, caller, device))
    found = live.device(durable.id) or durable
    lane = live.lanes.get(found.id)
    members = [] if lane is None else list(lane.members.values())
    shown = []
    for member in members:
        explanation = await request.services.dispatch.explain(member.state)
        state = member.state
        if not state.closed:
            shown.append((state, explanation.next))
    kind = commands.types.get(found.device_type)
    window = members[0].definition.max_in_flight if members else kind.max_in_flight if kind else 1
    presence = presence_of(found, live.presence.get(found.id))
    offline = presence is Presence.OFFLINE and not found.online and found.seen_at is not None
    shut = lane is not None and lane.shut_until > writer.now()
    await writer.barrier()  # from here on every command shown has a position
    positions = await writer.storage.read(lambda sql: _positions(sql, [state for state, _ in shown]))
    return LaneView(
        device_id=found.id,
        hardware_id=found.hardware_id,
        presence=presence.value,
        offline_since=rfc3339(found.seen_at) if offline and found.seen_at is not None else None,
        open=[_command(state, positions[state.id], next) for state, next in shown],
        window=window,
        in_flight=sum(member.holds_slot for member in members),
        shut_until=rfc3339(lane.shut_until) if shut and lane is not None else None,
    )


async def _lane_then(request: Call, name: str, as_of: str) -> LaneView:
    caller, commands = request.user, request.services.commands
    place = await past.place_of(request, as_of)

    async def work(sql: Sql) -> tuple[Then, list[CommandState], dict[str, int]]:
        position = await place(sql)
        then = await past.find_device(sql, caller, name, position)
        states = await past_view.lane(sql, then.state.id, position)
        return then, states, (await _positions(sql, states))

    then, states, positions = await commands.writer.storage.read(work)
    device, kind = then.state, commands.types.get(then.state.device_type)
    members = [Member(state, commands.live.definitions[state.definition]) for state in states]
    window = members[0].definition.max_in_flight if members else kind.max_in_flight if kind else 1
    presence = presence_of(device, past.known(then))
    offline = presence is Presence.OFFLINE and device.seen_at is not None
    return LaneView(
        device_id=device.id,
        hardware_id=device.hardware_id,
        presence=presence.value,
        offline_since=rfc3339(device.seen_at) if offline and device.seen_at is not None else None,
        open=[_command(state, positions[state.id], None) for state in states],
        window=window,
        in_flight=sum(member.holds_slot for member in members),
        shut_until=None,
    )


async def _positions(sql: Sql, states: list[CommandState]) -> dict[str, int]:
    return {state.id: (await commands_view.position(sql, state.id)) for state in states}


def _command(state: CommandState, position: int, next: dict[str, Any] | None) -> LaneCommand:
    return LaneCommand(
        id=state.id,
        type=state.type,
        state=state.state.value,  # type: ignore[arg-type]
        position=position,
        attempts=state.attempts,
        created_at=rfc3339(state.created_at),
        expires_at=None if state.expires_at is None else rfc3339(state.expires_at),
        next=next,
    )


class StateView(msgspec.Struct, frozen=True, kw_only=True):
    """The last known state of a device."""

    device_id: str
    hardware_id: str
    state: Annotated[
        dict[str, Any] | None,
        Meta(
            description="As the device reported it; null if it reported none, or its type has none.",
            examples=[{"state": "ON", "brightness": 254}],
        ),
    ]
    reported_at: Annotated[Time | None, Meta(description="When this state was recorded.")]


@get("/{device:str}/state", opt=needs("devices:read"), responses=documented(404, 410))
async def read_state(request: Call, device: FromPath[str], as_of: AsOf = None) -> StateView:
    """Read the last known state of a device

    Only device types with state topics have one. With `as_of` it is the state that was known then.
    """
    caller = request.user
    place = None if as_of is None else await past.place_of(request, as_of)

    async def work(sql: Sql) -> DeviceState:
        if place is not None:
            return (await past.find_device(sql, caller, device, await place(sql))).state
        return await find_device(sql, caller, device)

    found = await request.services.commands.writer.storage.read(work)
    return StateView(
        device_id=found.id,
        hardware_id=found.hardware_id,
        state=found.reported,
        reported_at=None if found.reported_at is None else rfc3339(found.reported_at),
    )


routes = Router(
    "/v1/devices", route_handlers=[read_lane, read_state], before_request=authorize, tags=["Devices"]
)
