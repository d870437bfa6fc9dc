"""Says in plain words which values are allowed. msgspec's own messages show Python types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from msgspec import inspect

_STEP = re.compile(r"\.([^.\[\]]+)|\[[^\]]*\]")
_GOT = re.compile(r"Invalid enum value (.*)", re.DOTALL)


def reason(kind: Any, path: str, message: str) -> str:
    """What the value must be, in words; or the message itself, if it is not about the kind of the value.

    `kind`: the type that was decoded. `path`: where in it, as in msgspec's messages without the `$`, such as
    `.events[0]`.
    """
    got = _GOT.fullmatch(message)
    if got is None and not message.startswith("Expected "):
        return message
    nodes = sorted(_at(kind, path), key=lambda node: isinstance(node, inspect.NoneType))
    words = [_words(node) for node in nodes]
    if not words or not all(words):
        return message
    if all(isinstance(node, inspect.LiteralType | inspect.NoneType) for node in nodes):
        words = [f"one of {', '.join(allowed(kind, path))}"]
    return f"must be {' or '.join(words)}" + (f" (got {got[1][:82]})" if got else "")


def allowed(kind: Any, path: str = "") -> list[str]:
    """The allowed values at a path of a type; empty if any value of some type is allowed there."""
    nodes = [node for node in _at(kind, path) if not isinstance(node, inspect.NoneType)]
    if not all(isinstance(node, inspect.LiteralType) for node in nodes):
        return []
    return [str(value) for node in nodes for value in node.values]  # type: ignore[attr-defined]


def _words(node: inspect.Type) -> str:
    """One allowed kind of value in words; empty for a kind that has none here."""
    match node:
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null"
        case inspect.IntType() | inspect.FloatType():
            what = "a whole number" if isinstance(node, inspect.IntType) else "a number"
            return what + _range(node)
        case inspect.StrType():
            pattern = f" that matches {node.pattern}" if node.pattern else ""
            return "text" + _length(node, "characters") + pattern
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            return "a list" + _length(node, "items")
        case inspect.StructType() | inspect.DictType():
            return "an object"
        case inspect.LiteralType():
            return ", ".join(map(repr, node.values))
    return ""


def _range(node: Any) -> str:
    if node.ge is not None and node.le is not None:
        return f" from {node.ge} to {node.le}"
    bounds = (("above", node.gt), ("of at least", node.ge), ("below", node.lt), ("of at most", node.le))
    return "".join(f" {word} {bound}" for word, bound in bounds if bound is not None)


def _length(node: Any, of: str) -> str:
    if node.min_length and node.max_length:
        return f" of {node.min_length} to {node.max_length} {of}"
    if node.min_length:
        return f" of at least {node.min_length} {of}"
    return f" of at most {node.max_length} {of}" if node.max_length else ""


def _at(kind: Any, path: str) -> list[inspect.Type]:
    """The types that are allowed at a path of a type."""
    nodes = list(_flat(inspect.type_info(kind)))
    for step in _STEP.finditer(path):
        nodes = [inner for node in nodes for part in _inside(node, step[1]) for inner in _flat(part)]
    return nodes


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
