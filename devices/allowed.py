"""Lists the allowed values when the value of a `Literal` is wrong. msgspec's own message does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from msgspec import inspect

_STEP = re.compile(r"\.([^.\[\]]+)|\[[^\]]*\]")
_GOT = re.compile(r"Invalid enum value (.*)", re.DOTALL)


def reason(kind: Any, path: str, message: str) -> str:
    """The message of a `msgspec.ValidationError`, or `must be one of …` if the wrong value is one of a list.

    `kind`: the type that was decoded. `path`: where in it, as in msgspec's messages without the `$`, such as
    `.events[0]`.
    """
    values = allowed(kind, path)
    if not values:
        return message
    got = _GOT.fullmatch(message)
    return f"must be one of {', '.join(values)}" + (f" (got {got[1][:82]})" if got else "")


def allowed(kind: Any, path: str = "") -> list[str]:
    """The allowed values at a path of a type; empty if any value of some type is allowed there."""
    nodes = list(_flat(inspect.type_info(kind)))
    for step in _STEP.finditer(path):
        nodes = [inner for node in nodes for part in _inside(node, step[1]) for inner in _flat(part)]
    nodes = [node for node in nodes if not isinstance(node, inspect.NoneType)]
    if not all(isinstance(node, inspect.LiteralType) for node in nodes):
        return []
    return [str(value) for node in nodes for value in node.values]  # type: ignore[attr-defined]


def _flat(node: inspect.Type) -> Iterator[inspect.Type]:
    """The node without its metadata; of a union each member."""
    if isinstance(node, inspect.Metadata):
        yield from _flat(node.type)
    elif isinstance(node, inspect.UnionType):
        for member in node.types:
            yield from _flat(member)
    else:
        yield node


def _inside(node: inspect.Type, field: str | None) -> Iterator[inspect.Type]:
    """The types of one field, or, without a name, of the items."""
    if isinstance(node, inspect.StructType):
        yield from (each.type for each in node.fields if each.encode_name == field)
    elif isinstance(node, inspect.VarTupleType | inspect.ListType) and field is None:
        yield node.item_type
    elif isinstance(node, inspect.DictType) and field is None:
        yield node.value_type
