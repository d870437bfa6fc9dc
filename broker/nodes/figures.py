"""Metrics of one of several nodes, as door and as owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


def watch_node(
    registry: CollectorRegistry,
    *,
    owns: Callable[[], float],
    term: Callable[[], float],
    beat_age_sec: Callable[[], float],
    alive: Callable[[], float],
    held: Callable[[], float],
    held_bytes: Callable[[], float],
    outcomes: Mapping[str, int],
) -> None:
    """`outcomes`: requests passed on, by outcome."""
    for name, what, look in (
        ("owner", "1 while this node owns the log", owns),
        ("term", "How many times the log has had an owner", term),
        ("beat_age_seconds", "Age of this node's last confirmed sign of life", beat_age_sec),
        ("peers", "Nodes on this log that show signs of life, with this one", alive),
        ("waiting_requests", "Requests that wait here for an owner or its answer; at most 2,000", held),
        ("waiting_bytes", "Their bodies, in bytes; at most 256 MiB", held_bytes),
    ):
        Gauge(f"ordain_node_{name}", what, registry=registry).set_function(look)
    registry.register(_PassedOn(outcomes))


class _PassedOn(Collector):
    def __init__(self, outcomes: Mapping[str, int]) -> None:
        self._outcomes = outcomes

    def collect(self) -> Iterator[Metric]:
        what = (
            "Requests for the owner: answered, of unknown outcome, refused because it was not found in time "
            "(held), or because too many waited (crowded)"
        )
        found = CounterMetricFamily("ordain_node_passed_on_total", what, labels=["outcome"])
        for outcome, count in self._outcomes.items():
            found.add_metric([outcome], count)
        yield found
