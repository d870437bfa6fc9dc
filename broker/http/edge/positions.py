"""Positions as clients write them: `17`, or with the log that they belong to, `log_…:17`.

After a restore the same positions are given to other events, in a log with another id. A client that sends
the full form gets 410 then; with a bare number it would silently miss events.
"""

from __future__ import annotations

import re

from broker.domain.errors import Refusal

PATTERN = "^(log_[0-9a-z]{26}:)?[0-9]{1,18}$"
RULE = "must be a position: a whole number, or `<log id>:<number>`"
_FORM = re.compile("(?:(log_[0-9a-z]{26}):)?([0-9]{1,18})")


def full(log_id: str, position: int) -> str:
    return f"{log_id}:{position}"


def is_position(text: str) -> bool:
    return _FORM.fullmatch(text) is not None


def parsed(field: str, text: str, log_id: str, head: int) -> int | None:
    """The number of a position; None if the text is no position. `head`: the log's last position.

    Raises:
        Refusal: gone, if it belongs to another log than `log_id`.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    if found[1] not in (None, log_id):
        now = full(log_id, head)
        raise Refusal(
            "gone",
            f"{field}: {text} is a position of another log: this broker's log was restored or replaced. Read "
            f"the state again (GET /v1/commands), then follow the events after {now}",
            {"field": field, "log_id": log_id, "position": now},
        )
    return int(found[2])
