"""The JSON response class: encodes a Struct and sends it directly.

Litestar's own response copies the headers four times, which costs a fifth of the request time. This API
needs no cookies, background tasks or other media types.
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
    """A Struct as JSON. Without `status_code` the handler's own status applies."""

    def __init__(
        self,
        content: T,
        *,
        status_code: int | None = None,
        headers: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        # The parent's __init__ is not called: this class uses nothing that it sets up.
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
