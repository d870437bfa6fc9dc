"""JMESPath expressions with bounds, evaluated on a device's message.

Pure. A type's author writes the expression, a device sends the message: neither may stop the broker. So an
expression has bounded length and depth, and an evaluation a bounded number of steps. A step is one visited
node or one item of a list, object or text that a node returns.

`$params.<path>` in an expression is the value of the command's parameter. JMESPath itself has no variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jmespath  # type: ignore[import-untyped]
from jmespath import exceptions, functions, parser, visitor

MAX_LENGTH = 1_024
MAX_DEPTH = 32
MAX_STEPS = 20_000
# A literal that begins so is a parameter. TOML and JSON texts of a type cannot contain it: see `compiled`.
_MARK = "\0"
# Nodes that return a new value; the others return a part of one.
_MAKES_VALUES = {"multi_select_list", "multi_select_dict", "function_expression"}
_PART = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`(?:\\.|[^`\\])*`|\$params((?:\.[A-Za-z0-9_-]+)*)""", re.DOTALL
)
_FAULTS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, ZeroDivisionError)


class BadExpression(ValueError):
    """It is not a JMESPath expression, or exceeds a bound. The message says what would be right."""


class Unanswerable(Exception):
    """The expression has no value for this message, for example a function got a value of a wrong type."""


class Expression(NamedTuple):
    """`params`: the paths of the parameters that it uses."""

    text: str
    tree: Any
    params: tuple[str, ...]


@lru_cache(maxsize=4_096)
def compiled(text: str) -> Expression:
    """Compiles an expression.

    Raises:
        BadExpression: it is not JMESPath, or exceeds a bound.
    """
    if not text.strip() or _MARK in text:
        raise BadExpression("must be a JMESPath expression, not empty and without NUL")
    if len(text) > MAX_LENGTH:
        raise BadExpression(f"must have at most {MAX_LENGTH} characters, it has {len(text)}")
    used: list[str] = []

    def marked(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        used.append(found[1].removeprefix("."))
        return f"'{_MARK}{used[-1]}'"

    try:
        tree = parser.Parser().parse(_PART.sub(marked, text)).parsed
    except (exceptions.JMESPathError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise BadExpression(f"is not a JMESPath expression: {why.replace(_MARK, '$params.')}") from error
    if _too_deep(tree):
        raise BadExpression(f"must be nested at most {MAX_DEPTH} levels deep")
    if (unknown := next(_unknown_functions(tree), None)) is not None:
        raise BadExpression(f"JMESPath has no function {unknown}")
    return Expression(text, tree, tuple(used))


def evaluate(expression: Expression, message: Any, params: Any = None) -> Any:
    """The value of an expression; None if the message has nothing there.

    Raises:
        Unanswerable: there is no value, or the evaluation takes too many steps.
    """
    try:
        return _Bounded(params).visit(expression.tree, message)
    except Unanswerable:
        raise
    except _FAULTS as error:
        raise Unanswerable((str(error) or type(error).__name__).splitlines()[0][:200]) from error


def is_true(value: Any) -> bool:
    """Truth as JMESPath has it: false, null and everything empty are false; 0 is true."""
    return not (value is None or value is False or value == "" or value == [] or value == {})


def at_path(value: Any, path: str) -> tuple[bool, Any]:
    """The value at a path of object keys, and whether there is one. The empty path is the whole value."""
    for key in path.split(".") if path else ():
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value


class _Functions(functions.Functions):  # type: ignore[misc]
    """`join` writes its separator many times, so its result is measured before it is made."""

    @functions.signature({"types": ["string"]}, {"types": ["array-string"]})  # type: ignore[untyped-decorator]
    def _func_join(self, separator: str, texts: list[str]) -> str:
        if len(separator) * len(texts) > 16 * MAX_STEPS:
            raise Unanswerable(f"it takes more than {MAX_STEPS} steps")
        return separator.join(texts)


_OPTIONS = jmespath.Options(custom_functions=_Functions())


class _Bounded(visitor.TreeInterpreter):  # type: ignore[misc]
    """Evaluates a tree, and stops after `MAX_STEPS`."""

    def __init__(self, params: Any) -> None:
        super().__init__(_OPTIONS)
        self._params = params
        self._steps = 0

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        self._take(1)
        found = super().visit(node, *args, **kwargs)
        if node["type"] in _MAKES_VALUES:
            self._take_whole(found)
        elif isinstance(found, list | dict | str):
            self._take(len(found) // 16 if isinstance(found, str) else len(found))
        return found

    def visit_literal(self, node: Any, value: Any) -> Any:
        literal = node["value"]
        if isinstance(literal, str) and literal.startswith(_MARK):
            there, found = at_path(self._params, literal[1:])
            if not there:
                raise Unanswerable(f"$params.{literal[1:]} is absent")
            return found
        return literal

    def _take_whole(self, value: Any) -> None:
        """Counts every part of a value as often as it occurs: `[@, @]` holds one value twice, and a chain of
        them is small in memory, but not when it is written out or compared."""
        parts = [value]
        while parts:
            part = parts.pop()
            self._take(1 + (len(part) // 16 if isinstance(part, str) else 0))
            if isinstance(part, dict):
                parts += part.keys()
                parts += part.values()
            elif isinstance(part, list):
                parts += part

    def _take(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise Unanswerable(f"it takes more than {MAX_STEPS} steps")


def _too_deep(tree: Any) -> bool:
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _unknown_functions(tree: Any) -> Iterator[str]:
    known = visitor.TreeInterpreter()._functions.FUNCTION_TABLE
    level = [tree]
    while level:
        for node in level:
            if node.get("type") == "function_expression" and node["value"] not in known:
                yield str(node["value"])
        level = [child for node in level for child in _children(node)]


def _children(node: Any) -> list[Any]:
    return [child for child in node.get("children", ()) if isinstance(child, dict)]
