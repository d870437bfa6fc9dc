"""Errors over HTTP: the table from error codes to statuses, and the one JSON form of all errors.

An unexpected failure is logged and answered as `internal`; the answer shows no internal details. The API
does not use 422: a wrong request gets 400, and the error names the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, cast, get_args

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import UNSET, Meta, UnsetType

from broker.domain.errors import Refusal, Unavailable, got, invalid
from broker.http.edge.answers import Json
from broker.http.edge.services import Services, served
from broker.often import shown
from broker.seams import Broken, Full, Unknown
from devices.allowed import reason as right

logger = structlog.get_logger()

STATUS = {
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "idempotency_conflict": 409,
    "device_deleted": 409,
    "gone": 410,
    "too_large": 413,
    "unsupported_media_type": 415,
    "rate_limit_exceeded": 429,
    "queue_full": 429,
    "internal": 500,
    "unavailable": 503,
}
HEADERS = {
    "unauthorized": {"WWW-Authenticate": "Bearer"},
    "rate_limit_exceeded": {"Retry-After": "1"},
    "queue_full": {"Retry-After": "1"},
    "unavailable": {"Retry-After": "1"},
}
# For exceptions of Litestar and this package that carry only a status.
BY_STATUS = {
    400: ("invalid_request", "the request is not valid"),
    404: ("not_found", "there is nothing at this path"),
    405: ("method_not_allowed", "this path does not support this method"),
    413: ("too_large", "the body is too large"),
    415: ("unsupported_media_type", "the body must be JSON"),
}
DOCUMENTED = {
    400: "`invalid_request`: `details.field` names what is wrong, `details.reason` says why.",
    401: "`unauthorized`: no key, or one that is unknown or revoked.",
    403: "`forbidden`: the key lacks the scope.",
    404: "`not_found`: it does not exist, or it belongs to another project.",
    409: "`conflict` or `idempotency_conflict`: the message gives the reason.",
    410: "`gone`: the command created with this idempotency key was erased, or a position belongs to another "
    "log: the broker's log was restored or replaced.",
    413: "`too_large`: the body or the parameters are too large.",
    415: "`unsupported_media_type`: a body must be `application/json`.",
    429: "`queue_full`: too many open commands, or `rate_limit_exceeded`: too many requests in a minute; "
    "`Retry-After` gives the seconds to wait.",
    503: "`unavailable`: the log cannot be written now, or the node that owns it ended before it answered. "
    "The outcome is unknown; send the request again, with its idempotency key.",
}
# Refusals that get a log line, because they may be an attack.
TOLD = frozenset({"unauthorized", "forbidden", "rate_limit_exceeded"})
# Handler parameters whose name in Python differs from their name in the API.
RENAMED = {"in_state": "state", "with_grant": "grant"}
_BOUNDS = ("gt", "ge", "lt", "le", "min_length", "max_length", "pattern")
_STEP = re.compile(r"\.([^.\[\]]+)|\[([^\]]*)\]")
_NAMED = re.compile(r"Object (?:(contains unknown)|missing required) field `(.*)`", re.DOTALL)


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """The error of an answer."""

    code: Annotated[
        str,
        Meta(
            description="The error code, for programs.",
            examples=["invalid_request"],
            extra_json_schema={"enum": list(STATUS)},
        ),
    ]
    message: Annotated[
        str,
        Meta(
            description="The reason as a sentence, for people.",
            examples=["ttl_sec: must be a whole number from 1 to 31536000 or null (got 0)"],
        ),
    ]
    details: Annotated[
        dict[str, Any] | UnsetType,
        Meta(
            description="More facts. An `invalid_request` always has `field` and `reason`.",
            examples=[
                {"field": "ttl_sec", "reason": "must be a whole number from 1 to 31536000 or null (got 0)"}
            ],
        ),
    ] = UNSET


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The form of every error, from every path."""

    error: ErrorDetail


class Held(Json[ErrorBody]):
    """A refusal that waits at the commit barrier before it is sent.

    The refusal may depend on events that are not durable yet. If their commit fails, the answer is 503.
    """

    def to_asgi_response(  # type: ignore[override]
        self, app: None, request: Request[Any, Any, Any], **more: Any
    ) -> ASGIApp:
        refusal = super().to_asgi_response(app, request, **more)
        services = _services(request)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await services.commands.writer.barrier()
            except Unavailable as error:
                lost = unavailable(request, error)
                await lost.to_asgi_response(app=None, request=request)(scope, receive, send)
            else:
                await refusal(scope, receive, send)

        return answer


def documented(*statuses: int) -> dict[int, ResponseSpec]:
    """The error answers of a route that needs a key, for OpenAPI: 400, 401, 403, 503 and `statuses`."""
    every = sorted({400, 401, 403, 503, *statuses})
    return {
        status: ResponseSpec(ErrorBody, generate_examples=False, description=DOCUMENTED[status])
        for status in every
    }


def error_body(code: str, message: str, details: dict[str, Any] | None = None) -> ErrorBody:
    return ErrorBody(error=ErrorDetail(code=code, message=message, details=details or UNSET))


