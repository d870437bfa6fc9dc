"""The ASGI app: routes, error handlers, response headers and request metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

from litestar import Litestar
from litestar.plugins import PluginProtocol
from litestar.plugins.core import MsgspecDIPlugin
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from broker.domain.events import Via
from broker.engine.ids import new_id
from broker.engine.writer import via
from broker.http import local as local_routes
from broker.http import sdk
from broker.http.console import pages as console
from broker.http.direct import with_direct_create
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call
from broker.http.edge.cors import allowing
from broker.http.edge.errors import HANDLERS
from broker.http.edge.rates import rate_headers
from broker.http.edge.services import SERVED, Served, Services
from broker.http.schema import openapi
from broker.seams import patience
from devices.names import is_name

PATIENCE_SEC = 5.0
ROUTES = (*openapi.DESCRIBED, openapi.routes, sdk.routes, console.routes)
# Answers contain grants and tokens, so no proxy or browser may cache them. The console's files contain
# none and set their own `cache-control`.
NO_STORE = (b"cache-control", b"no-store")
HEADERS = [(b"x-content-type-options", b"nosniff")]
OF_A_BODY = (b"content-type", b"content-length")


class _Litestar(Litestar):
    """Litestar without its plugins for pydantic and attrs, which nothing here uses.

    Where pydantic is installed, to load it and ask its plugins takes 0.15 s of each start.
    """

    @staticmethod
    def _get_default_plugins(plugins: list[PluginProtocol]) -> list[PluginProtocol]:
        return [*plugins, MsgspecDIPlugin()]


@cache
def _routes(*, local: bool) -> Litestar:
    """The public routes, or those under /local. They do not depend on the broker: once in a process."""
    return _Litestar(
        route_handlers=[local_routes.routes] if local else ROUTES,
        request_class=Call,
        response_class=Json,
        exception_handlers=HANDLERS,
        openapi_config=None,
        logging_config=None,
    )


def warm() -> None:
    """Builds all routes, so that the first app is there at once."""
    for local in (False, True):
        _routes(local=local)


def metrics_app(text: Callable[[], bytes]) -> ASGIApp:
    """The app on the listener of `metrics = "HOST:PORT"`: `GET /metrics`, and nothing else."""

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        asked: dict[str, Any] = {**scope}
        found = asked["path"] == "/metrics" and asked["method"] in ("GET", "HEAD")
        body = text() if found else b""
        headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), (b"content-length", b"%d" % len(body))]
        status = 200 if found else 404
        await send({"type": "http.response.start", "status": status, "headers": [*headers, NO_STORE]})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app


def create_app(services: Services, *, local: bool = False) -> ASGIApp:
    """The app on the public address, or, `local`, the one on the private socket.

    A request on the private socket comes from the operator: it needs no key, has all scopes, and can use
    the routes under /local. The public app does not have those routes.
    """
    ours, public = Served(services, local), with_direct_create(_routes(local=False))
    operators: ASGIApp = _routes(local=True) if local else public
    metrics = services.metrics

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request: dict[str, Any] = {**scope, SERVED: ours}
        inner = operators if request["path"].startswith("/local/") else public
        if request["type"] != "http":
            await inner(scope, receive, send)
            return
        pending = request["path"].rstrip("/").endswith("/commands/pending")
        if request["method"] == "HEAD" and not pending:
            # HEAD runs as GET, and uvicorn drops the body because its own scope still says HEAD.
            # `commands/pending` is excluded: its answer hands commands over, and they would be lost.
            request["method"], request["head"] = "GET", True
        methods_asked = request["method"] == "OPTIONS"
        if methods_asked:
            # Litestar's own answer to OPTIONS omits methods. An unknown method gets 405 with the full list.
            request["method"] = "-"
        since, status = metrics.now_ms(), 0
        changes = request["method"] != "GET" or pending
        caused = _via(ours, request) if changes else None

        def note(status: int) -> None:
            # Requests that match no route share one label: the path is user input and must not become a
            # metric label.
            route = request.get("path_template")
            metrics.request(request["method"] if route else "-", route or "-", status, since)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                cached = any(name == b"cache-control" for name, _ in message["headers"])
                message["headers"] = [
                    *message["headers"],
                    *HEADERS,
                    *([] if cached else [NO_STORE]),
                    *rate_headers(services, request),
                    *([] if caused is None else [(b"x-request-id", caused.request.encode())]),
                ]
                if methods_asked and status == 405:
                    message["status"] = status = 204
                    message["headers"] = [each for each in message["headers"] if each[0] not in OF_A_BODY]
                note(status)  # at the start of the answer, because a stream can last for days
            elif status == 204:
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        token, waiting = via.set(caused), patience.set(PATIENCE_SEC)
        try:
            await inner(cast(Scope, request), receive, noting)
        finally:
            via.reset(token)
            patience.reset(waiting)
            if not status:
                note(500)

    return allowing(app, services.settings.cors_origins)


def _via(ours: Served, request: Mapping[str, Any]) -> Via:
    """The request, for the audit. Its id is the client's `X-Request-Id`, if that is a name, else a new one.
    The address of the peer is `local` on the private socket."""
    given = next((value for name, value in request["headers"] if name == b"x-request-id"), b"").decode(
        "latin-1"
    )
    writer = ours.services.commands.writer
    peer = request.get("client") or ("", 0)
    return Via(
        request=given if is_name(given) else new_id("req", writer.now(), writer.entropy),
        peer="local" if ours.local else str(peer[0]),
    )
