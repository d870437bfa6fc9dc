"""The histogram shows what the library's own would show."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

from broker.metrics.histogram import Histogram
from broker.metrics.metrics import ATTEMPTS, BATCHES, FAST_SEC, STAGES_SEC

VALUES = (0, 0.0005, 0.001, 0.0011, 0.25, 1, 1.5, 3, 10, 300, 1_000, 5_000)


def test_it_shows_the_same_text_as_the_librarys_own() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    for buckets in (STAGES_SEC, FAST_SEC, ATTEMPTS, BATCHES):
        own, theirs = CollectorRegistry(), CollectorRegistry()
        ours = Histogram("h_seconds", "What", ("stage", "way"), buckets=buckets, registry=own)
        library = prometheus_client.Histogram(
            "h_seconds", "What", ("stage", "way"), buckets=buckets, registry=theirs
        )
        for value in VALUES:
            for labels in (("a", "x"), ("b", 'a "quoted" one')):
                ours.labels(*labels).observe(value)
                library.labels(*labels).observe(value)

        assert generate_latest(own) == generate_latest(theirs)


def test_without_labels_it_is_shown_before_its_first_value() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    own, theirs = CollectorRegistry(), CollectorRegistry()
    Histogram("h_events", "What", buckets=BATCHES, registry=own).labels()
    prometheus_client.Histogram("h_events", "What", buckets=BATCHES, registry=theirs)

    assert generate_latest(own) == generate_latest(theirs)
