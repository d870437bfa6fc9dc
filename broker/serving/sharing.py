"""`ordain serve` on a log that several nodes share: this one passes requests on until it owns the log itself.

A node that owned the log and lost it ends; its supervisor starts it again, as another run.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import msgspec
import structlog

from broker.engine.ids import new_id
from broker.http.app import create_app, metrics_app, warm
from broker.http.edge.strangers import Strangers
from broker.metrics import Metrics
from broker.mqtt.client.link import MqttLink
from broker.mqtt.tls import Certificates
from broker.nodes import entrance as nodes
from broker.nodes.cluster import Cluster
from broker.nodes.entrance import Entrance
from broker.nodes.figures import watch_node
from broker.nodes.forwarding import Peers
from broker.opening import Shared, open_shared
from broker.seams import Broken, Unknown
from broker.serving import supervisor
from broker.serving.listening import Apps, served
from broker.serving.owning import Beforehand, beforehand, owning
from broker.settings import Settings
from broker.world import SystemClock, SystemEntropy, boot_ms
from devices.mqtt_url import joined

logger = structlog.get_logger()

FINISH_SEC = 1.0  # for requests under way, when the log is handed over


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
        peers = Peers(cluster, shared.secret)
        entrance = Entrance(cluster, peers, shared.secret)
        entrance.shows_metrics = settings.metrics == "open"
        strangers = Strangers(settings.limits.strangers, settings.limits.strangers_per_address)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(cluster.run()), group.create_task(cluster.watch())]
            async with _http(settings, entrance, strangers, listening, scraped, certificates):
                with _failing(entrance):
                    await _until(stop, group.create_task(cluster.claimed()))
                    if not stop.is_set():
                        await _own(settings, shared, files, entrance, strangers, certificates, tls, stop)
                entrance.leaves = True
                supervisor.notify(supervisor.STOPPING, os.environ)
                logger.info("broker.ending")
            for task in tasks:
                task.cancel()
        await peers.close()
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


@contextmanager
def _failing(entrance: Entrance) -> Iterator[None]:
    """After an error, requests that wait are refused at once."""
    try:
        yield
    except BaseException:
        entrance.failed = True
        entrance.cluster.tell()
        raise


async def _until(stop: asyncio.Event, claimed: asyncio.Task[None]) -> None:
    """Waits until this node has claimed the log, or shall end."""
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({stopped, claimed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        claimed.cancel()


async def _own(
    settings: Settings,
    shared: Shared,
    files: Beforehand,
    entrance: Entrance,
    strangers: Strangers,
    certificates: Certificates | None,
    tls: ssl.SSLContext | None,
    stop: asyncio.Event,
) -> None:
    """Owns the log until `stop`, and then lets another node have it."""
    cluster = entrance.cluster
    log, holds, facts = shared.log, cluster.holds, cluster.facts
    async with owning(settings, log, certificates, tls, stop, strangers, holds, facts, files) as own:
        parts, link = own.parts, own.core.link
        if isinstance(link, MqttLink):
            cluster.lapsed = link.cut
        apps = nodes.Apps(create_app(parts), create_app(parts, local=True), parts.ready)
        _watch(parts.metrics, entrance)
        before, entrance.metrics = entrance.metrics, parts.metrics.text
        entrance.apps = apps
        cluster.tell()
        gc.freeze()
        logger.info("broker.owns", term=cluster.term, log=own.core.log_id, open=len(own.core.live.members))
        try:
            await stop.wait()
        finally:
            entrance.leaves, entrance.apps, entrance.metrics = True, None, before
            parts.streams.close()
            parts.waits.close()
        await entrance.quiet(FINISH_SEC)
    await cluster.release()


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
    apps = Apps(entrance.app(local=False), entrance.app(local=True), metrics_app(lambda: entrance.metrics()))
    async with served(apps, settings, strangers, listening, scraped, certificates, None, lambda: None):
        base = f"http://{joined(*listening[0].getsockname()[:2])}"
        if scraped is not None:
            logger.info("metrics.serving", at=joined(*scraped.getsockname()[:2]))
        logger.info("broker.serving", http=base, data=settings.data, node=entrance.cluster.node.name)
        supervisor.notify(supervisor.READY, os.environ)
        yield


def _watch(metrics: Metrics, entrance: Entrance) -> None:
    cluster = entrance.cluster
    watch_node(
        metrics.registry,
        owns=lambda: entrance.apps is not None and cluster.holds(),
        term=lambda: cluster.term,
        beat_age_sec=lambda: (cluster.beat_age_ms or 0) / 1_000,
        alive=lambda: sum(cluster.lives(node) for node in cluster.members.view.nodes),
        outcomes=entrance.outcomes,
    )
