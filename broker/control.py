"""How the command line reaches a broker: through its private socket, or by opening the log itself.

While a broker serves a data directory, the command line sends HTTP requests to a Unix socket in that
directory. Otherwise it opens the log and runs the same HTTP app in its own process.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import structlog
import uvloop

from broker.core import Core
from broker.domain.mqtt_rules import MqttRules
from broker.http.app import create_app
from broker.http.edge.services import NodesFacts, Services
from broker.http.edge.strangers import Strangers
from broker.http.edge.streams import Streams
from broker.http.edge.tickets import Tickets
from broker.http.edge.waits import Waits
from broker.metrics.metrics import Metrics
from broker.often import Often
from broker.opening import open_log
from broker.pepper import pepper_of
from broker.private_socket import TIMEOUT_SEC, answers, socket_path
from broker.seams import Put, Sql, Storage
from broker.settings import BadSetting, Settings
from broker.type_files import load_types
from broker.world import InUse, SystemClock, SystemEntropy, there_is_a_log

if TYPE_CHECKING:  # `ordain serve` needs no HTTP client of this kind, and it takes 0.05 s to load
    import httpx2

T = TypeVar("T")

FREE_WITHIN_SEC = 10.0
LOOK_AGAIN_SEC = 0.05


def services(
    core: Core,
    shown: Settings | None = None,
    rules: MqttRules | None = None,
    strangers: Strangers | None = None,
    nodes: Callable[[], NodesFacts | None] = lambda: None,
) -> Services:
    """Builds what the HTTP app needs from a core that is open and has its MQTT link.

    `shown`: the settings that `/v1/system` shows, with the real port instead of port 0.
    `rules`: of the MQTT server; None: no broker serves. `strangers`: if the connections are older.
    `nodes`: what is known of the other brokers on this log.
    """
    metrics = Metrics(core.writer.clock)
    metrics.watch(core)
    sent = metrics.subscribers("sse", lambda: streams.lag)
    streams = Streams(core.feed, core.log_id, core.settings.limits.streams_per_project, sent.inc)
    waits = Waits(core.feed, core.settings.limits.waits_per_project)
    tickets = Tickets(core.writer, core.keys)
    limits = (shown or core.settings).limits
    strangers = strangers or Strangers(limits.strangers, limits.strangers_per_address)
    metrics.watch_strangers(lambda: strangers.open, strangers.limit, lambda: strangers.closed)
    metrics.watch_streams(lambda: streams.open, lambda: waits.open, lambda: tickets.unused)
    told = metrics.subscribers("mqtt", lambda: core.mqtt_events.lag if core.settings.mqtt_events else 0)
    core.mqtt_events.sent = told.inc

    def revoked(actor: str) -> None:
        streams.revoked(actor)
        waits.revoked(actor)

    core.keys.ended = revoked
    return Services(
        commands=core.commands,
        repairs=core.repairs,
        erasures=core.erasures,
        fanout=core.fanout,
        registry=core.registry,
        keys=core.keys,
        verification=core.verification,
        grants=core.grants,
        feed=core.feed,
        mqtt_events=core.mqtt_events,
        webhooks=core.webhooks,
        streams=streams,
        waits=waits,
        tickets=tickets,
        strangers=strangers,
        often=Often(lambda: core.writer.clock.monotonic_ms() / 1_000),
        mqtt_rules=rules or MqttRules(users="none"),
        dispatch=core.dispatch,
        intake=core.intake,
        pull=core.pull,
        link=core.link,
        metrics=metrics,
        limits=core.settings.limits,
        settings=shown or core.settings,
        log_id=core.log_id,
        cursor_key=core.cursor_key,
        nodes=nodes,
        ready=core.not_ready,
    )


def ask_alone(
    settings: Settings, work: Callable[[httpx2.AsyncClient, bool], Awaitable[T]], *, make: bool = False
) -> T:
    """Asks as the operator in an event loop; if no broker serves, its parts run in this process.

    Raises:
        Broken: there is no log, and `make` is not set.
    """
    if not (make or settings.log):
        there_is_a_log(Path(settings.data))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("critical")
    )  # errors arrive as exceptions, so log lines would only repeat them

    async def asking() -> T:
        async with operator(settings) as (client, serving):
            return await work(client, serving)

    return uvloop.run(asking())


@asynccontextmanager
async def operator(settings: Settings) -> AsyncIterator[tuple[httpx2.AsyncClient, bool]]:
    """Gives an HTTP client with the operator's rights on this data directory, and whether a broker serves it.

    Raises:
        BadSetting: the prefix differs from the one that the log was last served with.
        InUse: another process has the log open, does not answer, and does not close it within 10 s.
        BadType: a file of device types is wrong.
        OSError, Broken: the directory or the log cannot be opened.
    """
    import httpx2

    directory = Path(settings.data)
    storage = await _opened(settings)
    if storage is None:
        with socket_path(directory) as path:
            # Without TLS. This context trusts nobody; the usual one takes 0.06 s to make.
            untrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            transport = httpx2.AsyncHTTPTransport(uds=path, verify=untrusting)
            async with _client(transport) as client:
                yield client, True
        return
    try:
        pepper = pepper_of(directory, settings.key_pepper_file)
        types = load_types(settings.types, settings.prefix)
        core = Core(storage, SystemClock(), SystemEntropy(), types, settings, pepper=pepper)
        await core.open(embedded=False)
        await _check_prefix(core)
        async with core.running(None):
            app = create_app(services(core), local=True)
            async with _client(httpx2.ASGITransport(app=cast(Any, app))) as client:
                yield client, False
                await core.erasures.finished()
    finally:
        await storage.close()


async def refuse_replay(core: Core) -> None:
    """Refuses to serve a log that `ordain replay` made: only the broker of the original log may hand over its
    commands.

    Raises:
        BadSetting: `ordain replay` made this log.
    """

    async def work(sql: Sql) -> object:
        return await sql.one("SELECT 1 FROM meta WHERE key = 'replayed'")

    if await core.storage.read(work) is not None:
        raise BadSetting(f"data = {core.settings.data!r}: was made by `ordain replay` and cannot be served")


async def remember_prefix(core: Core) -> None:
    """Stores the topic prefix in the log's file. The command line compares it with its own settings, so that
    it does not create commands for other topics."""
    await core.writer.prepare(Put("meta", ("prefix", core.settings.prefix)))


async def _check_prefix(core: Core) -> None:
    async def work(sql: Sql) -> list[tuple[str]]:
        return await sql.all("SELECT value FROM meta WHERE key = 'prefix'")

    settings = core.settings
    for (served,) in await core.storage.read(work):
        if served != settings.prefix:
            raise BadSetting(
                f"prefix = {settings.prefix!r}: {settings.data} was last served with {served!r}; "
                "give the same --config"
            )


async def _opened(settings: Settings) -> Storage | None:
    """Opens the log; None if a broker answers. Waits up to 10 s for a broker that is starting or stopping.

    Raises:
        InUse: the log is still in use after that time.
    """
    directory = Path(settings.data)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + FREE_WITHIN_SEC
    while not answers(directory):
        try:
            return await open_log(settings)
        except InUse:
            if loop.time() > deadline:
                raise
        await asyncio.sleep(LOOK_AGAIN_SEC)
    return None


def _client(transport: httpx2.AsyncBaseTransport) -> httpx2.AsyncClient:
    import httpx2

    return httpx2.AsyncClient(transport=transport, base_url="http://ordain", timeout=TIMEOUT_SEC)
