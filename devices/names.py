"""The one check of every identifier: device ids, hardware ids, command names, projects, suffixes.

Every door of the broker and the device side calls `is_name`; nothing else decides what a name is.
"""

from __future__ import annotations

import re

RESERVED = frozenset({"me", "pending"})
PATTERN = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # as JSON Schema says it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_name(text: str) -> bool:
    """Whether `text`, as a whole, may stand as an identifier (and as one level of a topic)."""
    return text not in RESERVED and _NAME.fullmatch(text) is not None
