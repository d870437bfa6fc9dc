"""One run of a node: it beats and waits for its turn, owns the log, and lets another node have it.

What it serves and what it owns is given to it, so that production and simulation run the same code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import NamedTuple

import structlog

from broker.nodes.cluster import Cluster
from broker.nodes.entrance import Apps, Entrance

logger = structlog.get_logger()

FINISH_SEC = 1.0  # for requests under way, when the log is handed over


class Owned(NamedTuple):
    """What handles requests while this node owns the log. `hang_up` ends the requests that may take long."""

    apps: Apps
    hang_up: Callable[[], None]


async def take_turns(
    entrance: Entrance,
    serving: AbstractAsyncContextManager[None],
    own: Callable[[], AbstractAsyncContextManager[Owned]],
    stop: asyncio.Event,
) -> None:
    """Takes part until `stop`. `serving`: in it, clients and other nodes reach the entrance. `own`: opens the
    log; at its end everything staged is durable.

    Raises:
        ExceptionGroup (of Fenced): this node owned the log, and another one has claimed it.
    """
    cluster = entrance.cluster
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cluster.run()), group.create_task(cluster.watch())]
        async with serving:
            with _failing(entrance):
                await _until(stop, group.create_task(cluster.claimed()))
                if not stop.is_set():
                    await _own(cluster, entrance, own, stop)
            entrance.leaves = True
        for task in tasks:
            task.cancel()


@contextmanager
def _failing(entrance: Entrance) -> Iterator[None]:
    """After an error, requests that wait are refused at once."""
    try:
        yield
    except BaseException:
        entrance.failed = True
        entrance.cluster.wake()
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
    cluster: Cluster,
    entrance: Entrance,
    own: Callable[[], AbstractAsyncContextManager[Owned]],
    stop: asyncio.Event,
) -> None:
    """Owns the log until `stop`, and then lets another node have it."""
    async with own() as owned:
        entrance.apps = owned.apps
        cluster.wake()
        try:
            await stop.wait()
        finally:
            entrance.leaves, entrance.apps = True, None
            owned.hang_up()
        await entrance.quiet(FINISH_SEC)
    await cluster.release()
