"""Reads the TOML of users: settings and device types.

Refuses what Python's parser takes and nothing here can use.
"""

from __future__ import annotations

import tomllib
from typing import Any

# A fixed bound, far below the interpreter's recursion limit.
MAX_LEVELS = 64


def parse(text: str) -> dict[str, Any]:
    """The table in a TOML text.

    Raises:
        ValueError: it is not TOML, an integer has more than 64 bits, or it is nested too deeply; the message
            names the key.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # Python's own limit of digits
        raise ValueError("an integer must have at most 64 bits") from None
    _check(table, "", MAX_LEVELS)
    return table


def _check(value: Any, place: str, levels: int) -> None:
    if isinstance(value, dict | list):
        if levels == 0:
            raise ValueError(f"{place[:64]}… is nested too deeply")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check(item, f"{place}.{key}" if place else str(key), levels - 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{place}: an integer must have at most 64 bits")
