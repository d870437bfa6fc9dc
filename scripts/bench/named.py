"""The few figures that are compared between commits, each with its ratio to a floor of the same run."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import msgspec

Figures = dict[str, list[float]]


class _Source(NamedTuple):
    """Where a figure and its floor are found: a part of the benchmark, and the name there."""

    unit: str
    part: str
    value: str
    floor_part: str
    floor: str


SOURCES = {
    "life_per_post": _Source("lives/s", "b", "lives/s", "g", "commands/s"),
    "life_fan_out": _Source("lives/s", "b", "fan-out: lives/s", "g", "commands/s"),
    "life_cpu": _Source("µs", "b", "broker CPU µs per life", "g", "client CPU µs per command"),
    "life_fan_out_cpu": _Source(
        "µs", "b", "fan-out: broker CPU µs per life", "g", "client CPU µs per command"
    ),
    "append_100": _Source("events/s", "c", "events/s, 100 waiting", "c", "events/s, bare SQLite by 100"),
    "append_eventsourcing": _Source(
        "events/s", "c", "events/s, 100 waiting", "c", "events/s, eventsourcing library"
    ),
    "replay_fold": _Source("events/s", "h", "events/s, fold", "h", "events/s, bare scan and decode"),
    "listener_round_trip": _Source(
        "round trips/s", "e", "listener: round trips/s", "e", "floor: round trips/s"
    ),
    "neighbour_p99": _Source(
        "ms", "d", "neighbour's POST meanwhile, ms p99", "d", "neighbour's POST alone, ms p99"
    ),
}


class Named(msgspec.Struct, kw_only=True):
    """One figure. `ratio`: the median over the rounds of `value` / `floor`."""

    name: str
    value: float
    unit: str
    floor: float
    ratio: float


def ratios(figures: dict[str, Figures], name: str) -> list[float]:
    """`value` / `floor` of each round of one figure; empty if a part was not measured."""
    source = SOURCES[name]
    values = figures.get(source.part, {}).get(source.value, [])
    floors = figures.get(source.floor_part, {}).get(source.floor, [])
    return [one / below for one, below in zip(values, floors, strict=False)]


def named(figures: dict[str, Figures]) -> list[Named]:
    """The named figures whose parts were measured."""
    return [
        Named(
            name=name,
            value=statistics.median(figures[source.part][source.value]),
            unit=source.unit,
            floor=statistics.median(figures[source.floor_part][source.floor]),
            ratio=statistics.median(found),
        )
        for name, source in SOURCES.items()
        if (found := ratios(figures, name))
    ]
