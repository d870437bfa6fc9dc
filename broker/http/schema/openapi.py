"""The OpenAPI document, generated from the handlers and Structs.

Descriptions come from docstrings and fields, so they are not written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from http import HTTPStatus
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec
from litestar import Litestar, Response, Router, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, License, SecurityScheme
from litestar.routes import HTTPRoute

from broker import __version__
from broker.http.compat import app_command, iotee
from broker.http.edge import health, positions
from broker.http.edge.auth import Call
from broker.http.edge.errors import ErrorBody
from broker.http.schema import asyncapi
from broker.http.v1 import audit, events, fanout, keys, lanes, past, pull, repairs, stats, unmatched, webhooks
from broker.http.v1 import commands as v1
from broker.http.v1 import devices as v1_devices
from broker.http.v1 import system as v1_system
from devices.names import PATTERN as NAME_PATTERN

DESCRIBED = (
    v1_devices.routes,
    lanes.routes,
    v1.routes,
    fanout.routes,
    app_command.routes,
    repairs.routes,
    events.routes,
    pull.routes,
    unmatched.routes,
    past.routes,
    iotee.routes,
    webhooks.routes,
    v1_system.routes,
    stats.routes,
    keys.routes,
    audit.routes,
    health.routes,
)
DESCRIPTION = """Commands for MQTT devices: stored durably, delivered at least once, with their full history.

