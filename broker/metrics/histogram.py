"""A histogram for Prometheus that costs little: each value takes one search of its bucket.

The library's own goes through the buckets one by one, and takes a lock for each. Here only the thread of the
event loop counts and shows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Series:
    """The values with the same labels. `counts`: of each bucket alone; the last is beyond all bounds."""

    __slots__ = ("_upper", "counts", "sum")

    def __init__(self, upper: Sequence[float]) -> None:
        self._upper = upper
        self.counts = [0] * (len(upper) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._upper, value)] += 1
        self.sum += value


class Histogram(Collector):
    """`buckets`: their upper bounds, ascending. A series is shown from its first call of `labels` on."""

    def __init__(
        self,
        name: str,
        what: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._what, self._labels = name, what, labels
        self._upper = buckets
        self._shown = [*(str(float(each)) for each in buckets), "+Inf"]
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def labels(self, *values: str) -> Series:
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = Series(self._upper)
        return found

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._what, labels=self._labels)
        for values, series in self._series.items():
            counted = zip(self._shown, accumulate(series.counts), strict=True)
            family.add_metric(values, buckets=[*counted], sum_value=series.sum)
        yield family
