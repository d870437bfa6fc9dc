"""Log lines that strangers can cause: at most `LINES` of each event per period, then a count of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

logger = structlog.get_logger()

LINES, PERIOD_SEC = 10, 10.0


class Often:
    """`clock`: seconds of a clock that never steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}

    def warn(self, event: str, fields: Mapping[str, object]) -> None:
        now = self._clock()
        since, count = self._kinds.get(event, (now, 0))
        if now >= since + PERIOD_SEC:
            fields = {**fields, "left_out": count - LINES} if count > LINES else fields
            since, count = now, 0
        self._kinds[event] = since, count + 1
        if count < LINES:
            logger.warning(event, **fields)
