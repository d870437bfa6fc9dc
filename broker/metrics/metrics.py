"""Metrics for Prometheus: requests, events, stage latencies, refusals, and faults that must not happen.

Counters are updated by the other parts; gauges read their value when Prometheus asks. No decision of the
broker depends on a metric. Times come from the broker's own clock, in whole milliseconds.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from broker import __version__
from broker.core import Core
from broker.domain.errors import Kind
from broker.domain.events import NAMES, TYPES, Acknowledged, Executed, Failed, Pending, Published, TimedOut
from broker.domain.lanes import Presence
from broker.domain.mqtt_rules import MqttRules
from broker.engine.live import Live
from broker.engine.writer import Writer
from broker.metrics.histogram import Histogram, Series
from broker.seams import Clock, Placed
from broker.subscriptions.webhook_worker import Attempt
from broker.subscriptions.webhooks import Webhooks

# Without the charset: Litestar adds it to every text response.
CONTENT_TYPE = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")
# Up to the longest back-off. A command that waits for an offline device can exceed every bucket.
STAGES_SEC = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
FAST_SEC = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
ATTEMPTS = (1, 2, 3, 4, 5, 10, 100)
RECENT_COMMITS = 256
TEXT_MS = 1_000  # strangers may ask as often as they like, and rendering blocks the loop for milliseconds
STAGED = frozenset({Published, Acknowledged, Executed, Failed, TimedOut})
BATCHES = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000)


class Listening(NamedTuple):
    """Figures of our own MQTT server: by name, and ended connections by MQTT reason code."""

    figures: Mapping[str, tuple[str, Callable[[], float]]]
    ended: Mapping[int, int]


class Metrics:
    """`watch` connects the metrics to one broker. Label values are few: never a device or a command id."""

    def __init__(self, clock: Clock) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._clock = clock
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("ordain", "The running release", registry=self.registry).info({"version": __version__})
        self._requests = Counter(
            "ordain_http_requests_total",
            "HTTP requests answered",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "ordain_http_request_seconds",
            "Time until an HTTP request was answered",
            ("method", "route"),
            buckets=FAST_SEC,
            registry=self.registry,
        )
        self._events = Counter(
            "ordain_events_total", "Events recorded, durable", ("type",), registry=self.registry
        )
        self._batch = Histogram(
            "ordain_commit_events", "Events in one commit", buckets=BATCHES, registry=self.registry
        ).labels()
        self._commit = Histogram(
            "ordain_commit_seconds",
            "From the decision of a batch's first event until the batch is durable",
            buckets=FAST_SEC,
            registry=self.registry,
        ).labels()
        self._hand_overs = Counter(
            "ordain_hand_overs_total",
            "Hand-over attempts recorded, by transport",
            ("transport",),
            registry=self.registry,
        )
        self._stages = Histogram(
            "ordain_command_stage_seconds",
            "Time from one stage of a command to the next; the first time only",
            ("stage",),
            buckets=STAGES_SEC,
            registry=self.registry,
        )
        self._attempts = Histogram(
            "ordain_command_attempts",
            "Attempts of a handed-over command until it was first closed",
            ("end",),
            buckets=ATTEMPTS,
            registry=self.registry,
        )
        self._text: bytes | None = None
        self._text_at = 0
        self.listener: Listening | None = None
        self.recent_commits_ms = deque[int](maxlen=RECENT_COMMITS)
        self._wrongs()
        self._request_labels: dict[tuple[str, str, int], tuple[Counter, Series]] = {}
        self._live: Live | None = None
        self._writer: Writer | None = None

    def _wrongs(self) -> None:
        """Counters of refusals, unmatched answers and faults."""
        self._refused_notes = Counter(
            "ordain_refused_notes_total",
            "Side rows left out of a commit because their values cannot be written",
            registry=self.registry,
        )
        self._unmatched = Counter(
            "ordain_unmatched_total", "Answers that matched no command", ("reason",), registry=self.registry
        )
        self._unfit = Counter(
            "ordain_unfit_results_total",
            "Results that do not match the device type's schema; they are recorded anyway",
            ("type",),
            registry=self.registry,
        )
        self._refusals = Counter(
            "ordain_refusals_total",
            "Requests, or single commands of a fan-out, that were refused",
            ("code",),
            registry=self.registry,
        )
        self._broken = Counter(
            "ordain_promise_broken_total",
            "Answers to commands that expired or were cancelled before any hand-over; must stay 0",
            registry=self.registry,
        )
        self._folded = Counter(
            "ordain_device_events_folded_total",
            "What devices said beyond their rate of events; the newest is recorded later",
            registry=self.registry,
        )
        self._subscriber_events, self._subscriber_lag = _of_subscribers(self.registry)

    def watch(self, core: Core) -> None:
        self._live, self._writer = live, writer = core.live, core.writer
        dispatch = core.dispatch
        writer.listeners.append(self._committed)
        core.intake.on_unmatched = self._unmatched_answer
        writer.on_refused_note = self._refused_notes.inc
        core.registry.told.on_folded = self._folded.inc
        core.intake.on_unfit = lambda device_type: self._unfit.labels(device_type).inc()
        # Each series starts at 0: Prometheus' rate() misses the first increase of a new series.
        for event_type in TYPES:
            self._events.labels(event_type)
        for kind in get_args(Kind):
            self._refusals.labels(kind)
        for device_type in core.commands.types:
            self._unfit.labels(device_type)
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("ordain_ready", "1 while the broker is ready (/readyz)", lambda: not core.not_ready()),
            ("ordain_open_commands", "Commands that are not closed", lambda: _open(live)),
            ("ordain_open_lanes", "Devices with commands that are not closed", lambda: _lanes(live)),
            (
                "ordain_oldest_open_command_seconds",
                "Age of the oldest open command; 0 if none is open",
                lambda: _oldest(live, writer.now()),
            ),
            ("ordain_devices_online", "Devices known to be online", lambda: _online(live)),
            (
                "ordain_send_slots_in_use",
                "Hand-overs that are being recorded or wait for the MQTT server's receipt",
                lambda: dispatch.staged + dispatch.outstanding,
            ),
            ("ordain_send_slots", "Limit of send slots in use", lambda: core.settings.limits.send_slots),
            ("ordain_erased_commands", "Commands erased since the start", lambda: core.erasures.erased),
            ("ordain_mqtt_link_up", "1 while connected to the MQTT server", lambda: core.link.up),
            ("ordain_log_writable", "1 while the log can be written", lambda: writer.open),
        )
        for name, what, look in gauges:
            Gauge(name, what, registry=self.registry).set_function(look)
        self._watch_webhooks(core.webhooks)

    def _watch_webhooks(self, webhooks: Webhooks) -> None:
        registry = self.registry
        what = "Requests made to webhooks, by outcome"
        made = Counter("ordain_webhook_deliveries_total", what, ("outcome",), registry=registry)
        for outcome in ("delivered", "refused", "unreached"):
            made.labels(outcome)
        sent = self.subscribers("webhook", webhooks.lag)
        stopped = Gauge("ordain_webhooks_stopped", "Webhooks paused or gone", registry=registry)
        stopped.set_function(webhooks.stopped)

        def tell(attempt: Attempt) -> None:
            refused = "refused" if attempt.status is not None else "unreached"
            made.labels("delivered" if attempt.delivered else refused).inc()
            sent.inc(attempt.delivered)

        webhooks.sender.tell = tell

    def subscribers(self, kind: Literal["sse", "webhook", "mqtt"], lag: Callable[[], float]) -> Counter:
        """The counter of events sent to one kind of subscriber. `lag` is called for each scrape."""
        self._subscriber_lag.labels(kind).set_function(lag)
        return self._subscriber_events.labels(kind)

    def watch_streams(
        self, streams: Callable[[], float], waits: Callable[[], float], tickets: Callable[[], float]
    ) -> None:
        for name, text, look in (
            ("event_streams", "Event streams that are open", streams),
            ("waiting_requests", "Requests that wait until a command is closed", waits),
            ("unused_tickets", "Tickets for event streams that nobody used yet", tickets),
        ):
            Gauge(f"ordain_{name}", text, registry=self.registry).set_function(look)

    def watch_strangers(self, count: Callable[[], float], limit: int, closed: Callable[[], float]) -> None:
        what = "HTTP connections on which no key was accepted yet"
        Gauge("ordain_http_strangers", what, registry=self.registry).set_function(count)
        Gauge("ordain_http_strangers_limit", "How many there may be", registry=self.registry).set(limit)
        what = "Such connections closed for a newer one"
        self.registry.register(_Counted("ordain_http_strangers_closed_total", what, closed))

    def watch_rules(self, rules: MqttRules) -> None:
        what = "Things that the external MQTT server allows and must refuse; -1: not tried yet"
        gauge = Gauge("ordain_mqtt_rule_breaches", what, registry=self.registry)
        gauge.set_function(lambda: -1 if rules.breaches is None else len(rules.breaches))
        what = "Devices that the external MQTT server does not know"
        gauge = Gauge("ordain_mqtt_devices_missing", what, registry=self.registry)
        gauge.set_function(lambda: rules.missing)

    def watch_lookups(self, under_way: Callable[[], float], refused: Callable[[], float]) -> None:
        what = "Host names of webhooks that are being looked up"
        Gauge("ordain_webhook_lookups", what, registry=self.registry).set_function(under_way)
        what = "Lookups refused because too many were under way"
        self.registry.register(_Counted("ordain_webhook_lookups_refused_total", what, refused))

    def watch_listener(
        self, figures: Mapping[str, tuple[str, Callable[[], float]]], refusals: Mapping[int, int]
    ) -> None:
        """Adds the figures of our own MQTT server. Names that end in `_total` only grow."""
        self.listener = Listening(figures, refusals)
        self.registry.register(_Listener(figures, refusals))

    def text(self, *, fresh: bool = False) -> bytes:
        """All metrics in Prometheus' text format; rendered at most once a second, except if `fresh`."""
        now = self.now_ms()
        if fresh or self._text is None or now >= self._text_at + TEXT_MS:
            self._text, self._text_at = generate_latest(self.registry), now
        return self._text

    # --- calls of other parts ---

    def now_ms(self) -> int:
        return self._clock.monotonic_ms()

    def request(self, method: str, route: str, status: int, since_ms: int) -> None:
        key = (method, route, status)
        found = self._request_labels.get(key)
        if found is None:
            found = (
                self._requests.labels(method, route, str(status)),
                self._request_seconds.labels(method, route),
            )
            self._request_labels[key] = found
        counter, seconds = found
        counter.inc()
        seconds.observe((self.now_ms() - since_ms) / 1_000)

    def refused(self, code: str, count: int = 1) -> None:
        """Counts refusals. `code`: an error code of the contract, so the label has few values."""
        self._refusals.labels(code).inc(count)

    def _unmatched_answer(self, reason: str) -> None:
        self._unmatched.labels(reason).inc()
        if reason == "promise_broken":
            self._broken.inc()

    def _committed(self, events: list[Pending], _: Placed) -> None:
        if not events or self._live is None or self._writer is None:
            return
        self._batch.observe(len(events))
        took_ms = self._writer.now() - events[0].decided_at
        self._commit.observe(took_ms / 1_000)
        self.recent_commits_ms.append(took_ms)
        for kind, count in Counts(type(pending.event) for pending in events).items():
            self._events.labels(NAMES[kind]).inc(count)
        for pending in events:
            if type(pending.event) in STAGED:
                self._stage(self._live, pending)
        transports = (each.event.transport for each in events if type(each.event) is Published)
        for transport, count in Counts(transports).items():
            self._hand_overs.labels(transport).inc(count)

    def _stage(self, live: Live, pending: Pending) -> None:
        state = live.command(pending.stream)
        if state is None:
            return
        at, event, since = pending.decided_at, pending.event, state.published_at
        if isinstance(event, Published):
            if event.attempt == 1:
                self._observe("created_to_published", at - state.created_at)
        elif since is not None:
            if isinstance(event, Acknowledged):
                if state.acknowledged_at == at:
                    self._observe("published_to_acknowledged", at - since)
                return
            if isinstance(event, (Executed, Failed)):
                self._observe("published_to_result", at - since)
                if state.acknowledged_at is not None:
                    self._observe("acknowledged_to_result", at - state.acknowledged_at)
                if event.late:
                    return
            self._attempts.labels(pending.type).observe(state.attempts)

    def _observe(self, stage: str, ms: int) -> None:
        self._stages.labels(stage).observe(ms / 1_000)


