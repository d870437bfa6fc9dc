"""The types of the Python SDK: the dictionaries that it takes and returns, and its errors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, Literal, NotRequired, TypedDict

Status = Literal["pending", "delivered", "executed", "failed", "expired", "cancelled"]
StateName = Literal[
    "pending", "published", "acknowledged", "executed", "failed", "timed_out", "expired", "cancelled"
]


class SendParams(TypedDict):
    """The parameters of `send`. `data`: any JSON. A repeated call with the same key creates nothing twice.

    `ttl_sec`: seconds after which the command is no longer delivered. Absent: what the device's type says,
    else it waits for ever; None: it waits for ever. `collapse_key`: cancels pending commands of the device
    that have the same key.
    """

    name: str
    device_ident: Sequence[str]
    data: NotRequired[Any]
    idempotency_key: NotRequired[str]
    ttl_sec: NotRequired[int | None]
    collapse_key: NotRequired[str]


class Sent(TypedDict):
    """The command is durable and is delivered when the device is online."""

    sent: Literal[True]
    command_id: str


class NotSent(TypedDict):
    """No command was created for this device. `error`: the reason, such as `Device not found`."""

    sent: Literal[False]
    error: str


class HistoryParams(TypedDict):
    """The parameters of `history`: `start` <= time < `end`, both ISO 8601; `end` is now if absent."""

    name: str
    device_idents: Sequence[str]
    start: str
    end: NotRequired[str]


class Record(TypedDict):
    """One command that was sent. `value`: its data. `timestamp`: when it was created, in ms since 1970."""

    value: Any
    timestamp: int
    command_id: str
    status: Status


class CommandError(TypedDict):
    """Why a command failed. `code` is `timeout` if no answer came in time."""

    code: str
    message: str
    details: NotRequired[Any]


class Command(TypedDict):
    """A command as `/v1` shows it. Times are RFC 3339 in UTC. `get` and `wait` ask for no `grant_token`."""

    id: str
    device_id: str
    hardware_id: str
    type: str
    status: Status
    params: Any
    grant_token: str | None
    result: Any
    error: CommandError | None
    expires_at: str | None
    delivered_at: str | None
    executed_at: str | None
    created_at: str
    state: StateName
    published_at: str | None
    attempts: int
    retry_of: str | None


class Retried(Command):
    """The new command of a retry. `may_repeat`: the old one timed out, so its device may have executed it."""

    may_repeat: bool


class Explanation(TypedDict):
    """The reason for a command's state: a sentence (`summary`), and for programs `reasons`, each with `code`.

    `next`: what happens next by itself, `{action, at?}`; None: nothing.
    """

    command_id: str
    state: StateName
    summary: str
    reasons: list[dict[str, Any]]
    next: dict[str, Any] | None


class Event(TypedDict):
    """A CloudEvent. `id`: its position in the log. `source`: that log. `subject`: the id of its command or
    device.

    `type`: `ordain.command.<event>.v1` or `ordain.device.<event>.v1`. `version`: its number among the events
    of its subject, from 1. `erased`: true if the data was erased. `data` always names device and command.
    """

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    datacontenttype: str
    project: str
    actor: str
    schema: int
    version: int
    erased: NotRequired[bool]
    data: dict[str, Any]


def position(event: Event) -> str:
    """Where an event is: `<log id>:<position>`. Store it, and pass it as `after` to continue."""
    return f"{event['source'].rpartition('/')[2]}:{event['id']}"


class AppError(Exception):
    """The base class of all errors of the SDK. `code` is for programs, `message` is a sentence for people.

    `status`: the HTTP status, None if no answer came. `details`: more facts from the broker. `retry_after`:
    seconds to wait before the next try, if the broker gave them. `idempotency_key`: the key of a failed
    `send`; a repeated `send` with this key creates nothing twice.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status
        self.details = details
        self.retry_after = retry_after
        self.idempotency_key: str | None = None


class InvalidRequest(AppError):
    """The request is wrong: `details["field"]` names the field, `details["reason"]` the reason."""


class Unauthorized(AppError):
    """The key is missing, unknown or revoked."""


class Forbidden(AppError):
    """The key lacks a scope."""


class NotFound(AppError):
    """The object does not exist, or it belongs to another project."""


class Conflict(AppError):
    """The current state does not allow the request; the message gives the reason."""


class IdempotencyConflict(Conflict):
    """The idempotency key was used for a different request."""


class DeviceDeleted(Conflict):
    """The device was deleted."""


class Gone(AppError):
    """The requested data existed, but was erased or is no longer stored."""


class TooLarge(AppError):
    """The request or the payload of the command is too large."""


class RateLimited(AppError):
    """Too many requests; `retry_after` gives the seconds to wait."""


class QueueFull(AppError):
    """Too many open commands."""


class Unavailable(AppError):
    """No answer came, or the broker could not answer now. It is unknown if the request took effect."""


class Timeout(AppError, TimeoutError):
    """`wait`: the command was not closed in time. It is still open; you can wait again."""


ERRORS: Final[dict[str, type[AppError]]] = {
    "invalid_request": InvalidRequest,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "not_found": NotFound,
    "conflict": Conflict,
    "idempotency_conflict": IdempotencyConflict,
    "device_deleted": DeviceDeleted,
    "gone": Gone,
    "too_large": TooLarge,
    "rate_limit_exceeded": RateLimited,
    "queue_full": QueueFull,
}


class Place:
    """A place in a log, as text and as a position. `log_id` None: the caller gave only a number."""

    SAID: Final = re.compile(r"(?:(log_[0-9a-z]+):)?([0-9]+)")

    def __init__(self, text: str) -> None:
        found = self.SAID.fullmatch(text)
        self.text = text
        self.log_id = found[1] if found else None
        self.position = int(found[2]) if found else -1

    def following(self, before: Place) -> Place:
        """This place, or `before` if the broker repeats what was already seen.

        Raises:
            Gone: it lies in another log, so its position says nothing about the events in between.
        """
        if None not in (self.log_id, before.log_id) and self.log_id != before.log_id:
            raise Gone("gone", f"the broker's log was replaced: {before.text} belongs to another log")
        if self.position == before.position:
            return self if before.log_id is None else before
        return self if self.position > before.position else before


def failure(status: int, retry_after: str | None, body: bytes) -> AppError:
    """The error for an HTTP answer. The answer can also come from a proxy, in another form."""
    try:
        said = json.loads(body)["error"]
        code, message, details = str(said["code"]), str(said["message"]), said.get("details")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message, details = f"http_{status}", f"status {status}, without an error of the broker", None
    kind = Unavailable if status >= 500 else ERRORS.get(code, AppError)
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    return kind(code, message, status=status, details=details, retry_after=seconds)


def is_temporary(error: AppError) -> bool:
    """True if the same request can succeed later."""
    return isinstance(error, Unavailable) or error.status in (408, 429)
