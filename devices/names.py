"""The check of all identifiers (device ids, hardware ids, command names, projects, topic suffixes), and the
topics of a device in Ordain's own layout: `<prefix>/dev/<hardware_id>/<suffix>`.

All inputs of the broker and of the device side use `is_name`. No other code decides what a valid name is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devices.definition import Definition

RESERVED = frozenset({"me", "pending"})
PATTERN = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # for JSON Schema
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_name(text: str) -> bool:
    """Whether the whole `text` is a valid identifier. A valid identifier is also valid as a topic level."""
    return text not in RESERVED and _NAME.fullmatch(text) is not None


def command_topic(prefix: str, hardware_id: str, definition: Definition) -> str:
    return device_topic(prefix, hardware_id, definition.command_suffix)


def answer_topic(prefix: str, hardware_id: str, definition: Definition) -> str:
    return device_topic(prefix, hardware_id, definition.answer_suffix)


def status_topic(prefix: str, hardware_id: str) -> str:
    return device_topic(prefix, hardware_id, "status")


def device_topic(prefix: str, hardware_id: str, suffix: str) -> str:
    return f"{prefix}/dev/{hardware_id}/{suffix}"


def parse_topic(prefix: str, topic: str) -> tuple[str, str] | None:
    """(hardware_id, suffix) of a device topic, or None if it is not one. A suffix may have several levels."""
    start = f"{prefix}/dev/"
    if not topic.startswith(start):
        return None
    hardware_id, _, suffix = topic[len(start) :].partition("/")
    return (hardware_id, suffix) if all(map(is_name, (hardware_id, *suffix.split("/")))) else None