def answer(
    code: str, message: str, details: dict[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> Response[ErrorBody]:
    body = error_body(code, message, details)
    return Json(body, status_code=STATUS[code], headers={**HEADERS.get(code, {}), **(headers or {})})


def refused(request: Request[Any, Any, Any], error: Refusal) -> Response[ErrorBody]:
    body = error_body(error.kind, error.message, error.details)
    headers = dict(HEADERS.get(error.kind, {}))
    if error.retry_after_sec is not None:
        headers["Retry-After"] = str(error.retry_after_sec)
    services = _services(request)
    services.metrics.refused(error.kind)
    if error.kind in TOLD:
        client = request.scope.get("client")  # ASGI: optional
        line = {"code": error.kind, "method": request.scope["method"], "path": shown(request.scope["path"])}
        services.often.info("http.refused", line | {"address": client[0] if client else "local"})
    return Held(body, status_code=STATUS[error.kind], headers=headers)


def unavailable(_: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    if not isinstance(error, Unavailable):
        logger.error("http.storage_failed", error=str(error))
    return answer("unavailable", "the log cannot be read or written now; try again later")


def by_status(request: Request[Any, Any, Any], error: HTTPException) -> Response[ErrorBody]:
    """Answers an exception that Litestar raised itself."""
    if isinstance(error, ValidationException):
        return refused(request, _parameter_fault(request, error))
    code, message = BY_STATUS.get(error.status_code, BY_STATUS[400])
    if error.status_code >= 500:
        line = {"detail": shown(error.detail), "path": shown(request.scope["path"])}
        _services(request).often.info("http.broken_off", line)
        code, message = "internal", "the request could not be served"
    else:
        _services(request).metrics.refused(code)
    if error.status_code == 415 and error.detail:
        message = error.detail
    details = {"field": "request", "reason": error.detail} if code == "invalid_request" else None
    # Litestar lists the methods of a path in random order.
    allow = (error.headers or {}).get("allow")
    headers = {"Allow": ", ".join(sorted(allow.split(", ")))} if allow else {}
    return answer(code, message, details, headers)


def failed(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    logger.error(
        "http.failed", method=request.scope["method"], path=shown(request.scope["path"]), exc_info=error
    )
    return answer("internal", "the broker failed unexpectedly; the error was logged")


HANDLERS: Any = {
    Refusal: refused,
    Unavailable: unavailable,
    Broken: unavailable,
    Full: unavailable,
    Unknown: unavailable,
    HTTPException: by_status,
    Exception: failed,
}


def answer_to(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """The answer to an exception: as in Litestar, the handler of its nearest class gives it."""
    handler = next(HANDLERS[kind] for kind in type(error).__mro__ if kind in HANDLERS)
    return cast(Response[ErrorBody], handler(request, error))


def _services(request: Request[Any, Any, Any]) -> Services:
    return served(request.scope).services


def _parameter_fault(request: Request[Any, Any, Any], error: ValidationException) -> Refusal:
    """A refusal for the first fault that Litestar found in the parameters of a request."""
    faults = error.extra if isinstance(error.extra, list) else []
    first = faults[0] if faults and isinstance(faults[0], dict) else {}
    if first.get("key") == "data":
        return invalid("body", "is required")
    reason = str(first.get("message", error.detail)).partition(" - at `")[0]
    field = str(first.get("key", "request"))
    parameter = request.route_handler.parsed_fn_signature.parameters.get(field)
    field = RENAMED.get(field, field)
    if parameter is not None:
        bounds = {bound: getattr(parameter.kwarg_definition, bound, None) for bound in _BOUNDS}
        # A query has no null: an optional parameter is left out.
        kinds = [kind for kind in get_args(parameter.annotation) if kind is not type(None)]
        kind = kinds[0] if parameter.is_optional and len(kinds) == 1 else parameter.annotation
        reason = right(Annotated[kind, Meta(**bounds)], "", reason)
        reason = _with_value(reason, request.query_params.get(field, UNSET))
    return invalid(field, reason)


def body_fault(error: Exception, kind: Any, body: bytes) -> Refusal:
    """A refusal that names the wrong field of a body and its value, taken from the decoder's message.

    `kind`: the type that the body should have.
    """
    if isinstance(error, RecursionError):
        return invalid("body", "is nested too deeply")
    if not isinstance(error, msgspec.ValidationError):
        return invalid("body", f"is not JSON in UTF-8: {str(error)[:200]}")
    reason, _, path = str(error).partition(" - at `$")
    reason = right(kind, path.removesuffix("`"), reason)
    field = path.removesuffix("`").removeprefix(".")
    if named := _NAMED.fullmatch(reason):
        field = ".".join(filter(None, [field, named[2] or '""']))
        return invalid(field[:200], "is not known here" if named[1] else "is required")
    return invalid(field[:200] or "body", _with_value(reason, _value_at(body, path) if field else UNSET))


def _value_at(body: bytes, path: str) -> Any:
    """The value at a path of msgspec's messages; UNSET if it cannot be found."""
    try:
        value = msgspec.json.decode(body)
        for name, index in _STEP.findall(path.removesuffix("`")):
            value = value[name] if name else value[int(index)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, ValueError, TypeError):
        return UNSET
    return value


def _with_value(reason: str, value: Any) -> str:
    return reason if value is UNSET or " (got " in reason else reason + got(value)
