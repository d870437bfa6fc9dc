"""The parts of the broker that HTTP handlers use. The module that starts the broker puts them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from broker.domain.mqtt_rules import MqttRules
from broker.engine.commands import Commands
from broker.engine.dispatch import Dispatch
from broker.engine.erasures import Erasures
from broker.engine.fanout import Fanout
from broker.engine.grants import Grants
from broker.engine.intake import Intake
from broker.engine.keys import Keys
from broker.engine.pull import Pull
from broker.engine.registry import Registry
from broker.engine.repairs import Repairs
from broker.engine.verification import Verification
from broker.http.edge.strangers import Strangers
from broker.http.edge.streams import Streams
from broker.http.edge.tickets import Tickets
from broker.http.edge.waits import Waits
from broker.metrics.metrics import Metrics
from broker.often import Often
from broker.seams import Link
from broker.settings import Limits, Settings
from broker.subscriptions.feed import Feed
from broker.subscriptions.mqtt import MqttEvents
from broker.subscriptions.webhooks import Webhooks


class NodeFacts(NamedTuple):
    """One of several nodes on a log. `silent_ms`: how long ago its last sign of life was seen."""

    name: str
    address: str | None
    role: Literal["owner", "door", "leaving", "silent"]
    silent_ms: int


class NodesFacts(NamedTuple):
    """All of them. `term`: how many times the log has had an owner."""

    term: int
    nodes: list[NodeFacts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """`cursor_key` signs the cursors of lists. `ready` returns the reasons why the broker is not ready; an
    empty list means it is.

    `settings`: shown by `/v1/system`; also the origins for CORS. `nodes`: None if there is only this one.
    """

    commands: Commands
    repairs: Repairs
    erasures: Erasures
    fanout: Fanout
    registry: Registry
    keys: Keys
    verification: Verification
    grants: Grants
    feed: Feed
    mqtt_events: MqttEvents
    webhooks: Webhooks
    streams: Streams
    waits: Waits
    tickets: Tickets
    strangers: Strangers
    dispatch: Dispatch
    intake: Intake
    pull: Pull
    link: Link
    metrics: Metrics
    limits: Limits
    often: Often
    mqtt_rules: MqttRules
    log_id: str
    cursor_key: bytes
    ready: Callable[[], list[str]]
    settings: Settings = field(default_factory=Settings)
    nodes: Callable[[], NodesFacts | None] = lambda: None


@dataclass(slots=True)
class Served:
    """The services of one app, and whether it is the app on the private socket. Each request's scope has
    it, so that several brokers in one process can share the routes."""

    services: Services
    local: bool
    asyncapi: bytes | None = None


SERVED = "ordain"


def served(scope: Mapping[str, Any]) -> Served:
    return cast(Served, scope[SERVED])
