"""Times as text. Output is RFC 3339 with milliseconds and `Z`; input is any strict RFC 3339 time.

Pure conversions of whole milliseconds since 1970. This module never reads a clock.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_INSTANT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)


@lru_cache(1_024)  # an answer and the events beside it show the same times
def rfc3339(ms: int) -> str:
    """Formats milliseconds since 1970, such as `2026-11-20T09:30:00.000Z`.

    Raises:
        OverflowError: outside years 1 to 9999.
    """
    sec, rest = divmod(ms, 1_000)
    return f"{_second(sec)}.{rest:03}Z"


@lru_cache(1_024)
def _second(sec: int) -> str:
    return (_EPOCH + timedelta(seconds=sec)).isoformat()[:-6]


def parse_rfc3339(text: str) -> int:
    """Milliseconds since 1970 of a time with `Z` or an offset. Digits after milliseconds are cut off.

    Raises:
        ValueError: it is not such a time, or outside years 1 to 9999.
    """
    found = _INSTANT.fullmatch(text)
    if found is None:
        raise ValueError(f"not an RFC 3339 instant with Z or an offset: {text[:64]!r}")
    local, fraction, sign, hours, minutes = found.groups()
    ms = (datetime.fromisoformat(local + "Z") - _EPOCH) // _MILLISECOND + int(
        (fraction or "0").ljust(3, "0")[:3]
    )
    if sign is not None:
        if int(hours) > 23 or int(minutes) > 59:
            raise ValueError(f"offset beyond 23:59: {text!r}")
        ms -= int(sign + "1") * (int(hours) * 60 + int(minutes)) * 60_000
    try:
        rfc3339(ms)
    except OverflowError:
        raise ValueError(f"outside years 1 to 9999: {text!r}") from None
    return ms
