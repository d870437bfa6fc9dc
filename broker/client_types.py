"""What goes in and out of the SDK: its dictionaries, as a type checker sees them, and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NotRequired, TypedDict

Status = Literal["pending", "delivered", "executed", "failed", "expired", "cancelled"]
StateName = Literal[
    "pending", "published", "acknowledged", "executed", "failed", "timed_out", "expired", "cancelled"
]


class SendParams(TypedDict):
    """What `send` takes: `data` is any JSON; a call repeated with the same key makes nothing twice."""

    name: str
    device_ident: Sequence[str]
    data: NotRequired[Any]
    idempotency_key: NotRequired[str]


class Sent(TypedDict):
    """The command is on disk and will be delivered when the device is there."""

    sent: Literal[True]
    command_id: str


class NotSent(TypedDict):
    """Nothing was recorded for this device. `error`: such as `Device not found` or `Queue full`."""

    sent: Literal[False]
    error: str


class HistoryParams(TypedDict):
    """What `history` takes: `start` <= time < `end`, ISO 8601; `end` is now if left out."""

    name: str
    device_idents: Sequence[str]
    start: str
    end: NotRequired[str]


class Record(TypedDict):
    """One command that was sent: its payload, when it was created (ms since 1970), and what became of it."""

    value: Any
    timestamp: int
    command_id: str
    status: Status


class CommandError(TypedDict):
    """Why a command failed; `timeout` where no answer came."""

    code: str
    message: str
    details: NotRequired[Any]


class Command(TypedDict):
    """A command as `/v1` shows it. Times are RFC 3339 in UTC."""

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


class Event(TypedDict):
    """A CloudEvent. `id` is its position in the log, `subject` the command, or the device, it is about.

    `type` is `ordain.command.<event>.v1` or `ordain.device.<event>.v1`; `version` the place among the events
    of its subject, from 1; `erased`: the data is gone for ever. `data` always names device and command.
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


class AppError(Exception):
    """Whatever the broker refuses or cannot do. `code` is for programs, `message` a sentence.

    `status` is that of HTTP, None if no answer came; `details` what the broker adds; `retry_after` the
    seconds after which it may be asked again, if it said so; `idempotency_key` that of a failed `send`:
    called with it again, `send` makes nothing twice.
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
    """Something asked for is wrong: `details["field"]` and `details["reason"]` name it."""


class Unauthorized(AppError):
    """No key, or one that is unknown or revoked."""


class Forbidden(AppError):
    """The key lacks a scope."""


class NotFound(AppError):
    """Not known, or of another project."""


class Conflict(AppError):
    """The state of things stands against it; the message says which."""


class IdempotencyConflict(Conflict):
    """The idempotency key was used for something else."""


class DeviceDeleted(Conflict):
    """The device is gone."""


class Gone(AppError):
    """What was asked for existed and was erased, or cannot be read any more."""


class TooLarge(AppError):
    """The request or the payload of the command is larger than is taken."""


class RateLimited(AppError):
    """Too many requests; `retry_after` says when to come back."""


class QueueFull(AppError):
    """Too many open commands."""


class Unavailable(AppError):
    """No answer, or one that says the broker cannot answer now: whether it did what was asked is unknown."""


class Timeout(AppError, TimeoutError):
    """`wait`: the command was not closed in time. It goes on; wait again."""


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
