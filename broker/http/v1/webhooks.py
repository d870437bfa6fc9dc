"""`/v1/webhooks`: endpoints that receive events, and the deliveries to them.

All routes need two scopes, `devices:write` and `events:read`: a webhook sends events out, so its owner must
be allowed to read them. Only the answer that created a secret contains it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Router, delete, get, patch, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from broker.domain.errors import Refusal, invalid
from broker.engine.ids import NAME_RULE
from broker.http.edge import positions
from broker.http.edge.auth import Call, authorize, needs
from broker.http.edge.errors import documented
from broker.http.edge.pages import Cursor, Limit, Pager, cut
from broker.http.v1 import webhook_views as views
from broker.http.v1.devices import find_device, project_for
from broker.http.v1.webhook_views import (
    DAY_SEC,
    Delivery,
    DeliveryList,
    RedriveBody,
    RotateBody,
    TestDelivery,
    WebhookBody,
    WebhookChange,
    WebhookList,
    WebhookView,
)
from broker.subscriptions.webhook_state import Webhook
from devices.clock import rfc3339
from devices.names import is_name

ByOutcome = Annotated[
    Literal["delivered", "failed"] | None,
    QueryParameter(description="Only attempts with this outcome."),
]


@post("/", status_code=201, opt=needs("devices:write"), responses=documented(409, 413, 415))
async def create_webhook(request: Call, data: JSONBody[WebhookBody]) -> WebhookView:
    """Create a webhook

    It receives the events that are recorded from now on: each one as a CloudEvent, signed as the Standard
    Webhooks specification says, at least once, in order for each device.
    """
    _check_names(project=data.project, device=data.device, type=data.type)
    project = project_for(request, data.project)
    fields = await _chosen(request, project, data.events, data.device, data.type)
    webhook, secret = await request.services.webhooks.create(
        request.user, project, data.url, name=data.name, **fields
    )
    return _shown(request, webhook, secret)


@get("/", opt=needs("devices:write"), responses=documented())
async def list_webhooks(request: Call, limit: Limit = 20, cursor: Cursor = None) -> WebhookList:
    """List webhooks

    Webhooks of the key's project, newest first. An admin key gets the webhooks of all projects.
    """
    pager = Pager(request.services.cursor_key, "webhooks", request.user.project)
    start = pager.after(cursor) or 0
    page, more = cut(request.services.webhooks.all(request.user)[start : start + limit + 1], limit)
    answer = WebhookList(
        data=[_shown(request, webhook) for webhook in page],
        has_more=more,
        next_cursor=pager.seal(start + limit) if more else None,
    )
    await request.services.commands.writer.barrier()
    return answer


@get("/{webhook:str}", opt=needs("devices:write"), responses=documented(404))
async def get_webhook(request: Call, webhook: FromPath[str]) -> WebhookView:
    """Read a webhook

    Its URL, its filters, its state and its progress.
    """
    answer = _shown(request, request.services.webhooks.seen(request.user, webhook))
    await request.services.commands.writer.barrier()
    return answer


@patch("/{webhook:str}", opt=needs("devices:write"), responses=documented(404, 409, 413, 415))
async def change_webhook(request: Call, webhook: FromPath[str], data: JSONBody[WebhookChange]) -> WebhookView:
    """Change a webhook

    Changes its URL and its filters, which apply from its cursor on; pauses or resumes it.
    """
    _check_names(device=data.device, type=data.type)
    webhooks, caller = request.services.webhooks, request.user
    endpoint = webhooks.seen(caller, webhook).endpoint
    fields: dict[str, Any] = {}
    if data.url is not UNSET:
        fields["url"] = data.url
    if data.name is not UNSET:
        fields["name"] = data.name
    if not all(each is UNSET for each in (data.events, data.device, data.type)):
        fields |= await _chosen(
            request,
            endpoint.project,
            endpoint.events if data.events is UNSET else data.events,
            endpoint.device_id if data.device is UNSET else data.device,
            endpoint.command if data.type is UNSET else data.type,
        )
    if fields:
        await webhooks.change(caller, webhook, **fields)
    if data.enabled is not UNSET:
        await (webhooks.resume if data.enabled else webhooks.pause)(caller, webhook)
    return _shown(request, webhooks.seen(caller, webhook))


@delete("/{webhook:str}", status_code=200, opt=needs("devices:write"), responses=documented(404))
async def delete_webhook(request: Call, webhook: FromPath[str]) -> WebhookView:
    """Delete a webhook

    Nothing more is sent to it.
    """
    return _shown(request, await request.services.webhooks.delete(request.user, webhook))


@post(
    "/{webhook:str}/rotate", status_code=201, opt=needs("devices:write"), responses=documented(404, 413, 415)
)
async def rotate_webhook_secret(
    request: Call, webhook: FromPath[str], data: JSONBody[RotateBody | None] = None
) -> WebhookView:
    """Give a webhook a new secret

    The secret is shown only in this answer. The old secret also signs for `overlap_sec` seconds, one day by
    default.
    """
    overlap_sec = DAY_SEC if data is None else data.overlap_sec
    changed, secret = await request.services.webhooks.rotate(request.user, webhook, overlap_sec)
    return _shown(request, changed, secret)


@post("/{webhook:str}/resume", status_code=200, opt=needs("devices:write"), responses=documented(404, 409))
async def resume_webhook(request: Call, webhook: FromPath[str]) -> WebhookView:
    """Resume a webhook

    It continues where it stopped. If it is active, it retries failed deliveries immediately.
    """
    return _shown(request, await request.services.webhooks.resume(request.user, webhook))


@post(
    "/{webhook:str}/redrive",
    status_code=200,
    opt=needs("devices:write"),
    responses=documented(404, 410, 413, 415),
)
async def redrive_webhook(request: Call, webhook: FromPath[str], data: JSONBody[RedriveBody]) -> WebhookView:
    """Send again from a position

    Sends all events that match the webhook again from this position on, in order. The ids do not change, so
    receivers can recognise events they already have.
    """
    position = _position(request, "from", str(data.position))
    return _shown(request, await request.services.webhooks.redrive(request.user, webhook, position))


@post("/{webhook:str}/test", status_code=200, opt=needs("devices:write"), responses=documented(404, 429))
async def test_webhook(request: Call, webhook: FromPath[str]) -> TestDelivery:
    """Send a test event

    Sends an event of the type `ordain.webhook.test.v1` now, signed as all others are, also to a paused
    webhook. The answer contains the outcome. It is not an event of the log, and the webhook does not change.
    """
    made = await request.services.webhooks.test(request.user, webhook)
    return TestDelivery(
        outcome=views.outcome(made),
        at=rfc3339(made.at),
        duration_ms=made.duration_ms,
        status=made.status,
        error=made.error,
    )


@get("/{webhook:str}/deliveries", opt=needs("devices:write"), responses=documented(404))
async def list_deliveries(
    request: Call,
    webhook: FromPath[str],
    outcome: ByOutcome = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> DeliveryList:
    """List the attempts of a webhook

    Newest first. Only the last 1,000 attempts since the broker started are kept.
    """
    pager = Pager(request.services.cursor_key, "deliveries", webhook, outcome)
    before = pager.after(cursor)
    known = request.services.webhooks.seen(request.user, webhook)
    found = [
        (number, attempt)
        for number, attempt in reversed(known.attempts)
        if (before is None or number < before) and outcome in (None, views.outcome(attempt))
    ]
    page, more = cut(found, limit)
    return DeliveryList(
        data=[views.delivery(attempt) for _, attempt in page],
        has_more=more,
        next_cursor=pager.seal(page[-1][0]) if more else None,
    )


@post(
    "/{webhook:str}/deliveries/{position:str}/resend",
    status_code=200,
    opt=needs("devices:write"),
    responses=documented(404, 409, 410, 429),
)
async def resend_delivery(request: Call, webhook: FromPath[str], position: FromPath[str]) -> Delivery:
    """Send one event again

    Sends any event of the project once, now. The answer contains the outcome. 409 while the normal delivery
    of this event is still to come.
    """
    number = _position(request, "position", position)
    return views.delivery(await request.services.webhooks.resend(request.user, webhook, number))


async def _chosen(
    request: Call, project: str, events: tuple[str, ...], device: str | None, type: str | None
) -> dict[str, Any]:
    """The filters of an endpoint, checked.

    Raises:
        Refusal: invalid_request, if the device is unknown or belongs to another project.
    """
    device_id = None
    if device is not None:
        caller, reading = request.user, request.services.commands.writer.storage.read
        try:
            found = await reading(lambda sql: find_device(sql, caller, device))
        except Refusal as refusal:
            raise invalid("device", "is not known here", device) from refusal
        if found.project != project:
            raise invalid("device", f"does not belong to project {project}", device)
        device_id = found.id
    return {"events": tuple(dict.fromkeys(events)), "device_id": device_id, "command": type}


def _position(request: Call, field: str, text: str) -> int:
    services = request.services
    return positions.parsed(field, text, services.log_id, services.feed.head) or 0


def _check_names(**given: Any) -> None:
    for field, value in given.items():
        if isinstance(value, str) and not is_name(value):
            raise invalid(field, NAME_RULE, value)


def _shown(request: Call, known: Webhook, secret: str | UnsetType = UNSET) -> WebhookView:
    services = request.services
    return views.webhook(known, services.feed.head, services.commands.writer.now(), secret)


routes = Router(
    "/v1/webhooks",
    route_handlers=[
        create_webhook,
        list_webhooks,
        get_webhook,
        change_webhook,
        delete_webhook,
        rotate_webhook_secret,
        resume_webhook,
        redrive_webhook,
        test_webhook,
        list_deliveries,
        resend_delivery,
    ],
    opt={"also": ["events:read"]},
    before_request=authorize,
    tags=["Webhooks"],
)
