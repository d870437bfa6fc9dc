"""Serves the files of the console and of `/docs`.

The files need no key and contain no data: the pages ask the API, with the key of the user. They load nothing
from other servers; the content security policies below enforce that.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from litestar import Request, Response, Router, get
from litestar.params import FromPath
from litestar.response import Redirect

from broker.domain.errors import not_found
from broker.http.packed import File, answer, compressed, file

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
    if name not in _names():
        raise not_found("file", name)
    return answer(request, _file(name), {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})


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
    content = packed.read_bytes() if packed.is_file() else compressed((STATIC / name).read_bytes())
    return file(content, TYPES.get(name.rpartition(".")[2], TYPES["txt"]))


routes = Router("/", route_handlers=[root, icon, console, asset, docs])
