"""Loads the device types of a broker: the shipped types, and the user's own type files.

Files are read once, at start. A file must not change a shipped type, because devices may already use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from broker.settings import BadSetting
from devices.speech.topics import GATEWAY, HARDWARE_ID, clash, with_prefix
from devices.types import BadType, DeviceType, load_type, shipped_types


def load_types(directory: str, prefix: str = "iotee") -> dict[str, DeviceType]:
    """The shipped types and those in the `*.toml` files of a directory; "" means no directory.

    `prefix`: the broker's, which is the beginning of some of their topics.

    Raises:
        BadSetting: the directory cannot be read.
        BadType: a file is wrong; the error names the file, the key, the value and a valid value.
    """
    types = dict(shipped_types())
    if not directory:
        return types
    try:
        files = sorted(path for path in Path(directory).iterdir() if path.suffix == ".toml")
    except OSError as error:
        raise BadSetting(f"types = {directory!r}: must be a directory to read: {error.strerror}") from error
    came_from = dict.fromkeys(types, "Ordain itself")
    for path in files:
        kind = load_beside(path, types, came_from, prefix)
        types[kind.name], came_from[kind.name] = kind, path.name
    return types


def load_beside(
    path: Path,
    types: Mapping[str, DeviceType],
    came_from: Mapping[str, str] = MappingProxyType({}),
    prefix: str = "iotee",
) -> DeviceType:
    """The type of one file, if it can be used together with these other types. `came_from`: their files.

    Raises:
        BadType: the file is wrong, or does not fit to the others.
    """
    kind = load_type(path)
    if kind.name in types:
        source = came_from.get(kind.name, "Ordain itself")
        right = f"another name: a type of this name comes from {source}"
        raise BadType(str(path), "name", kind.name, right)
    _check_suffixes(str(path), kind, types)
    for key, value, right in topic_faults(kind, types, prefix):
        raise BadType(str(path), key, value, right)
    return kind


def topic_faults(
    kind: DeviceType, others: Mapping[str, DeviceType], prefix: str
) -> Iterator[tuple[str, Any, str]]:
    """Topics that could belong to a device of this type and to one of another: (key, value, what is right).

    Types in Ordain's own layout share its topics: there the hardware_id says which device it is. Variants of
    the same type share topics too, with `{gateway}` in place of `{hardware_id}`.
    """
    for name in kind.shares_topics_with:
        if name not in others:
            yield "shares_topics_with", name, f"must name other types: {', '.join(sorted(others))}"
    own, family = _roles(kind), {kind.name, *kind.shares_topics_with}
    for other in others.values():
        shared = not family.isdisjoint({other.name, *other.shares_topics_with})
        for (one, role), (two, its) in product(own, _roles(other)):
            same = one == two and one.startswith("{prefix}/dev/{hardware_id}/")
            if shared:
                same = one.replace(GATEWAY, HARDWARE_ID) == two.replace(GATEWAY, HARDWARE_ID)
            if not (same and role == its) and clash(with_prefix(one, prefix), with_prefix(two, prefix)):
                right = f"another topic: it could belong to a device of type {other.name}, which has {two}"
                yield _key_of(kind, one), one, right


def _roles(kind: DeviceType) -> list[tuple[str, str]]:
    return [(each, "says") for each in kind.says] + [(each, "listens") for each in kind.listens]


def _key_of(kind: DeviceType, pattern: str) -> str:
    for key in ("presence_topic", "state_topics", "answer_topics"):
        value = getattr(kind, key)
        if pattern == value or (isinstance(value, tuple) and pattern in value):
            return key
    if kind.query is not None and pattern == kind.query.topic:
        return "query.topic"
    return "command_topic" if pattern in kind.listens else "answer_topics"


def _check_suffixes(file: str, kind: DeviceType, others: Mapping[str, DeviceType]) -> None:
    """Checks that no topic suffix is used for commands and answers at once: the broker would receive its own
    commands as answers.

    Raises:
        BadType: a suffix is used for both.
    """
    for other in others.values():
        if kind.answer_suffix in other.command_suffixes:
            right = f"another suffix: {other.name} uses this one for commands"
            raise BadType(file, "answer_suffix", kind.answer_suffix, right)
        if other.answer_suffix in kind.command_suffixes:
            right = f"another suffix: {other.name} uses this one for answers"
            raise BadType(file, "command_suffix", other.answer_suffix, right)
