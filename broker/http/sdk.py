"""Serves the JavaScript SDK for browsers and Node: one module and its TypeScript types. No key is needed."""

from __future__ import annotations

from functools import cache
from importlib import resources

from litestar import Response, Router, get


@get("/sdk/app.mjs", include_in_schema=False)
async def module() -> Response[bytes]:
    return Response(_file("app.mjs"), media_type="text/javascript")


# TypeScript looks for the types of an `.mjs` file in a `.d.mts` file.
@get(["/sdk/app.d.ts", "/sdk/app.d.mts"], include_in_schema=False)
async def types() -> Response[bytes]:
    return Response(_file("app.d.ts"), media_type="text/plain")


@cache
def _file(name: str) -> bytes:
    return (resources.files("broker") / "sdk" / name).read_bytes()


routes = Router("/", route_handlers=[module, types])
