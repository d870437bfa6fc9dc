"""What can go wrong, by who must act: `Refusal` is the caller's to mend, `Unavailable` is ours.

No HTTP codes here; one table at the edge (`http/errors.py`) maps the kinds.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal[
    "invalid_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "conflict",
    "idempotency_conflict",
    "device_deleted",
    "gone",
    "too_large",
    "rate_limit_exceeded",
    "queue_full",
]


class Refusal(Exception):
    """A request that cannot be granted; nothing was recorded. The message is a sentence, facts first.

    `retry_after_sec`: when it may be granted, where that is known.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        details: dict[str, Any] | None = None,
        *,
        retry_after_sec: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message
        self.details = details
        self.retry_after_sec = retry_after_sec


def invalid(field: str, reason: str, value: object = None) -> Refusal:
    """A field that is not what it should be: names the field, what is wrong, and the value (shortened)."""
    shown = "" if value is None else f" (got {str(value)[:80]!r})"
    return Refusal(
        "invalid_request", f"{field}: {reason}{shown}", {"field": field, "reason": f"{reason}{shown}"}
    )


def not_found(what: str, name: str) -> Refusal:
    return Refusal("not_found", f"no {what} {name[:80]!r} is known here")


class Unavailable(Exception):
    """The log cannot be written now. What was asked may or may not have been recorded: ask again."""
