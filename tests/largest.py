"""The largest inputs that each HTTP route allows, made from the OpenAPI description.

A route that takes a body gets one body of each kind in `FILLINGS`: where the description leaves a value open,
it stands for as much as the limits allow. So a new route is measured without a new line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from broker.settings import Limits

METHODS = ("get", "post", "patch", "put", "delete")
# What the other fields of a body may take.
ROOM_BYTES, ROOM_VALUES = 2_000, 100
# Fields that contradict another one, or must be unique.
LEFT_OUT = frozenset({"idempotency_key", "expires_at", "id"})

# Values for names that must belong to something: the caller makes a device and a command.
Names = dict[str, str]


def _deep(bytes_: int, values: int) -> Any:
    depth = min(28, values)
    found: Any = 0
    for _ in range(depth):
        found = {"deep": [found]}
    return [found] * (min(bytes_ // (depth * 12), values // (depth * 2)) or 1)


FILLINGS: dict[str, Callable[[int, int], Any]] = {
    "one long text": lambda bytes_, values: "\u00e9" * (bytes_ // 2),
    "many numbers": lambda bytes_, values: [1.5] * min(bytes_ // 4, values),
    "many names": lambda bytes_, values: {f"{n:05}": n for n in range(min(bytes_ // 15, values))},
    "many objects": lambda bytes_, values: [{}] * min(bytes_ // 3, values // 2),
    "nested deeply": _deep,
}


class Input(NamedTuple):
    """One request. `filling`: the kind of its body; empty without a body."""

    method: str
    route: str
    path: str
    filling: str
    body: bytes | None


def inputs(openapi: dict[str, Any], names: Names, limits: Limits) -> Iterator[Input]:
    """Every operation: without a body once, else with each filling, as large as a body and as large as the
    parameters of a command may be."""
    sizes = ((limits.body_bytes, limits.body_values), (limits.params_bytes, limits.params_values))
    for route, operations in openapi["paths"].items():
        for method in METHODS:
            if (operation := operations.get(method)) is None:
                continue
            path = _path(route, operation, names)
            schema = _body_schema(operation)
            if schema is None:
                yield Input(method, route, path, "", None)
                continue
            for filling, fill in FILLINGS.items():
                for most_bytes, most_values in sizes:
                    open_value = fill(most_bytes - ROOM_BYTES, most_values - ROOM_VALUES)
                    body = msgspec.json.encode(_value(openapi, schema, open_value, names, ""))
                    yield Input(method, route, path, filling, body)


def _body_schema(operation: dict[str, Any]) -> dict[str, Any] | None:
    content = operation.get("requestBody", {}).get("content", {})
    found: dict[str, Any] | None = content.get("application/json", {}).get("schema")
    return found


def _path(route: str, operation: dict[str, Any], names: Names) -> str:
    query = []
    for parameter in operation.get("parameters", ()):
        schema = parameter.get("schema", {})
        name = parameter["name"]
        if parameter["in"] == "path":
            route = route.replace("{" + name + "}", names.get(name, "x" * 64))
        elif parameter["in"] == "query" and name in names:
            query.append(f"{name}={names[name]}")
        elif parameter["in"] == "query" and name == "limit":
            query.append(f"limit={schema.get('maximum', 100)}")
    return route + ("?" + "&".join(query) if query else "")


def _value(openapi: dict[str, Any], schema: dict[str, Any], open_value: Any, names: Names, name: str) -> Any:
    """A value that fits a schema; `open_value` where the schema allows anything."""
    if "$ref" in schema:
        return _value(openapi, _found(openapi, schema["$ref"]), open_value, names, name)
    if name in names:
        return [names[name]] if schema.get("type") == "array" else names[name]
    for key in ("oneOf", "anyOf"):
        if key in schema:
            first = next((one for one in schema[key] if one.get("type") != "null"), schema[key][0])
            return _value(openapi, first, open_value, names, name)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object" if schema.get("properties"):
            return {
                key: _value(openapi, one, open_value, names, key)
                for key, one in schema["properties"].items()
                if key not in LEFT_OUT
            }
        case "object":
            return open_value if isinstance(open_value, dict) else {"all": open_value}
        case "array":
            item = schema.get("items", {})
            if item.get("type") == "string":
                return ["x" * 64] * min(schema.get("maxItems", 1_000), 1_000)
            return [_value(openapi, item, open_value, names, "")]
        case "string":
            return "x" * min(schema.get("maxLength", 64), 255)
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return False
        case _:
            return open_value


def _found(openapi: dict[str, Any], reference: str) -> dict[str, Any]:
    found: Any = openapi
    for part in reference.removeprefix("#/").split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return dict(found)