Every call under `/v1` needs a key. Times are RFC 3339 in UTC with milliseconds. `{device}` is a device's
`id` or its `hardware_id`. Objects of another project answer 404. Lists have the form
`{data, has_more, next_cursor}`."""
TAGS = {
    "Commands": "Send, follow, cancel and retry commands.",
    "App": "The routes that the SDKs use: the same commands, with the fields of the SDK.",
    "Devices": "Devices, their lanes, their types, and answers that matched no command.",
    "Unversioned": "The same commands with other paths, field names and status words; and erasing.",
    "Events": "Events as CloudEvents, in pages or as an endless stream.",
    "Webhooks": "Endpoints that receive events, and the deliveries to them.",
    "System": "The state of the broker. Most of these routes need no key.",
}
# Path parameters that have the same meaning in every path.
PATH_PARAMETERS = {
    "device": "The device's `id` or `hardware_id`.",
    "command_id": "The command's `id`.",
    "key_id": "The key's `id`.",
    "webhook": "The webhook's `id`.",
    "position": "The event's position in the log.",
}
# Litestar uses these texts for an answer without a description.
STANDARD_PHRASES = {status.description for status in HTTPStatus}
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}
ANSWER_HEADERS = {
    "401": {"WWW-Authenticate": {"description": "`Bearer`", "schema": {"const": "Bearer"}}},
    "429": RETRY_AFTER,
    "503": RETRY_AFTER,
}
REPLAYED = {
    "description": "A repeated request, same idempotency key and body: the first command, as it is now.",
    "headers": {"Idempotent-Replayed": {"description": "`true`", "schema": {"const": "true"}}},
}


OPEN = {"description": "With `wait`: the time is over, and the command is still open."}
SERVER_SENT_EVENTS = {
    "schema": {
        "type": "string",
        "description": "Server-sent events, without end. First `retry` (ms) and an `id` without data: where "
        "the stream begins. Then of each event an `id`, `<log id>:<position>`, and `data`: the `CloudEvent` "
        "as JSON in one line. A comment (`: ping`) comes every 15 seconds.",
    },
    "example": "retry: 3000\nid: log_01m8cqbeg7f7wt8w78c3j004rx:16\n\n"
    'id: log_01m8cqbeg7f7wt8w78c3j004rx:17\ndata: {"specversion":"1.0","id":"17", …}\n\n: ping\n',
}
SIGNED = {
    "webhook-id": "The same for each attempt: remember it, and handle an event once.",
    "webhook-timestamp": "When it was sent, in seconds since 1970. Refuse what is older than five minutes.",
    "webhook-signature": "`v1,` and the Base64 of HMAC-SHA256 over `<id>.<timestamp>.<body>`; several during "
    "a rotation of the secret, separated by spaces.",
}
# The requests that the broker sends to webhooks.
OUTGOING = {
    "event": {
        "post": {
            "operationId": "receive_event",
            "tags": ["Webhooks"],
            "summary": "An event, sent to your webhook",
            "description": "Sent at least once, in order for each device. Signed as the Standard Webhooks "
            "specification says.",
            "security": [],
            "parameters": [
                {"name": name, "in": "header", "required": True, "schema": {"type": "string"}}
                | {"description": text}
                for name, text in SIGNED.items()
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "application/cloudevents+json": {"schema": {"$ref": "#/components/schemas/CloudEvent"}}
                },
            },
            "responses": {
                "2XX": {"description": "Taken. Every other answer, a redirect too, is a failure."},
                "410": {"description": "Nothing more is sent to this webhook."},
                "429": {"description": "Sent again after `Retry-After`; 503 likewise."},
            },
        }
    }
}


@get("/openapi.json", include_in_schema=False)
async def description() -> Response[bytes]:
    return Response(document(), media_type="application/json")


routes = Router("/", route_handlers=[description, asyncapi.description])


@cache
def document() -> bytes:
    """OpenAPI 3.1, JSON."""
    config = OpenAPIConfig(
        title="Ordain",
        version=__version__,
        description=DESCRIPTION,
        license=License(name="Apache 2.0", identifier="Apache-2.0"),
        use_handler_docstrings=True,
        operation_id_creator=lambda handler, method, path: handler.handler_name,
        components=Components(
            security_schemes={
                "bearer": SecurityScheme(
                    type="http", scheme="bearer", description="A key, or a device's token."
                ),
                "key": SecurityScheme(
                    type="apiKey", name="X-API-Key", security_scheme_in="header", description="The same."
                ),
                "ticket": SecurityScheme(
                    type="apiKey",
                    name="ticket",
                    security_scheme_in="query",
                    description="From `POST /v1/events/ticket`; for one event stream.",
                ),
            }
        ),
        security=[{"bearer": []}, {"key": []}],
    )
    app = Litestar(
        route_handlers=[*DESCRIBED], request_class=Call, openapi_config=config, logging_config=None
    )
    schema = app.openapi_schema.to_schema()
    handlers = {
        handler.handler_name: handler
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
    }
    # Litestar's own schema of a Struct loses bounds and docstrings; the schema from msgspec keeps them.
    schema["components"]["schemas"] = _schemas(
        handlers[each["operationId"]] for _, each in _operations(schema)
    )
    for path, operation in _operations(schema):
        _finish(path, operation, handlers[operation["operationId"]], schema["components"]["schemas"])
    schema["webhooks"] = OUTGOING
    used = {tag for _, operation in _operations(schema) for tag in operation["tags"]}
    schema["tags"] = [{"name": tag, "description": text} for tag, text in TAGS.items() if tag in used]
    return msgspec.json.encode(schema)


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def _schemas(handlers: Iterable[HTTPRouteHandler]) -> dict[str, Any]:
    """The JSON Schemas of all Structs that the handlers accept or return, by name."""
    found: dict[Any, None] = {ErrorBody: None}
    for handler in handlers:
        fields = [handler.parsed_return_field, handler.parsed_data_field]
        kinds = [field.annotation for field in fields if field is not None]
        kinds += [spec.data_container for spec in (handler.responses or {}).values()]
        while kinds:
            kind = kinds.pop()
            if get_origin(kind) is not None or isinstance(kind, UnionType):
                kinds += get_args(kind)
            elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                found[kind] = None
    _, named = msgspec.json.schema_components(list(found), ref_template="#/components/schemas/{name}")
    return dict(sorted(named.items()))


def _finish(path: str, operation: dict[str, Any], handler: HTTPRouteHandler, schemas: dict[str, Any]) -> None:
    """Adds to an operation what Litestar leaves out: summary, scopes, examples, headers of answers."""
    title, _, text = operation["description"].partition("\n")
    operation["summary"], operation["description"] = title.strip(), text.strip()
    if not operation["description"]:
        del operation["description"]
    if scope := handler.opt.get("scope"):
        scopes = [scope, *handler.opt.get("also", ())]
        operation["security"] = [{"bearer": scopes}, {"key": scopes}]
        if handler.opt.get("ticket"):
            operation["security"].append({"ticket": []})
    for parameter in operation.get("parameters", []):
        _finish_parameter(parameter)
    body = operation.get("requestBody", {})
    for content in body.get("content", {}).values():
        content["example"] = _example(content["schema"], schemas)
        body["required"] = {"type": "null"} not in content["schema"].get("oneOf", [])
    answers = operation["responses"]
    if "201" in answers and (path in (v1.CREATE, iotee.CREATE) or path.endswith("/retry")):
        answers["200"] = REPLAYED | {"content": answers["201"]["content"]}
    if any(parameter["name"] == "wait" for parameter in operation.get("parameters", [])):
        answers["202"] = OPEN | {"content": answers.get("201", answers["200"])["content"]}
    if path == "GET /v1/events":
        answers["200"]["content"][events.STREAM] = SERVER_SENT_EVENTS
    for status, answer in answers.items():
        if not answer.get("headers"):
            answer["headers"] = ANSWER_HEADERS.get(status, {})
        if answer["description"] in STANDARD_PHRASES:
            answer["description"] = _about(answer, schemas) or operation["summary"]
        if not answer["headers"]:
            del answer["headers"]
    operation["responses"] = dict(sorted(answers.items()))


def _finish_parameter(parameter: dict[str, Any]) -> None:
    """Removes null from a parameter's schema: a path, query or header cannot carry null. An optional
    parameter is only not required."""
    schema = parameter["schema"]
    kinds = [kind for kind in schema.pop("oneOf", []) if kind != {"type": "null"}]
    for kind in kinds:
        schema |= kind
    if "anyOf" in schema:
        del schema["type"]
    if "enum" in schema:
        schema |= {"type": "string", "enum": [value for value in schema["enum"] if value is not None]}
    for bound in {"minimum", "maximum"} & schema.keys():
        schema[bound] = int(schema[bound])
    schema.pop("description", None)
    if parameter["in"] == "path":
        schema["pattern"] = NAME_PATTERN if parameter["name"] != "position" else positions.PATTERN
        parameter.setdefault("description", PATH_PARAMETERS.get(parameter["name"], ""))
    for silent in ("deprecated", "allowEmptyValue", "allowReserved"):
        parameter.pop(silent, None)


def _example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """An example body, built from the first example or enum value of each field."""
    for kind in (schema, *schema.get("oneOf", [])):
        if "$ref" in kind:
            fields = schemas[kind["$ref"].rpartition("/")[2]]["properties"]
            known = {name: field.get("examples") or field.get("enum") for name, field in fields.items()}
            return {name: values[0] for name, values in known.items() if values}
    return {}


def _about(answer: dict[str, Any], schemas: dict[str, Any]) -> str | None:
    """The docstring of the Struct that an answer contains."""
    contents = [content["schema"].get("$ref", "") for content in answer.get("content", {}).values()]
    said = [schemas.get(name.rpartition("/")[2], {}).get("description") for name in contents]
    return said[0] if said else None
