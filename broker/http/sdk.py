"""Serves the JavaScript SDK for browsers and Node: one module and its TypeScript types. No key is needed."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from litestar import Request, Response, Router, get

from broker.http.packed import File, answer, compressed, file


@get("/sdk/app.mjs", include_in_schema=False)
async def module(request: Request[Any, Any, Any]) -> Response[bytes]:
    return answer(request, _file("app.mjs", "text/javascript"), {})


# TypeScript looks for the types of an `.mjs` file in a `.d.mts` file.
@get(["/sdk/app.d.ts", "/sdk/app.d.mts"], include_in_schema=False)
async def types(request: Request[Any, Any, Any]) -> Response[bytes]:
    return answer(request, _file("app.d.ts", "text/plain"), {})


@cache
def _file(name: str, media_type: str) -> File:
    return file(compressed((resources.files("broker") / "sdk" / name).read_bytes()), media_type)


routes = Router("/", route_handlers=[module, types])
