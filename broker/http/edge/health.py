"""Routes that need no key: health, metrics, and the public keys of grants."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from litestar import Response, Router, get
from litestar.openapi.datastructures import ResponseSpec

from broker import metrics
from broker.http.edge.answers import Json
from broker.http.edge.auth import Call
from broker.http.edge.errors import ErrorBody, answer

NOT_READY = {503: ResponseSpec(ErrorBody, generate_examples=False, description="`unavailable`: not ready.")}


class Health(msgspec.Struct, frozen=True):
    """The state of the broker as one word."""

    status: Literal["ok", "ready"]


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


@get("/metrics", security=[{}], media_type="text/plain")
async def read_metrics(request: Call) -> Response[bytes]:
    """Read the metrics

    In the Prometheus text format.
    """
    return Response(request.services.metrics.text(), media_type=metrics.CONTENT_TYPE)


@get("/.well-known/jwks.json", security=[{}])
async def jwks(request: Call) -> Jwks:
    """Read the public keys of grants

    A JSON Web Key Set (RFC 7517). Devices verify a `grant_token` with these keys.
    """
    return msgspec.convert(request.services.grants.jwks(), Jwks)


routes = Router("/", route_handlers=[healthz, readyz, read_metrics, jwks], tags=["System"])
