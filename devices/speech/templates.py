"""Payloads from templates: the values of one attempt put into the places that a type's author marked.

Pure. In a `template` (JSON) every text that is exactly one of `PLACES`, or `$params.<path>`, is replaced by
the value, with its type. A member whose value is absent is left out. `$$` at the beginning of a text means
one `$`. In the text of a `bare` command `{params.<path>}` is replaced by the parameter, written as its
declared type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from devices.speech.expressions import at_path

PLACES = ("$id", "$number", "$type", "$params", "$attempt", "$expires_at", "$grant", "$reply_topic")
MAX_DEPTH = 32
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PLACE = re.compile(r"\{params\.([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\}")


class Missing(Exception):
    """A value that the text needs is absent."""


class Facts(NamedTuple):
    """The values of one attempt."""

    id: str
    number: int | None
    type: str
    params: Any
    attempt: int
    expires_at: str | None
    grant: str | None
    reply_topic: str | None


def filled(template: Any, facts: Facts) -> Any:
    """The message of one attempt; UNSET where the value is absent."""
    if isinstance(template, dict):
        items = {key: filled(value, facts) for key, value in template.items()}
        return {key: value for key, value in items.items() if value is not UNSET}
    if isinstance(template, list):
        values = (filled(value, facts) for value in template)
        return [None if value is UNSET else value for value in values]
    if not isinstance(template, str) or not template.startswith("$"):
        return template
    if template.startswith("$$"):
        return template[1:]
    if template.startswith("$params."):
        there, value = at_path(facts.params, template.removeprefix("$params."))
        return value if there else UNSET
    return getattr(facts, template[1:])


def filled_text(text: str, params: Any, kinds: Mapping[str, str]) -> str:
    """The text of one attempt. `kinds`: the declared types of the parameters, by path.

    Raises:
        Missing: a parameter that the text needs is absent.
    """

    def value_of(found: re.Match[str]) -> str:
        there, value = at_path(params, found[1])
        if not there:
            raise Missing(f"the text needs params.{found[1]}, which is absent")
        return written(value, kinds.get(found[1]))

    return _PLACE.sub(value_of, text)


def written(value: Any, kind: str | None) -> str:
    """A parameter as text: texts as they are, whole numbers without a point where an integer is declared."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and kind == "integer":
        value = int(value)
    return msgspec.json.encode(value).decode()


def declared(schema: dict[str, Any] | None, path: str) -> dict[str, Any]:
    """What a JSON Schema says of the value at a path of object keys; empty if it says nothing."""
    here: Any = schema
    for key in path.split("."):
        properties = here.get("properties") if isinstance(here, dict) else None
        here = properties.get(key) if isinstance(properties, dict) else None
    return here if isinstance(here, dict) else {}


def places(template: Any) -> Iterator[str]:
    """All places of a template, such as `$id` and `$params.channel`."""
    if isinstance(template, dict | list):
        for value in template.values() if isinstance(template, dict) else template:
            yield from places(value)
    elif isinstance(template, str) and template.startswith("$") and not template.startswith("$$"):
        yield template


def text_places(text: str) -> list[str]:
    """The paths of the parameters in a text."""
    return _PLACE.findall(text)


def template_fault(template: Any, depth: int = 0) -> str | None:
    """What would be right about a template; None if it is one."""
    if depth > MAX_DEPTH:
        return f"must be nested at most {MAX_DEPTH} levels deep"
    if isinstance(template, dict | list):
        items = template.values() if isinstance(template, dict) else template
        return next((fault for item in items if (fault := template_fault(item, depth + 1))), None)
    if not isinstance(template, str | int | float | bool | None):
        return f"a {type(template).__name__} has no JSON form: write it as text"
    for place in places(template):
        path = place.removeprefix("$params.")
        if place not in PLACES and not (path != place and _PATH.fullmatch(path)):
            return f"{place!r} is no place; they are {', '.join(PLACES)} and $params.<path> ($$ means one $)"
    return None
