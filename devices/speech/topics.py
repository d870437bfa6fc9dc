"""Patterns of topics: which topics one device has, and which device a topic belongs to.

Pure. A pattern has `{hardware_id}` or `{name}` as a whole level, so that each topic belongs to one device. It
may also have `{gateway}` (the hardware id of the device's gateway, or its own if it has none), `{prefix}`
(the broker's prefix) and `{command}` (the command's name on the wire) as whole levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple

HARDWARE_ID, NAME, GATEWAY = "{hardware_id}", "{name}", "{gateway}"
PREFIX, COMMAND = "{prefix}", "{command}"
OWNERS = (HARDWARE_ID, NAME)
VARYING = (*OWNERS, GATEWAY)
MAX_CHARACTERS = 256
MAX_NAME_BYTES = 128


class Owner(NamedTuple):
    """Who a topic may belong to: the device with this hardware id, or with this name if `by` is `{name}`.

    `gateway`: the level of `{gateway}`, if the pattern has it and only the name says which device it is.
    """

    by: str
    value: str
    gateway: str | None = None


def pattern_fault(pattern: str, *, rest: bool = False, command: bool = True) -> str | None:
    """What would be right about a pattern; None if it is one. `rest`: it may end with `#`."""
    levels = pattern.split("/")
    if rest and levels[-1] == "#":
        levels.pop()
    if not pattern or len(pattern) > MAX_CHARACTERS:
        return f"must have 1 to {MAX_CHARACTERS} characters"
    if pattern.startswith("$"):
        return "must not begin with $: such topics belong to the MQTT server"
    if any(char in level for level in levels for char in "+#\0"):
        return "must not contain +, # or NUL"
    known = [*VARYING, PREFIX, *([COMMAND] if command else [])]
    for index, level in enumerate(levels):
        if level in known and (level != PREFIX or index == 0):
            continue
        if "{" in level or "}" in level:
            return f"{level!r}: a placeholder is a whole level, one of {', '.join(known)} ({PREFIX} first)"
    if not any(owner in levels for owner in OWNERS):
        return "could belong to two devices: one level must be {hardware_id} or {name}"
    if any(levels.count(each) > 1 for each in known):
        return "must have each placeholder only once"
    if len(levels) > 1 and levels[0] == PREFIX and levels[1] == "evt":
        return "must not be an event topic: devices may not write there"
    return None


def level_fault(text: str) -> str | None:
    """Why a text cannot be one level of a topic; None if it can."""
    if not text or len(text.encode()) > MAX_NAME_BYTES:
        return f"must have 1 to {MAX_NAME_BYTES} bytes"
    if any(char in text for char in "/+#") or any(ord(char) < 32 for char in text) or text.startswith("$"):
        return "must not contain /, +, # or control characters, or begin with $"
    return None


def with_command(pattern: str, command: str) -> str:
    """The pattern of one command. Patterns without `{command}` stay as they are."""
    return "/".join(command if level == COMMAND else level for level in pattern.split("/"))


def with_prefix(pattern: str, prefix: str) -> str:
    return f"{prefix}{pattern.removeprefix(PREFIX)}" if pattern.split("/")[0] == PREFIX else pattern


def topic_of(pattern: str, prefix: str, hardware_id: str, name: str, gateway: str | None = None) -> str:
    """The topic of one device. `{command}` is already replaced."""
    filled = {HARDWARE_ID: hardware_id, NAME: name, GATEWAY: gateway or hardware_id}
    return "/".join(filled.get(level, level) for level in with_prefix(pattern, prefix).split("/"))


def filter_of(pattern: str, prefix: str) -> str:
    """The filter that covers the topics of all devices."""
    return "/".join("+" if level in VARYING else level for level in with_prefix(pattern, prefix).split("/"))


def owner_of(pattern: str, topic: str) -> Owner | None:
    """Whose topic this is by one pattern, which has its prefix already; None if it is not of this pattern."""
    owners = _filled(pattern.split("/"), topic.split("/"))
    if owners is None:
        return None
    if HARDWARE_ID in owners:
        return Owner(HARDWARE_ID, owners[HARDWARE_ID])
    return Owner(NAME, owners[NAME], owners.get(GATEWAY))


def _filled(wanted: list[str], found: list[str]) -> dict[str, str] | None:
    """What the placeholders of a pattern are in a topic; None if the topic is not of this pattern."""
    if len(wanted) != len(found):
        return None
    owners = {}
    for level, value in zip(wanted, found, strict=True):
        if level in VARYING:
            owners[level] = value
        elif level != value:
            return None
    return owners


def meeting(pattern: str, topic: str) -> dict[str, str] | None:
    """What the placeholders are where a pattern and a topic have a topic in common; None if they never have.

    One of both may end with `#`. The placeholders below it may be anything, and are left out.
    """
    wanted, found = pattern.split("/"), topic.split("/")
    for one, other in ((wanted, found), (found, wanted)):
        if one[-1] == "#":
            one.pop()
            del other[len(one) :]
    return _filled(wanted, found)


def contains(topic_filter: str, topic: str) -> bool:
    """Whether a filter without `+` matches a topic."""
    if topic_filter.endswith("/#"):
        return f"{topic}/".startswith(topic_filter[:-1])
    return topic == topic_filter


def covers(topic_filter: str, pattern: str) -> bool:
    """Whether a filter that ends with `#` covers the topics of a pattern, whatever the devices are called.

    `{hardware_id}/#` of a device that is called `stat` covers those of `stat/{hardware_id}/RESULT`.
    """
    for wanted, level in zip_longest(topic_filter.split("/"), pattern.split("/")):
        if wanted == "#" or wanted != level:
            return wanted == "#"
    return False


def clash(one: str, other: str) -> bool:
    """Whether topics of two patterns are always the same, whatever the devices are called.

    Patterns such as `{hardware_id}/online` and `lights/{name}` share a topic only for devices with certain
    names (`lights`, `online`): those names are refused when the device is registered.
    """
    left, right = one.split("/"), other.split("/")
    return len(left) == len(right) and all(
        a == b or (a in VARYING and b in VARYING) for a, b in zip(left, right, strict=True)
    )


class Router:
    """Finds out whose topic a topic may be. The patterns have their prefix already."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._by_length: dict[int, dict[str, None]] = {}
        for pattern in patterns:
            self.add(pattern)

    def add(self, pattern: str) -> None:
        self._by_length.setdefault(pattern.count("/"), {})[pattern] = None

    def matches(self, topic: str) -> Iterator[tuple[str, Owner]]:
        """The patterns that the topic fits, each with its owner."""
        for pattern in self._by_length.get(topic.count("/"), ()):
            if (owner := owner_of(pattern, topic)) is not None:
                yield pattern, owner

    def owners(self, topic: str) -> list[Owner]:
        return list(dict.fromkeys(owner for _, owner in self.matches(topic)))
