"""How an answer leaves: JSON straight to the wire.

Litestar's own way from a Struct to bytes copies its headers four times, which costs a fifth of a
request; nothing here needs cookies, background tasks or other media types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.types import ASGIApp, Receive, Scope, Send

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


class Json(Response[T]):
    """A Struct as JSON. The handler's own status holds where none is given."""

    def __init__(
        self,
        content: T,
        *,
        status_code: int | None = None,
        headers: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        # Not the parent's: everything it would set up is left out here.
        self.content = content
        self.status_code = status_code
        self.more = headers or {}

    def to_asgi_response(  # type: ignore[override]
        self, app: None, request: Request[Any, Any, Any], *, status_code: int | None = None, **_: Any
    ) -> ASGIApp:
        status, body = self.status_code or status_code or 200, _encode(self.content)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(name.lower().encode(), value.encode()) for name, value in self.more.items()]

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

        return answer
