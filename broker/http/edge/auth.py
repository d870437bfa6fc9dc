"""Authentication: turns the key of a request into a `Caller`, and checks path, query and body strictly.

A request on the private socket comes from the operator of this machine and needs no key. `authorize` runs
before any body is read. It must not wait for I/O, except when it looks up a device for the first time.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, cast

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.params import QueryParameter

from broker.domain.errors import Refusal, Unavailable, invalid
from broker.engine.commands import Caller
from broker.engine.keys import OF_KEY, SCOPES
from broker.engine.registry import OF_DEVICE
from broker.http.edge.errors import body_fault
from broker.http.edge.positions import is_position
from broker.http.edge.services import Services, served
from broker.http.edge.strangers import PASSED
from broker.settings import Limits
from devices.names import RESERVED, is_name
from devices.speech.numbers import too_hard

PIECE_BYTES = 65_536
MANY_VALUES = 12_000  # how many more a body may hold that names up to 10,000 devices, for the names
FILTERS_BY_NAME = frozenset({"device", "type", "command"})
OPERATOR = Caller(actor="operator:local", project=None, scopes=frozenset(SCOPES))


class Call(Request[Caller, Any, State]):
    """One request. `user` is the caller; `services` are the parts of the broker that handlers use."""

    __slots__ = ()

    @property
    def services(self) -> Services:
        return served(self.scope).services

    async def body(self) -> bytes:
        """The whole body; a second call returns the same bytes.

        Raises:
            HTTPException: 413, as soon as the received bytes exceed the limit; Content-Length is not trusted.
        """
        if not isinstance(self._body, bytes):
            most = max(self.services.limits.body_bytes, self.route_handler.opt.get("body_bytes", 0))
            body, more = bytearray(), True
            while more:
                event = cast(dict[str, Any], await self.receive())
                if event["type"] == "http.disconnect":
                    raise HTTPException("the client went away")
                body += event.get("body", b"")
                more = event.get("more_body", False)
                if len(body) > most:
                    raise HTTPException(status_code=413)
            self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        """The body, decoded strictly into the type of the handler's `data` parameter.

        Litestar's own conversion would accept `"5"` for 5. It leaves a value alone that already is a Struct.

        Raises:
            HTTPException: 415, if the content type is not JSON.
            Refusal: invalid_request, if the body is not valid; it names the field. too_large.
        """
        if header(self, b"content-type").partition(b";")[0].strip().lower() != b"application/json":
            raise HTTPException("a body must be JSON: Content-Type: application/json", status_code=415)
        field = self.route_handler.parsed_data_field
        assert field is not None, "only asked for by a handler that has `data`"
        body = await self.body()
        try:
            check_size(body, self.services.limits, self.route_handler.opt.get("many", ""))
            return msgspec.json.decode(body, type=field.annotation)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise body_fault(error, field.annotation, body) from error


def needs(
    scope: str, *, device: bool = False, body_bytes: int = 0, many: str = ""
) -> dict[str, str | bool | int]:
    """The options of a route.

    `scope`: the scope that a key needs. `device`: a device's token is accepted too. `body_bytes`: the
    largest body, if it is larger than the usual limit. `many`: the field with many names that such a body is
    for; the rest of the body has the usual limit.
    """
    return {"scope": scope, "device": device, "body_bytes": body_bytes, "many": many}


def check_size(body: bytes, limits: Limits, many: str) -> None:
    """Refuses a body with too many values, before it is decoded.

    Decoding takes time per value, not per byte: 4 MB of `[],` are a million lists, and would block the event
    loop for seconds. Commas and brackets are counted instead of values, because that is fast. Those inside
    texts count too. So do numbers that take long to read.

    Raises:
        Refusal: too_large.
        msgspec.DecodeError: it is not JSON.
    """
    values = _check_values(body, limits.body_values + (MANY_VALUES if many else 0))
    if len(body) <= limits.body_bytes and values <= limits.body_values:
        _check_numbers(body)
    elif many:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        others = b",".join(bytes(value) for name, value in fields.items() if name != many)
        if len(others) > limits.body_bytes:
            what = f"{len(others)} bytes; at most {limits.body_bytes} are allowed"
            raise Refusal("too_large", f"the body beside {many}: {what}")
        _check_values(others, limits.body_values)
        _check_numbers(others + b",")


def _check_values(text: bytes, most: int) -> int:
    """How many values a text of JSON holds, more or less."""
    values = 0
    for start in range(0, len(text), PIECE_BYTES):
        piece = text[start : start + PIECE_BYTES]
        values += piece.count(b",") + piece.count(b"[") + piece.count(b"{")
        if values > most:
            raise Refusal("too_large", f"the body holds more than {most} values")
    return values


def _check_numbers(text: bytes) -> None:
    if (fault := too_hard(text)) is not None:
        raise Refusal("too_large", f"the body: {fault}")


async def authorize(request: Request[Any, Any, Any], scope: str = "") -> None:
    """Runs before every route that needs a key. `scope`: empty for the one of the route.

    It is not a Litestar guard, because Litestar copies the handler for guards on each request.

    Raises:
        Refusal: unauthorized, forbidden (the key lacks the scope), rate_limit_exceeded, invalid_request (path
            or query is wrong).
        Unavailable: the request would write, and the log cannot be written now.
    """
    app = served(request.scope)
    services = app.services
    options, secret = request.route_handler.opt, _secret(request)
    if app.local:
        caller: Caller | None = OPERATOR
    elif options.get("ticket") and (ticket := request.query_params.get("ticket")) is not None:
        if (caller := services.tickets.use(ticket)) is None:
            raise Refusal("unauthorized", "ticket: it is unknown, used or expired; fetch a new one")
    elif secret.startswith(OF_DEVICE):
        caller = await services.registry.caller(secret, str(request.path_params.get("device", "")))
    else:
        caller = services.keys.caller(secret)
    if caller is None:
        raise Refusal("unauthorized", "a valid key is needed: Authorization: Bearer <key>, or X-API-Key")
    if (passed := cast(dict[str, Any], request.scope).get(PASSED)) is not None:
        passed()
    scope = scope or options["scope"]
    if caller.device_id is not None:
        if not options.get("device"):
            raise Refusal("forbidden", "a device's token serves its heartbeat and its own commands only")
    else:
        for each in (scope, *options.get("also", ())):
            if each not in caller.scopes:
                raise Refusal("forbidden", f"this key does not have the scope {each}", {"scope": each})
    if request.scope["method"] != "GET" and not scope.endswith(":read") and not services.commands.writer.open:
        raise Unavailable("the log cannot be written now")
    if request.scope.get("user") is None:  # a stream asks twice
        request.scope["user"] = caller
        quotas = services.commands.quotas
        rates = quotas.of_request(caller.actor, caller.requests_per_minute)
        quotas.take(rates, services.commands.writer.now())
    check_address(request)


def check_address(request: Request[Any, Any, Any]) -> None:
    """Checks that path parameters are names, and that each query parameter is known and has one value, not
    null. An unknown one is refused: a filter with a typing error would show everything.

    Reserved names such as `me` are allowed in a path: they have routes of their own.

    Raises:
        Refusal: invalid_request.
    """
    for field, value in request.scope["path_params"].items():
        if not is_name(value) and value not in RESERVED and not (field == "position" and is_position(value)):
            raise invalid(field, "must match [A-Za-z0-9][A-Za-z0-9_-]{0,63}", value)
    if request.scope["query_string"]:
        given: set[str] = set()
        known = _query_names(request.route_handler)
        for name, value in request.query_params.multi_items():
            field = name[:80] or "query"
            if name not in known:
                raise invalid(field, _unknown(name, known))
            if field in given:
                raise invalid(field, "is given more than once")
            if "\ufffd" in value:
                raise invalid(field, "is not UTF-8", value)
            if field not in FILTERS_BY_NAME and value.lower() == "null":
                # Litestar would read "null" as absent, and a list without its filter would show too much.
                raise invalid(field, "cannot be null; leave it out", value)
            given.add(field)


def _query_names(handler: Any) -> tuple[str, ...]:
    """The query parameters of a route; found once and kept with its options."""
    known: tuple[str, ...] | None = handler.opt.get("query_names")
    if known is None:
        parameters = {
            name: field.kwarg_definition
            for name, field in handler.parsed_fn_signature.parameters.items()
            if isinstance(field.kwarg_definition, QueryParameter)
        }
        known = handler.opt["query_names"] = tuple(
            sorted(given.name or name for name, given in parameters.items())
        )
    return known


def _unknown(name: str, known: Collection[str]) -> str:
    if not known:
        return "is not known here: this path takes no query parameters"
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "."
    return f"is not known here{hint} Known here: {', '.join(known)}"


def header(request: Request[Any, Any, Any], name: bytes) -> bytes:
    """A header, read from the scope: building Litestar's headers costs more than the rest of `authorize`."""
    for key, value in request.scope["headers"]:
        if key == name:
            return value
    return b""


def _secret(request: Request[Any, Any, Any]) -> str:
    """The key or token of a request. A proxy may use one of the two headers for a secret of its own, so a
    value that has our form goes first."""
    scheme, _, bearer = header(request, b"authorization").partition(b" ")
    given = bearer if scheme.lower() == b"bearer" else b"", header(request, b"x-api-key")
    secrets = [each.strip().decode("latin-1") for each in given]
    ours = (each for each in secrets if each.startswith((OF_KEY, OF_DEVICE)))
    return next(ours, secrets[0] or secrets[1])
