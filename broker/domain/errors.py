"""Errors of requests: a `Refusal` must be fixed by the caller, `Unavailable` by the operator.

No HTTP status codes here; one table in `http/edge/errors.py` maps the kinds to them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

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
    """A request that is refused; nothing was recorded. The message is a sentence that begins with the facts.

    `retry_after_sec`: seconds until the request may succeed, if that is known.
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
    """The refusal of a wrong field. Names the field, what is wrong, and the value."""
    reason += "" if value is None else got(value)
    return Refusal("invalid_request", f"{field}: {reason}", {"field": field, "reason": reason})


def got(value: object) -> str:
    """A wrong value (its first 80 characters), for the end of a reason. Text is in quotes: "5" is not 5."""
    shown = repr(value[:80]) if isinstance(value, str) else msgspec.json.encode(value).decode()[:80]
    return f" (got {shown})"


def not_found(what: str, name: str) -> Refusal:
    return Refusal("not_found", f"no {what} {name[:80]!r} is known here")


class Unavailable(Exception):
    """The log cannot be written now. The request may or may not have been recorded: repeat it."""
