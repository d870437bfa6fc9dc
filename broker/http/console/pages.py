"""Serves the files of the console and of `/docs`.

The files need no key and contain no data: the pages ask the API, with the key of the user. They load nothing
from other servers; the content security policies below enforce that.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from litestar import Request, Response, Router, get
from litestar.params import FromPath
from litestar.response import Redirect

from broker.domain.errors import not_found
from broker.http.edge.auth import header

OURS_ALONE = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# No inline script or style, and no text can be turned into markup.
CONSOLE = f"{OURS_ALONE}; script-src 'self'; style-src 'self'; require-trusted-types-for 'script'"
# Swagger UI renders the descriptions as markup, so it cannot use trusted types.
DOCS = f"{OURS_ALONE}; script-src 'self'; style-src 'self'"
TYPES = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "mjs": "text/javascript",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}
PACKED = ".gz"
STATIC = resources.files("broker.http.console") / "static"
PAGES = ["/console", "/console/{page:str}", "/console/{page:str}/{rest:path}"]


class File(NamedTuple):
    """One file, compressed."""

    packed: bytes
    media_type: str
    tag: str


@get(PAGES, include_in_schema=False)
async def console(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The same page for all addresses; its script reads the address."""
    return _answer(request, "index.html", CONSOLE)


@get("/console/assets/{path:path}", include_in_schema=False)
async def asset(request: Request[Any, Any, Any], path: FromPath[str]) -> Response[bytes]:
    return _answer(request, path.lstrip("/"), CONSOLE)


@get("/docs", include_in_schema=False)
async def docs(request: Request[Any, Any, Any]) -> Response[bytes]:
    return _answer(request, "docs.html", DOCS)


@get("/favicon.ico", include_in_schema=False)
async def icon(request: Request[Any, Any, Any]) -> Response[bytes]:
    return _answer(request, "icon.svg", CONSOLE)


@get("/", include_in_schema=False)
async def root() -> Redirect:
    return Redirect("/console", status_code=307)


def _answer(request: Request[Any, Any, Any], name: str, policy: str) -> Response[bytes]:
    """A file, compressed if the client accepts gzip; 304 if the client has it."""
    if name not in _names():
        raise not_found("file", name)
    file = _file(name)
    headers = {
        "Cache-Control": "no-cache",  # cached, but checked each time, so that a new release is seen at once
        "Content-Security-Policy": policy,
        "ETag": file.tag,
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept-Encoding",
    }
    if header(request, b"if-none-match").decode("latin-1") == file.tag:
        return Response(b"", status_code=304, headers=headers)
    if b"gzip" in header(request, b"accept-encoding"):
        return Response(
            file.packed, media_type=file.media_type, headers=headers | {"Content-Encoding": "gzip"}
        )
    return Response(gzip.decompress(file.packed), media_type=file.media_type, headers=headers)


@cache
def _names() -> frozenset[str]:
    """The paths of all files. Only these are served."""
    return frozenset(name.removesuffix(PACKED) for name in _below(STATIC, ""))


def _below(folder: Traversable, prefix: str) -> list[str]:
    found = []
    for each in folder.iterdir():
        name = prefix + each.name
        found += _below(each, f"{name}/") if each.is_dir() else [name]
    return found


@cache
def _file(name: str) -> File:
    """One file. The largest are stored compressed: compressing them here would block the event loop."""
    packed = STATIC / (name + PACKED)
    content = (
        packed.read_bytes() if packed.is_file() else gzip.compress((STATIC / name).read_bytes(), mtime=0)
    )
    media_type = TYPES.get(name.rpartition(".")[2], TYPES["txt"])
    return File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:20]}"')


routes = Router("/", route_handlers=[root, icon, console, asset, docs])
