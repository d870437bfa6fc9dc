"""Checks of JSON values: can a grant sign them, and do they match a command's JSON Schema?

Pure. Schemas never fetch anything. Error messages of a schema never contain the value, which may be private.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

import jsonschema_rs
import msgspec

# JSON parsers do not agree on larger integers, so RFC 8785 cannot sign them.
MAX_SIGNED_INTEGER = 2**53 - 1
# A fixed bound, so that an accepted value never reaches the interpreter's recursion limit later.
MAX_DEPTH = 64
MAX_CONTAINERS = 10_000  # in one message of a device
_JSON_TYPES = frozenset({dict, list, str, int, float, bool, type(None)})


class BadParams(Exception):
    """The parameters do not match the command's schema. The caller must correct them."""

    def __init__(self, field: str, value: Any, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        super().__init__(f"{field}: {reason}")


def compiled(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """Compiles a JSON Schema.

    Raises:
        ValueError: it is not a JSON Schema; the message is one line.
    """
    try:
        return jsonschema_rs.validator_for(schema, mask="value", retriever=_no_reference)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError, TypeError) as error:
        raise ValueError(f"is not a JSON Schema: {str(error).splitlines()[0]}") from error


def misfit(schema: dict[str, Any] | None, value: Any) -> str | None:
    """Where and why a value does not match a schema; None if it matches."""
    if schema is None:
        return None
    for error in _kept(msgspec.json.encode(schema)).iter_errors(value):
        return ": ".join(filter(None, [".".join(map(str, error.instance_path)), error.message]))
    return None


@lru_cache(maxsize=1_000)
def _kept(schema: bytes) -> jsonschema_rs.Validator:
    return compiled(msgspec.json.decode(schema))


def _no_reference(uri: str) -> Any:
    raise ValueError(f"a schema must not refer to {uri}: external schemas are not fetched")


def holds_more(value: Any, most: int) -> bool:
    """Whether a JSON value consists of more than `most` values; down to `MAX_DEPTH` levels."""
    level, held = [value], 1
    for _ in range(MAX_DEPTH):
        level = _below(level)
        held += len(level)
        if held > most or not level:
            break
    return held > most


def unsignable(value: Any) -> str | None:
    """Why RFC 8785 cannot represent this JSON value exactly, so no grant can sign it; None if it can.

    Like `not_json`, it goes level by level.
    """
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        kinds = set(map(type, level))
        if float in kinds and not all(math.isfinite(each) for each in level if type(each) is float):
            return "not a finite number"
        if int in kinds:
            numbers = [each for each in level if type(each) is int]
            if max(numbers) > MAX_SIGNED_INTEGER or min(numbers) < -MAX_SIGNED_INTEGER:
                return f"integers beyond ±{MAX_SIGNED_INTEGER} are not exact in JSON: send them as text"
        if not kinds & {dict, list}:
            break
        if depth == MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        level = _below(level)
    return None


def _below(level: list[Any]) -> list[Any]:
    """The values in the lists and objects of a level."""
    lists = chain.from_iterable(each for each in level if type(each) is list)
    maps = (each for each in level if type(each) is dict)
    return [*lists, *chain.from_iterable(map(dict.values, maps))]


def not_json(value: Any) -> str | None:
    """Why JSON cannot represent a decoded msgpack value: bytes, times, keys that are not text, NaN, infinity.

    It goes level by level, without a Python call per value: 64 KiB may contain 32,000 values. More than
    `MAX_CONTAINERS` lists and objects are refused too, because walking them would hold the event loop up.
    """
    level, containers = [value], 0
    for depth in range(MAX_DEPTH + 1):
        kinds = set(map(type, level))
        if foreign := kinds - _JSON_TYPES:
            return f"a value has a type that JSON does not have: {min(kind.__name__ for kind in foreign)}"
        if float in kinds and not all(math.isfinite(each) for each in level if type(each) is float):
            return "not a finite number"
        if not kinds & {dict, list}:
            break
        if depth == MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        maps = [each for each in level if type(each) is dict]
        lists = [each for each in level if type(each) is list]
        containers += len(maps) + len(lists)
        if containers > MAX_CONTAINERS:
            return f"more than {MAX_CONTAINERS} lists and objects"
        if not set(map(type, chain.from_iterable(maps))) <= {str}:
            return "a key is not a text"
        level = [*chain.from_iterable(lists), *chain.from_iterable(map(dict.values, maps))]
    return None


def bad_params(error: jsonschema_rs.ValidationError, params: dict[str, Any]) -> BadParams:
    """The `BadParams` error that names the wrong parameter."""
    path, reason, kinds = list(error.instance_path), error.message, jsonschema_rs.ValidationErrorKind
    value: Any = params
    for step in path:
        value = value[step]
    extra: str | None = None
    match error.kind:
        case kinds.AdditionalProperties(unexpected=[first, *_]):
            extra, reason = first, "is not a parameter of this command"
        case kinds.FalseSchema() if isinstance(value, dict) and value:
            extra, reason = next(iter(value)), "is not a parameter of this command"
        case kinds.Required(property=missing):
            extra, reason = missing, "is required"
    if extra is not None:
        path, value = [*path, extra], value.get(extra)
    return BadParams(".".join(["params", *map(str, path)]), value, reason)


def no_schema(where: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What is wrong with a schema: (key, value, what would be right); nothing if it is one."""
    try:
        compiled(schema)
    except ValueError as error:
        yield where, schema, str(error)
