"""Log lines that strangers can cause: how often there is one, and how a name that they chose is written.

Of each kind of line there are at most `LINES` per period. The next line of that kind in a later period says
how many were left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

logger = structlog.get_logger()

LINES, PERIOD_SEC = 10, 10.0
LONGEST_SHOWN = 64


def shown(name: object) -> str:
    """A name that a stranger chose, for a log line: short and in ASCII, so that it cannot forge a line."""
    text = str(name)
    return ascii(text[:LONGEST_SHOWN])[1:-1] + ("…" if len(text) > LONGEST_SHOWN else "")


class Often:
    """`clock`: seconds of a clock that never steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}

    def warn(self, event: str, fields: Mapping[str, object]) -> None:
        if (allowed := self.allowed(event, fields)) is not None:
            logger.warning(event, **allowed)

    def info(self, event: str, fields: Mapping[str, object]) -> None:
        if (allowed := self.allowed(event, fields)) is not None:
            logger.info(event, **allowed)

    def allowed(self, kind: str, fields: Mapping[str, object]) -> Mapping[str, object] | None:
        """The fields of a line of this kind, with the count of those left out before it; None: leave this one
        out too."""
        now = self._clock()
        since, count = self._kinds.get(kind, (now, 0))
        if now >= since + PERIOD_SEC:
            fields = {**fields, "left_out": count - LINES} if count > LINES else fields
            since, count = now, 0
        self._kinds[kind] = since, count + 1
        return fields if count < LINES else None
