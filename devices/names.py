"""The check of all identifiers: device ids, hardware ids, command names, projects, topic suffixes.

All inputs of the broker and of the device side use `is_name`. No other code decides what a valid name is.
"""

from __future__ import annotations

import re

RESERVED = frozenset({"me", "pending"})
PATTERN = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # for JSON Schema
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_name(text: str) -> bool:
    """Whether the whole `text` is a valid identifier. A valid identifier is also valid as a topic level."""
    return text not in RESERVED and _NAME.fullmatch(text) is not None
