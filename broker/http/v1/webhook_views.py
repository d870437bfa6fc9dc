"""Webhooks as `/v1` takes and shows them: bodies, endpoints, attempts.

Pure. A secret is in the answer that made it, and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from broker.http.v1.devices import Title
from broker.http.v1.views import Name, Time
from broker.subscriptions.webhook_worker import Attempt
from broker.subscriptions.webhooks import Webhook
from devices.clock import rfc3339

DAY_SEC = 86_400

Url = Annotated[
    str,
    Meta(
        description="https, of the public internet. Plain ASCII, without user and password.",
        max_length=2_048,
        examples=["https://hooks.example/ordain"],
    ),
]
EventName = Literal[
    "created",
    "published",
    "acknowledged",
    "progressed",
    "executed",
    "failed",
    "timed_out",
    "expired",
    "cancelled",
    "registered",
    "changed",
    "token_rotated",
    "online",
    "offline",
    "deleted",
]
Events = Annotated[tuple[EventName, ...], Meta(description="None: all.", max_length=50)]


class WebhookBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A webhook to be made."""

    url: Url
    name: Title | None = None
    events: Events = ()
    device: Annotated[Name | None, Meta(description="Only events of this device: id or hardware id.")] = None
    type: Annotated[Name | None, Meta(description="Only events of commands of this name.")] = None
    project: Annotated[Name | UnsetType, Meta(description="For admins: another project than the key's.")] = (
        UNSET
    )


class WebhookChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is absent keeps its value."""

    url: Url | UnsetType = UNSET
    name: Title | UnsetType | None = UNSET
    events: Events | UnsetType = UNSET
    device: Name | UnsetType | None = UNSET
    type: Name | UnsetType | None = UNSET
    enabled: Annotated[
        bool | UnsetType, Meta(description="false: paused, and nothing is lost; true: resumed.")
    ] = UNSET


class RotateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    overlap_sec: Annotated[
        int,
        Meta(ge=0, le=30 * DAY_SEC, description="How long those before it sign as well.", examples=[3_600]),
    ] = DAY_SEC


class RedriveBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"position": "from"}
):
    position: Annotated[
        int, Meta(ge=1, description="Everything wanted from this position on is sent again.", examples=[1])
    ]


class Failing(msgspec.Struct, frozen=True, kw_only=True):
    """The event that could not be delivered for longest."""

    position: int
    attempts: int
    since: Time


class WebhookView(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint. `secret` is in the answer that made it, and nowhere else."""

    id: str
    project: str
    url: str
    name: str | None
    events: Annotated[list[str], Meta(description="None: all.")]
    device_id: str | None
    type: str | None
    state: Annotated[
        Literal["active", "paused", "gone"],
        Meta(description="`paused`: until it is resumed, nothing is skipped; `gone`: it answered 410."),
    ]
    reason: Annotated[str | None, Meta(description="Why it is not active.")]
    cursor: Annotated[int, Meta(description="Everything wanted before this position is delivered.")]
    lag: Annotated[int, Meta(description="Positions from the cursor to the end of the log.")]
    failing: Failing | None
    old_secrets_until: Annotated[Time | None, Meta(description="Until then a secret before this one signs.")]
    created_at: Time
    created_by: str
    secret: Annotated[str | UnsetType, Meta(description="`whsec_…`, to verify signatures. Shown once.")] = (
        UNSET
    )


class WebhookList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[WebhookView]
    has_more: bool
    next_cursor: str | None


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One request that was made."""

    position: int
    type: str
    device_id: str
    command_id: str | None
    outcome: Literal["delivered", "failed"]
    attempt: Annotated[int | None, Meta(description="Of this event, from 1; null: asked for by hand.")]
    at: Time
    duration_ms: int
    status: Annotated[int | None, Meta(description="Null: no answer was seen; `error` says why.")]
    error: str | None


class DeliveryList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[Delivery]
    has_more: bool
    next_cursor: str | None


def webhook(known: Webhook, head: int, now: int, secret: str | UnsetType = UNSET) -> WebhookView:
    """`head`: the end of the log; `now` in ms."""
    endpoint, failing, cursor = known.endpoint, known.failing, known.cursor
    old = [each.until for each in endpoint.signing(now) if each.until is not None]
    return WebhookView(
        id=endpoint.id,
        project=endpoint.project,
        url=endpoint.url,
        name=endpoint.name,
        events=list(endpoint.events),
        device_id=endpoint.device_id,
        type=endpoint.command,
        state=endpoint.state,
        reason=endpoint.reason,
        cursor=cursor,
        lag=max(0, head + 1 - cursor),
        failing=None
        if failing is None or failing.failed_since is None
        else Failing(
            position=failing.position, attempts=failing.attempts, since=rfc3339(failing.failed_since)
        ),
        old_secrets_until=rfc3339(max(old)) if old else None,
        created_at=rfc3339(endpoint.created_at),
        created_by=endpoint.created_by,
        secret=secret,
    )


def outcome(attempt: Attempt) -> Literal["delivered", "failed"]:
    return "delivered" if attempt.delivered else "failed"


def delivery(attempt: Attempt) -> Delivery:
    return Delivery(
        position=attempt.position,
        type=attempt.type,
        device_id=attempt.device_id,
        command_id=attempt.command_id,
        outcome=outcome(attempt),
        attempt=attempt.attempt,
        at=rfc3339(attempt.at),
        duration_ms=attempt.duration_ms,
        status=attempt.status,
        error=attempt.error,
    )
