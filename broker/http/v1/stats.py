"""`/v1/stats`: counts of commands by state, and latencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
from litestar import Router, get
from litestar.params import QueryParameter
from msgspec import Meta

from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.v1.views import Time
from devices.clock import rfc3339
from projections.figures import figures

PIECES = 60
Window = Annotated[
    int,
    QueryParameter(ge=10, le=86_400, description="Seconds to look back."),
]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from the first hand-over, of executed commands; null without any."""

    p50_ms: int | None
    p95_ms: int | None


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One sixtieth of the window: how many commands were created in it, and how many closed, by state."""

    at: Time
    until: Time
    created: int
    executed: int
    failed: int
    timed_out: int
    expired: int
    cancelled: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of commands and latencies in the window."""

    since: Annotated[Time, Meta(description="Later than requested if there were too many commands to count.")]
    until: Time
    window_sec: Annotated[float, Meta(description="From `since` to `until`.")]
    states: Annotated[
        dict[str, int],
        Meta(description="Open states: commands now. Other states: commands closed since `since`."),
    ]
    commands_per_minute: Annotated[float, Meta(description="Created.")]
    acknowledge: Annotated[Latency, Meta(description="To the first answer of the device.")]
    execute: Annotated[Latency, Meta(description="To the result.")]
    volume: list[Piece]


@get("/stats", opt=needs("devices:read"), responses=documented())
async def read_stats(request: Call, window: Window = 300) -> Stats:
    """Read counts and latencies

    Covers the last `window` seconds and the devices that the key may see; for an admin key, all projects.
    Erased commands are not counted.
    """
    writer, caller = request.services.commands.writer, request.user
    until = writer.now()
    found = await writer.storage.read(
        lambda sql: figures(sql, caller.project, until - window * 1_000, until, PIECES, caller.devices)
    )
    length = max(1, until - found.since)
    edges = [found.since + length * piece // PIECES for piece in range(PIECES + 1)]
    return Stats(
        since=rfc3339(found.since),
        until=rfc3339(until),
        window_sec=length / 1_000,
        states=found.states,
        commands_per_minute=round(sum(found.created) * 60_000 / length, 1),
        acknowledge=_latency(found.acknowledged),
        execute=_latency(found.executed),
        volume=[
            Piece(
                at=rfc3339(start),
                until=rfc3339(end),
                created=created,
                executed=closed["executed"],
                failed=closed["failed"],
                timed_out=closed["timed_out"],
                expired=closed["expired"],
                cancelled=closed["cancelled"],
            )
            for start, end, created, closed in zip(
                edges, edges[1:], found.created, found.closed, strict=False
            )
        ],
    )


def _latency(ascending: Sequence[int]) -> Latency:
    return Latency(p50_ms=percentile(ascending, 0.5), p95_ms=percentile(ascending, 0.95))


def percentile(ascending: Sequence[int], share: float) -> int | None:
    """The percentile by nearest rank; None if there are no values."""
    return ascending[max(0, math.ceil(len(ascending) * share) - 1)] if ascending else None


routes = Router("/v1", route_handlers=[read_stats], before_request=authorize, tags=["System"])
