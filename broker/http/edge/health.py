"""Routes that need no key: health, metrics, and the public keys of grants."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from litestar import Response, Router, get
from litestar.openapi.datastructures import ResponseSpec
from msgspec import UNSET, UnsetType

from broker.domain.errors import Refusal
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call, authorize
from broker.http.edge.errors import ErrorBody, answer
from broker.http.edge.services import served
from broker.metrics import metrics

NOT_READY = {503: ResponseSpec(ErrorBody, generate_examples=False, description="`unavailable`: not ready.")}

NO_METRICS = {
    status: ResponseSpec(ErrorBody, generate_examples=False, description=f"`{code}`: see `metrics`.")
    for status, code in ((401, "unauthorized"), (403, "forbidden"), (404, "not_found"))
}


class Health(msgspec.Struct, frozen=True):
    """The state of the broker as one word. `role`: only with several nodes; a door passes requests on to the
    owner."""

    status: Literal["ok", "ready"]
    role: Literal["owner", "door"] | UnsetType = UNSET


class Jwk(msgspec.Struct, frozen=True, kw_only=True):
    """One public key."""

    kty: str
    crv: str
    x: str
    kid: str
    use: str
    alg: str


class Jwks(msgspec.Struct, frozen=True):
    """The public keys that verify grants, by `kid`."""

    keys: list[Jwk]


@get("/healthz", security=[{}])
async def healthz() -> Health:
    """Check that the process is alive

    200 means only that the process answers.
    """
    return Health("ok")


@get("/readyz", security=[{}], responses=NOT_READY)
async def readyz(request: Call) -> Response[Health | ErrorBody]:
    """Check that the broker is ready

    503 while the broker cannot accept or deliver commands; `details.reasons` gives the reasons.
    """
    reasons: list[str] = request.services.ready()
    if reasons:
        refusal: Response[Any] = answer(
            "unavailable", f"not ready: {'; '.join(reasons)}", {"reasons": reasons}
        )
        return refusal
    return Json(Health("ready"))


@get("/metrics", security=[{}], responses=NO_METRICS, media_type="text/plain")
async def read_metrics(request: Call) -> Response[bytes]:
    """Read the metrics

    In the Prometheus text format, at most a second old. The setting `metrics` says who may: anybody (`open`),
    a key with the scope `admin` (`key`), or nobody here (`off`, or a listener of its own).
    """
    services, local = request.services, served(request.scope).local
    if not local and services.settings.metrics == "key":
        await authorize(request, "admin")
    elif not local and services.settings.metrics != "open":
        raise Refusal("not_found", "there is nothing at this path")
    return Response(services.metrics.text(fresh=local), media_type=metrics.CONTENT_TYPE)


@get("/.well-known/jwks.json", security=[{}])
async def jwks(request: Call) -> Jwks:
    """Read the public keys of grants

    A JSON Web Key Set (RFC 7517). Devices verify a `grant_token` with these keys.
    """
    return msgspec.convert(request.services.grants.jwks(), Jwks)


routes = Router("/", route_handlers=[healthz, readyz, read_metrics, jwks], tags=["System"])
