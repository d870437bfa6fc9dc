"""The description of the API, worked out of the handlers themselves, and a page that shows it offline.

Nothing is written by hand that a handler or a Struct says already, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

import msgspec
from litestar import Litestar, Response, Router, get
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from broker import __version__
from broker.http import lanes, pull, repairs, system, unmatched, v1, v1_devices, v1_system
from broker.http.auth import Call

DESCRIBED = (
    v1_devices.routes,
    lanes.routes,
    pull.routes,
    v1.routes,
    repairs.routes,
    unmatched.routes,
    v1_system.routes,
    system.routes,
)
# The page runs its own script and speaks to this broker alone.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
DESCRIPTION = """Commands for MQTT devices: accepted durably, delivered at least once, explained afterwards.

Every call under `/v1` needs a key. Times are RFC 3339 in UTC with milliseconds. `{device}` is a device's
`id` or its `hardware_id`. What belongs to another project is 404. Lists are
`{data, has_more, next_cursor}`."""
RETRY_AFTER = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "string"}},
}
REPLAYED = {
    "description": "The same idempotency key and body came before: the first command, as it is now.",
    "headers": {
        "Idempotent-Replayed": {"description": "`true`", "schema": {"type": "string", "const": "true"}}
    },
}


@get("/openapi.json", include_in_schema=False)
async def description() -> Response[bytes]:
    return Response(document(), media_type="application/json")


@get("/docs", include_in_schema=False)
async def docs() -> Response[bytes]:
    return Response(_page(), media_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})


routes = Router("/", route_handlers=[description, docs])


@cache
def _page() -> bytes:
    return (resources.files("broker.http") / "docs.html").read_bytes()


@cache
def document() -> bytes:
    """OpenAPI 3.1, JSON."""
    config = OpenAPIConfig(
        title="Ordain",
        version=__version__,
        description=DESCRIPTION,
        use_handler_docstrings=True,
        operation_id_creator=lambda handler, method, path: handler.handler_name,
        components=Components(
            security_schemes={
                "bearer": SecurityScheme(type="http", scheme="bearer", description="An API key."),
                "key": SecurityScheme(
                    type="apiKey", name="X-API-Key", security_scheme_in="header", description="An API key."
                ),
            }
        ),
        security=[{"bearer": []}, {"key": []}],
    )
    app = Litestar(
        route_handlers=[*DESCRIBED], request_class=Call, openapi_config=config, logging_config=None
    )
    schema = app.openapi_schema.to_schema()
    for path, operation in _operations(schema):
        _finish(path, operation)
        for body in _bodies(operation):
            schema["components"]["schemas"][body]["additionalProperties"] = False
    return msgspec.json.encode(schema)


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def _bodies(operation: dict[str, Any]) -> list[str]:
    """The schemas of what a request may send."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    body = content.get("schema", {})
    refs = [part.get("$ref", "") for part in (body, *body.get("oneOf", []))]
    return [ref.rpartition("/")[2] for ref in refs if ref]


def _finish(path: str, operation: dict[str, Any]) -> None:
    """What Litestar has no words for: the title in a docstring's first line, headers of answers, no body."""
    title, _, text = operation["description"].partition("\n")
    operation["summary"], operation["description"] = title.strip(), text.strip()
    if not operation["description"]:
        del operation["description"]
    answers = operation["responses"]
    for status in {"429", "503"} & answers.keys():
        answers[status]["headers"] = RETRY_AFTER
    if path == v1.CREATE or path.endswith("/retry"):
        answers["200"] = REPLAYED | {"content": answers["201"]["content"]}
    if path.endswith(("/abandon", "/retry", "/heartbeat", "/ack")):
        operation["requestBody"]["required"] = False
