"""`ordain serve`: puts all parts together, runs them until a signal arrives, and stops them cleanly.

It must never decide anything about a command.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog

from broker.core import Core
from broker.http.app import create_app, metrics_app
from broker.mqtt.tls import Certificates
from broker.mqtt.websocket import upgrades
from broker.opening import open_log
from broker.seams import Served
from broker.serving import supervisor
from broker.serving.listening import Apps, bound, served
from broker.serving.owning import owning, trusted
from broker.settings import METRICS, BadSetting, Settings, within_files
from devices.mqtt_url import joined
from devices.tls import trust

logger = structlog.get_logger()


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
    certificates, tls = _certificates(settings), trusted(settings)
    if certificates is not None:
        loop.add_signal_handler(signal.SIGHUP, lambda: certificates.look(again=True))
    with ExitStack() as sockets:
        listening = [sockets.enter_context(bound("http", settings.http))]
        if settings.https:
            listening.append(sockets.enter_context(bound("https", settings.https)))
        scraped = None
        if settings.metrics not in METRICS:
            scraped = sockets.enter_context(bound("metrics", settings.metrics))
        if settings.advertise:
            from broker.serving.sharing import share  # others need no HTTP client

            await share(settings, listening, scraped, certificates, tls, stop)
            return
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
    async with owning(settings, storage, certificates, tls, stop) as own:
        keeping = own.group.create_task(storage.keep())
        core, parts, listener, settings = own.core, own.parts, own.door.listener, own.settings
        apps = Apps(create_app(parts), create_app(parts, local=True), metrics_app(parts.metrics.text))
        websockets = None if listener is None else upgrades(listener, settings.cors_origins)

        def ending() -> None:  # uvicorn would wait for open streams, and for waiting requests
            parts.streams.close()
            parts.waits.close()

        async with served(
            apps, settings, parts.strangers, listening, scraped, certificates, websockets, ending
        ):
            base = f"http://{joined(*listening[0].getsockname()[:2])}"
            if scraped is not None:
                logger.info("metrics.serving", at=joined(*scraped.getsockname()[:2]))
            logger.info("broker.serving", http=base, data=settings.data, log=core.log_id)
            helpers = []
            if demo:
                helpers = [own.group.create_task(_demo(core, settings, own.door.devices_url, base, say))]
            gc.collect()
            gc.freeze()
            gc.set_threshold(10_000, 20, 50)
            supervisor.notify(supervisor.READY, os.environ)
            await stop.wait()
            supervisor.notify(supervisor.STOPPING, os.environ)
            logger.info("broker.ending")
            for helper in (*helpers, keeping):
                helper.cancel()


async def _demo(core: Core, settings: Settings, url: str, base: str, say: Callable[[str], None]) -> None:
    """The demo only helps a newcomer. If it fails, the log says why, and the broker goes on."""
    from broker.demo import Demo  # a device's agent, which a broker does not need

    try:
        # Not the broker's own client certificate: a server may take it for who a device is.
        tls = trust(settings.mqtt_ca) if settings.mqtt_ca else None
        await Demo(core, Path(settings.data)).run(url, base, say, tls)
    except Exception as error:
        logger.error("demo.failed", why=str(error) or repr(error), exc_info=True)


def _certificates(settings: Settings) -> Certificates | None:
    if not settings.tls_certificate:
        return None
    try:
        cas = settings.tls_client_ca, settings.https_client_ca
        return Certificates(settings.tls_certificate, settings.tls_key, *cas)
    except OSError as error:  # of files, and of what is in them
        raise BadSetting(f"tls_certificate = {settings.tls_certificate!r}: {error}") from error