class _Counted(Collector):
    """A counter that another part keeps."""

    def __init__(self, name: str, what: str, look: Callable[[], float]) -> None:
        self._name, self._what, self._look = name, what, look

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._what, value=self._look())


class _Listener(Collector):
    """Looks at the listener's figures when asked."""

    def __init__(
        self, figures: Mapping[str, tuple[str, Callable[[], float]]], refusals: Mapping[int, int]
    ) -> None:
        self._figures = figures
        self._refusals = refusals

    def collect(self) -> Iterator[Metric]:
        for name, (what, look) in self._figures.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"ordain_mqtt_{name}", what, value=look())
        what = "Connections we refused or ended, by MQTT reason code"
        ended = CounterMetricFamily("ordain_mqtt_ended_total", what, labels=["reason"])
        for reason, count in sorted(self._refusals.items()):
            ended.add_metric([f"0x{reason:02x}"], count)
        yield ended


def _open(live: Live) -> float:
    return sum(len(lane.members) for lane in live.lanes.values())


def _lanes(live: Live) -> float:
    return sum(bool(lane.members) for lane in live.lanes.values())


def _oldest(live: Live, now: int) -> float:
    first = (next(iter(lane.members.values())) for lane in live.lanes.values() if lane.members)
    return max((now - member.state.created_at for member in first), default=0) / 1_000


def _online(live: Live) -> float:
    return sum(presence is Presence.ONLINE for presence in live.presence.values())


def _of_subscribers(registry: CollectorRegistry) -> tuple[Counter, Gauge]:
    sent = Counter(
        "ordain_subscriber_events_total", "Events sent to subscribers", ("kind",), registry=registry
    )
    lag = Gauge(
        "ordain_subscriber_lag_events",
        "Distance of the slowest subscriber from the end of the log, in events",
        ("kind",),
        registry=registry,
    )
    return sent, lag
