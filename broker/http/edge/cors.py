"""CORS: pages from the origins in the settings may use the API with a key; all other origins may not.

The API uses no cookies, so a page can never use a key that nobody gave it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, PATCH, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, idempotency-key, last-event-id, x-api-key",
    ),
    (b"access-control-max-age", b"600"),
]
SHOWN = [
    (
        b"access-control-expose-headers",
        b"retry-after, idempotent-replayed, location, ratelimit, ratelimit-policy",
    )
]


def allowing(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Wraps the app so that pages from these origins may call it, such as `https://console.example.org`."""
    if not origins:
        return app
    allowed = {origin.encode() for origin in origins}

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        request = cast(dict[str, Any], scope)
        headers = dict(request["headers"]) if request["type"] == "http" else {}
        origin = headers.get(b"origin", b"")
        if origin not in allowed:
            await app(scope, receive, send)
            return
        granted = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        if request["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            start = {"type": "http.response.start", "status": 204, "headers": granted + PREFLIGHT}
            await send(cast(Message, start))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return

        async def granting(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *granted, *SHOWN]
            await send(message)

        await app(scope, receive, granting)

    return asked
