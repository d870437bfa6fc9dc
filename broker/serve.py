"""`ordain serve`: puts all parts together, runs them until a signal arrives, and stops them cleanly.

The only module that knows every part. It must never decide anything about a command.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from ipaddress import ip_network
from pathlib import Path

import msgspec
import structlog
import uvicorn
from litestar.types import ASGIApp

from broker import supervisor
from broker.control import refuse_replay, remember_prefix, services
from broker.core import Core
from broker.http.app import create_app, metrics_app
from broker.http.edge.protocol import Bounded
from broker.http.edge.services import Services
from broker.mqtt.door import Door, mqtt_door
from broker.mqtt.external.watch import untrusted
from broker.mqtt.figures import figures
from broker.mqtt.tls import Certificates
from broker.mqtt.websocket import upgrades
from broker.opening import open_log
from broker.pepper import pepper_of
from broker.private_socket import SOCKET, listen
from broker.seams import Served
from broker.settings import METRICS, BadSetting, Settings, address, within_files
from broker.subscriptions.outbound import HttpOutbound
from broker.type_files import load_types
from broker.world import SystemClock, SystemEntropy
from devices.mqtt_url import joined, parse_url
from devices.tls import trust

logger = structlog.get_logger()

GRACE_SEC = 5  # time for open requests after a signal; the whole shutdown stays under 10 s
BACKLOG = 2_048


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would re-raise SIGTERM and skip the broker's own shutdown."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: Settings, *, demo: bool, say: Callable[[str], None]) -> None:
    """Serves a data directory until SIGTERM or SIGINT. `say` prints lines for the person who started it.

    Raises:
        BadSetting: an address cannot be listened on, or `ordain replay` made the log.
        BadType: a file of device types is wrong.
        InUse: another broker serves the directory.
        OSError: the directory cannot be made or written.
        ExceptionGroup (of Broken): the storage failed while serving.
    """
    # Each stream and each device uses an open file. The usual limit of 1,024 files is too small.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and (settings := within_files(wanted := settings, most)) != wanted:
        logger.info(
            "limits.lowered",
            open_files=most,
            mqtt_connections=settings.mqtt_limits.connections,
            http_strangers=settings.limits.strangers,
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    certificates, tls = _certificates(settings), _trust(settings)
    if certificates is not None:
        loop.add_signal_handler(signal.SIGHUP, lambda: certificates.look(again=True))
    with ExitStack() as sockets:
        listening = [sockets.enter_context(_bound("http", settings.http))]
        if settings.https:
            listening.append(sockets.enter_context(_bound("https", settings.https)))
        scraped = None
        if settings.metrics not in METRICS:
            scraped = sockets.enter_context(_bound("metrics", settings.metrics))
        storage = await open_log(settings)
        try:
            await _serve(settings, storage, listening, scraped, certificates, tls, demo, say, stop)
        finally:
            await storage.close()
    logger.info("broker.ended")


async def _serve(
    settings: Settings,
    storage: Served,
    listening: list[socket.socket],
    scraped: socket.socket | None,
    certificates: Certificates | None,
    tls: ssl.SSLContext | None,
    demo: bool,
    say: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    types = load_types(settings.types, settings.prefix)
    outbound = HttpOutbound(settings.webhook_allow, verify=_of_webhooks(settings), limits=settings.limits)
    pepper = pepper_of(Path(settings.data), settings.key_pepper_file)
    core = Core(storage, SystemClock(), SystemEntropy(), types, settings, outbound, pepper)
    embedded = not settings.mqtt_url and settings.mqtt_server == "embedded"
    await core.open(embedded=embedded)
    await refuse_replay(core)
    await remember_prefix(core)
    async with core.running("embedded" if embedded else "external") as group:
        keeping = group.create_task(storage.keep())
        async with mqtt_door(settings, core, types, stop, certificates, tls) as door:
            if not settings.mqtt_url:
                settings = msgspec.structs.replace(settings, mqtt_listen=door.devices_url)
            parts = services(core, settings, door.rules)
            if settings.require_mqtt_acl:
                core.also_not_ready = lambda: untrusted(door.rules)
            if door.listener is None:
                parts.metrics.watch_rules(door.rules)
            parts.metrics.watch_lookups(lambda: outbound.lookups.under_way, lambda: outbound.lookups.refused)
            if door.listener is not None:
                parts.metrics.watch_listener(figures(door.listener), door.listener.refusals)
            async with _http(parts, listening, scraped, Path(settings.data), door, certificates):
                base = f"http://{joined(*listening[0].getsockname()[:2])}"
                if scraped is not None:
                    logger.info("metrics.serving", at=joined(*scraped.getsockname()[:2]))
                logger.info("broker.serving", http=base, data=settings.data, log=core.log_id)
                helpers = []
                if demo:
                    helpers = [group.create_task(_demo(core, settings, door.devices_url, base, say))]
                gc.collect()
                gc.freeze()
                gc.set_threshold(10_000, 20, 50)
                supervisor.notify(supervisor.READY, os.environ)
                await stop.wait()
                supervisor.notify(supervisor.STOPPING, os.environ)
                logger.info("broker.ending")
                for helper in (*helpers, keeping):
                    helper.cancel()
    await outbound.aclose()


async def _demo(core: Core, settings: Settings, url: str, base: str, say: Callable[[str], None]) -> None:
    """The demo only helps a newcomer. If it fails, the log says why, and the broker goes on."""
    from broker.demo import Demo  # a device's agent, which a broker does not need

    try:
        # Not the broker's own client certificate: a server may take it for who a device is.
        tls = trust(settings.mqtt_ca) if settings.mqtt_ca else None
        await Demo(core, Path(settings.data)).run(url, base, say, tls)
    except Exception as error:
        logger.error("demo.failed", why=str(error) or repr(error), exc_info=True)


@asynccontextmanager
async def _http(
    parts: Services,
    listening: list[socket.socket],
    scraped: socket.socket | None,
    directory: Path,
    door: Door,
    certificates: Certificates | None,
) -> AsyncIterator[None]:
    """Runs the public app on its addresses, the operator's on the private socket, and metrics at `scraped`.

    At the end, open requests may finish for up to GRACE_SEC.
    """
    private = listen(directory)
    websockets = None if door.listener is None else upgrades(door.listener, parts.settings.cors_origins)
    public = create_app(parts)
    keep = parts.settings.http_keep_alive_sec
    proxies = [ip_network(text) for text in parts.settings.http_trusted_proxies]
    public_http = partial(Bounded, strangers=parts.strangers, proxies=proxies)
    served = [(private, _uvicorn(create_app(parts, local=True), keep, Bounded))]
    served.append((listening[0], _uvicorn(public, keep, public_http, websockets)))
    if len(listening) > 1 and certificates is not None:
        served.append((listening[1], _uvicorn(public, keep, public_http, websockets, certificates)))
    if scraped is not None:
        served.append((scraped, _uvicorn(metrics_app(parts), keep, public_http)))
    async with asyncio.TaskGroup() as group:
        for listener, server in served:
            group.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            parts.streams.close()  # uvicorn would wait for open streams, and for waiting requests
            parts.waits.close()
            for _, server in served:
                server.should_exit = True
    (directory / SOCKET).unlink(missing_ok=True)


def _uvicorn(
    app: ASGIApp,
    keep_alive_sec: int,
    protocol: Callable[..., asyncio.Protocol],
    websockets: Callable[..., asyncio.Protocol] | None = None,
    certificates: Certificates | None = None,
) -> _Server:
    config = uvicorn.Config(
        app,
        loop="none",
        http=protocol,  # type: ignore[arg-type] # it is only called
        ws="none" if websockets is None else websockets,  # type: ignore[arg-type] # it is only called
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SEC,
        timeout_keep_alive=keep_alive_sec,
    )
    config.load()
    if certificates is not None:
        config.ssl = certificates.for_http
    return _Server(config)


def _certificates(settings: Settings) -> Certificates | None:
    if not settings.tls_certificate:
        return None
    try:
        cas = settings.tls_client_ca, settings.https_client_ca
        return Certificates(settings.tls_certificate, settings.tls_key, *cas)
    except OSError as error:  # of files, and of what is in them
        raise BadSetting(f"tls_certificate = {settings.tls_certificate!r}: {error}") from error


def _of_webhooks(settings: Settings) -> ssl.SSLContext:
    """Whose certificates webhook receivers must have, and the broker's own certificate for them."""
    files = settings.webhook_ca, settings.webhook_certificate, settings.webhook_key
    try:
        return trust(*files)
    except OSError as error:  # of files, and of what is in them
        names = ", ".join(filter(None, files))
        raise BadSetting(f"webhook_ca, webhook_certificate: {names}: {error.strerror or error}") from error


def _trust(settings: Settings) -> ssl.SSLContext | None:
    """How the link to an external MQTT server is secured; None: without TLS."""
    if not settings.mqtt_url or not parse_url(settings.mqtt_url).tls:
        return None
    key = "mqtt_ca"
    try:
        trust(settings.mqtt_ca)
        key = "mqtt_certificate"
        return trust(settings.mqtt_ca, settings.mqtt_certificate, settings.mqtt_key)
    except OSError as error:  # of files, and of what is in them
        raise BadSetting(f"{key} = {getattr(settings, key)!r}: {error.strerror or error}") from error


@contextmanager
def _bound(key: str, text: str) -> Iterator[socket.socket]:
    host, port = address(key, text)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(BACKLOG)  # clients can connect from now on, and no other process can take the port
    except OSError as error:
        raise BadSetting(f"{key} = {text!r}: cannot be listened on: {error.strerror or error}") from error
    with listening:
        yield listening
