"""Creating a command without Litestar's general path, which costs more than the decision on the command.

`v1.commands` declares and describes the route like all others. Here the same function is called, after the
same checks and with the same errors. A request of any other form takes the general path. Litestar also checks
the header Host; here the server has done so before, when it read the headers.
"""

from __future__ import annotations

import re
from typing import Any, cast

from litestar import Litestar
from litestar.routes import HTTPRoute
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from broker.domain.errors import invalid
from broker.http.edge.auth import Call, authorize
from broker.http.edge.errors import answer_to

TEMPLATE = "/v1/devices/{device}/commands"
_PATH = re.compile("/v1/devices/([A-Za-z0-9][A-Za-z0-9_-]{0,63})/commands")


def with_direct_create(app: Litestar) -> ASGIApp:
    """The app, with the direct path in front of it."""
    routes = (route for route in app.routes if isinstance(route, HTTPRoute))
    route = next(route for route in routes if route.path_format == TEMPLATE)
    handler, _ = route.route_handler_map["POST"]

    async def create(request: Call, device: str, keys: list[bytes]) -> ASGIApp:
        await authorize(request)
        if not await request.body():
            raise invalid("body", "is required")
        body = await request.json()
        key = keys[0].decode("latin-1") if keys else None
        made = await handler.fn(request=request, device=device, data=body, idempotency_key=key)
        return cast(ASGIApp, made.to_asgi_response(app=None, request=request))

    async def direct(scope: Scope, receive: Receive, send: Send) -> None:
        asked = cast(dict[str, Any], scope)
        found = _PATH.fullmatch(asked["path"]) if asked.get("method") == "POST" else None
        keys = [value for name, value in asked["headers"] if name == b"idempotency-key"] if found else []
        # The general path checks a query and the length of the key, and chooses one of several keys.
        usual = not asked["query_string"] and [0 < len(key) < 256 for key in keys] in ([], [True])
        if found is None or not usual:
            await app(scope, receive, send)
            return
        asked |= {"path_template": TEMPLATE, "path_params": {"device": found[1]}, "route_handler": handler}
        request, begun = Call(scope, receive, send), False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            answer = await create(request, found[1], keys)
            await answer(scope, receive, noting)
        except Exception as error:
            if begun:
                raise
            answer = answer_to(request, error).to_asgi_response(app=None, request=request)
            await answer(scope, receive, send)

    return direct
