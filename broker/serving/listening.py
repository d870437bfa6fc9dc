"""The HTTP servers of `ordain serve`: their addresses, and uvicorn under them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple

import uvicorn
from litestar.types import ASGIApp

from broker.http.edge.protocol import Bounded
from broker.http.edge.strangers import Strangers
from broker.log.postgresql.vanished import options
from broker.mqtt.tls import Certificates
from broker.private_socket import SOCKET, listen
from broker.settings import BadSetting, Settings, address

GRACE_SEC = 5  # time for open requests after a signal; the whole shutdown stays under 10 s
BACKLOG = 2_048
VANISHED_SEC = 30  # a client that has vanished while nothing was under way to it; see `vanished`
UNREAD_SEC = 120  # one that reads nothing


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would re-raise SIGTERM and skip the broker's own shutdown."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Apps(NamedTuple):
    """What is served: on the public addresses, on the private socket, and where metrics have their own."""

    public: ASGIApp
    local: ASGIApp
    metrics: ASGIApp


@asynccontextmanager
async def served(
    apps: Apps,
    settings: Settings,
    strangers: Strangers,
    listening: Sequence[socket.socket],
    scraped: socket.socket | None,
    certificates: Certificates | None,
    websockets: Callable[..., asyncio.Protocol] | None,
    ending: Callable[[], None],
) -> AsyncIterator[None]:
    """Runs the public app on its addresses, the operator's on the private socket, and metrics at `scraped`.

    At the end it calls `ending`, and open requests may finish for up to GRACE_SEC.
    """
    directory = Path(settings.data)
    private = listen(directory)
    keep = settings.http_keep_alive_sec
    proxies = [ip_network(text) for text in settings.http_trusted_proxies]
    public_http = partial(Bounded, strangers=strangers, proxies=proxies)
    servers = [(private, _uvicorn(apps.local, keep, Bounded))]
    servers.append((listening[0], _uvicorn(apps.public, keep, public_http, websockets)))
    if len(listening) > 1 and certificates is not None:
        servers.append((listening[1], _uvicorn(apps.public, keep, public_http, websockets, certificates)))
    if scraped is not None:
        servers.append((scraped, _uvicorn(apps.metrics, keep, public_http)))
    async with asyncio.TaskGroup() as group:
        for listener, server in servers:
            group.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            ending()
            for _, server in servers:
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


@contextmanager
def bound(key: str, text: str) -> Iterator[socket.socket]:
    host, port = address(key, text)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for each in options(VANISHED_SEC, UNREAD_SEC):  # connections inherit them
            listening.setsockopt(*each)
        listening.bind(where)
        listening.listen(BACKLOG)  # clients can connect from now on, and no other process can take the port
    except OSError as error:
        raise BadSetting(f"{key} = {text!r}: cannot be listened on: {error.strerror or error}") from error
    with listening:
        yield listening
