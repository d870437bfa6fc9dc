"""Webhooks as `/v1` accepts and shows them: request bodies, endpoints, deliveries.

Pure. Only the answer that created a secret contains it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from broker.http.edge.positions import PATTERN
from broker.http.v1.devices import Title
from broker.http.v1.views import Name, Time
from broker.subscriptions.webhook_state import Webhook
from broker.subscriptions.webhook_worker import Attempt
from devices.clock import rfc3339

DAY_SEC = 86_400

Url = Annotated[
    str,
    Meta(
        description="An https URL on the public internet. ASCII only, without user and password.",
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
    "reported",
    "deleted",
]
Events = Annotated[
    tuple[EventName, ...], Meta(description="The events to send; an empty list means all.", max_length=50)
]


class WebhookBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A webhook to create."""

    url: Url
    name: Title | None = None
    events: Events = ()
    device: Annotated[Name | None, Meta(description="Only events of this device: id or hardware id.")] = None
    type: Annotated[Name | None, Meta(description="Only events of commands with this name.")] = None
    project: Annotated[
        Name | UnsetType, Meta(description="For admin keys only: another project than the key's.")
    ] = UNSET


class WebhookChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The changes to a webhook. An absent field keeps its value."""

    url: Url | UnsetType = UNSET
    name: Title | UnsetType | None = UNSET
    events: Events | UnsetType = UNSET
    device: Name | UnsetType | None = UNSET
    type: Name | UnsetType | None = UNSET
    enabled: Annotated[
        bool | UnsetType,
        Meta(description="`false` pauses the webhook, and no event is lost; `true` resumes it."),
    ] = UNSET


class RotateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    overlap_sec: Annotated[
        int,
        Meta(
            ge=0,
            le=30 * DAY_SEC,
            description="Seconds during which the old secrets also sign.",
            examples=[3_600],
        ),
    ] = DAY_SEC


class RedriveBody(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"position": "from"}
):
    position: Annotated[
        Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern=PATTERN)],
        Meta(
            description="All events that match the webhook are sent again from this position on: a number, "
            "or `<log id>:<position>`.",
            examples=[1],
        ),
    ]


class Failing(msgspec.Struct, frozen=True, kw_only=True):
    """The event whose delivery has been failing for the longest time."""

    position: int
    attempts: int
    since: Time


class WebhookView(msgspec.Struct, frozen=True, kw_only=True):
    """One webhook. Only the answer that created a secret contains `secret`."""

    id: str
    project: str
    url: str
    name: str | None
    events: Annotated[list[str], Meta(description="The events that are sent; an empty list means all.")]
    device_id: str | None
    type: str | None
    state: Annotated[
        Literal["active", "paused", "gone"],
        Meta(
            description="`paused`: nothing is sent until it is resumed, and no event is skipped; `gone`: the "
            "endpoint answered 410."
        ),
    ]
    reason: Annotated[str | None, Meta(description="Why it is not active.")]
    cursor: Annotated[
        int, Meta(description="All events before this position that match the webhook are delivered.")
    ]
    lag: Annotated[int, Meta(description="The number of positions from the cursor to the end of the log.")]
    failing: Failing | None
    old_secrets_until: Annotated[Time | None, Meta(description="Old secrets also sign until this time.")]
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
    """One request to a webhook."""

    position: int
    type: str
    device_id: str
    command_id: str | None
    outcome: Literal["delivered", "failed"]
    attempt: Annotated[
        int | None, Meta(description="The number of the attempt for this event, from 1; null for a resend.")
    ]
    at: Time
    duration_ms: int
    status: Annotated[
        int | None, Meta(description="The HTTP status; null if no answer came, and `error` says why.")
    ]
    error: str | None


class TestDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a test event."""

    outcome: Literal["delivered", "failed"]
    at: Time
    duration_ms: int
    status: Annotated[
        int | None, Meta(description="The HTTP status; null if no answer came, and `error` says why.")
    ]
    error: str | None


class DeliveryList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[Delivery]
    has_more: bool
    next_cursor: str | None


def webhook(known: Webhook, head: int, now: int, secret: str | UnsetType = UNSET) -> WebhookView:
    """`head`: the position of the last event in the log. `now`: Unix time in ms."""
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
