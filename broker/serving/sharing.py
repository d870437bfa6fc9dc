"""`ordain serve` on a log that several nodes share: this one passes requests on until it owns the log itself.

A node that owned the log and lost it ends; its supervisor starts it again, as another run.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import msgspec
import structlog

from broker.engine.ids import new_id
from broker.http.app import create_app, metrics_app, warm
from broker.http.edge.strangers import Strangers
from broker.metrics.metrics import Metrics
from broker.mqtt.client.link import MqttLink
from broker.mqtt.tls import Certificates
from broker.nodes.cluster import Cluster
from broker.nodes.connections import KEPT_SEC, Connections
from broker.nodes.entrance import Apps, Entrance
from broker.nodes.figures import watch_node
from broker.nodes.forwarding import Peers
from broker.nodes.turns import Owned, take_turns
from broker.opening import Shared, open_shared
from broker.seams import Broken, Unknown
from broker.serving import supervisor
from broker.serving.listening import Apps as Served
from broker.serving.listening import served
from broker.serving.owning import Beforehand, beforehand, owning
from broker.settings import Settings
from broker.world import SystemClock, SystemEntropy, boot_ms
from devices.mqtt_url import joined

logger = structlog.get_logger()


async def share(
    settings: Settings,
    listening: list[socket.socket],
    scraped: socket.socket | None,
    certificates: Certificates | None,
    tls: ssl.SSLContext | None,
    stop: asyncio.Event,
) -> None:
    """Serves as one of several nodes until `stop`.

    Raises:
        ExceptionGroup (of Fenced): this node owned the log, and another one has claimed it.
        InUse, BadSetting, Broken, OSError: as `serve`.
    """
    shared = open_shared(settings)
    try:
        # All that takes time is done before: when the log is taken over, requests wait.
        files = beforehand(settings)
        warm()
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        await _prepared(shared)
        cluster = Cluster(shared.log, shared.node, boot_ms, SystemClock().wall_ms)
        # The other nodes have the same settings, and must not close a connection just when it is used again.
        kept_sec = min(KEPT_SEC, settings.http_keep_alive_sec / 2)
        peers = Peers(cluster, shared.secret, Connections(kept_sec))
        entrance = Entrance(cluster, peers, shared.secret)
        entrance.shows_metrics = settings.metrics == "open"
        strangers = Strangers(settings.limits.strangers, settings.limits.strangers_per_address)
        serving = _http(settings, entrance, strangers, listening, scraped, certificates)
        own = partial(_own, settings, shared, files, entrance, strangers, certificates, tls, stop)
        await take_turns(entrance, serving, own, stop)
        peers.close()
        with suppress(Unknown, Broken):  # then the others see it by its beats
            await shared.log.leave(cluster.node)
    finally:
        await shared.log.close()
        shared.closed()
    logger.info("broker.ended")


async def _prepared(shared: Shared) -> None:
    """Makes the log if it is missing. The last run in this directory has ended; nobody has to wait for it."""
    entropy = SystemEntropy()
    log_id = new_id("log", SystemClock().wall_ms(), entropy)
    await shared.log.prepare(log_id, entropy.token(32).hex())
    if shared.last is not None:
        await shared.log.leave(msgspec.structs.replace(shared.node, incarnation=shared.last))


@asynccontextmanager
async def _own(
    settings: Settings,
    shared: Shared,
    files: Beforehand,
    entrance: Entrance,
    strangers: Strangers,
    certificates: Certificates | None,
    tls: ssl.SSLContext | None,
    stop: asyncio.Event,
) -> AsyncIterator[Owned]:
    """Opens the log that this node has claimed, and the way to the MQTT server."""
    cluster = entrance.cluster
    log, holds, facts = shared.log, cluster.holds, cluster.facts
    async with owning(settings, log, certificates, tls, stop, strangers, holds, facts, files) as owned:
        parts, link = owned.parts, owned.core.link
        if isinstance(link, MqttLink):
            cluster.lapsed = link.cut

        def hang_up() -> None:
            parts.streams.close()
            parts.waits.close()

        _watch(parts.metrics, entrance)
        before, entrance.metrics = entrance.metrics, parts.metrics.text
        gc.freeze()
        logger.info(
            "broker.owns", term=cluster.term, log=owned.core.log_id, open=len(owned.core.live.members)
        )
        try:
            yield Owned(Apps(create_app(parts), create_app(parts, local=True), parts.ready), hang_up)
        finally:
            entrance.metrics = before


@asynccontextmanager
async def _http(
    settings: Settings,
    entrance: Entrance,
    strangers: Strangers,
    listening: list[socket.socket],
    scraped: socket.socket | None,
    certificates: Certificates | None,
) -> AsyncIterator[None]:
    metrics = Metrics(SystemClock())
    _watch(metrics, entrance)
    entrance.metrics = metrics.text
    apps = Served(
        entrance.app(local=False), entrance.app(local=True), metrics_app(lambda: entrance.metrics())
    )
    async with served(apps, settings, strangers, listening, scraped, certificates, None, lambda: None):
        base = f"http://{joined(*listening[0].getsockname()[:2])}"
        if scraped is not None:
            logger.info("metrics.serving", at=joined(*scraped.getsockname()[:2]))
        logger.info("broker.serving", http=base, data=settings.data, node=entrance.cluster.node.name)
        supervisor.notify(supervisor.READY, os.environ)
        yield
        supervisor.notify(supervisor.STOPPING, os.environ)
        logger.info("broker.ending")


def _watch(metrics: Metrics, entrance: Entrance) -> None:
    cluster = entrance.cluster
    watch_node(
        metrics.registry,
        owns=lambda: entrance.apps is not None and cluster.holds(),
        term=lambda: cluster.term,
        beat_age_sec=lambda: (cluster.beat_age_ms or 0) / 1_000,
        alive=lambda: sum(cluster.lives(node) for node in cluster.members.view.nodes),
        held=lambda: entrance.held,
        held_bytes=lambda: entrance.held_bytes,
        outcomes=entrance.outcomes,
    )
