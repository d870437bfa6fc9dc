"""`/v1/webhooks`: where events are sent to, and what became of it.

Asks for two scopes, because whoever may send events elsewhere may read them. A secret is in the answer that
made it, and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Router, delete, get, patch, post
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from broker.domain.errors import Refusal, invalid
from broker.engine.registry import NAME_RULE
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
    WebhookBody,
    WebhookChange,
    WebhookList,
    WebhookView,
)
from broker.subscriptions.webhooks import Webhook
from devices.names import is_name

ByOutcome = Annotated[
    Literal["delivered", "failed"] | None, QueryParameter(description="Only attempts that ended so.")
]


@post("/", status_code=201, opt=needs("devices:write"), responses=documented(409, 413, 415))
async def create_webhook(request: Call, data: JSONBody[WebhookBody]) -> WebhookView:
    """Make a webhook

    It gets what is recorded from now on: each event as a CloudEvent, signed as Standard Webhooks say, in
    order per device, at least once.
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

    Newest first; an admin's key sees those of all projects.
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

    Where it goes, whether it is at work, and how far it is.
    """
    answer = _shown(request, request.services.webhooks.seen(request.user, webhook))
    await request.services.commands.writer.barrier()
    return answer


@patch("/{webhook:str}", opt=needs("devices:write"), responses=documented(404, 409, 413, 415))
async def change_webhook(request: Call, webhook: FromPath[str], data: JSONBody[WebhookChange]) -> WebhookView:
    """Change a webhook

    Where it goes and what it gets, from its cursor on; and whether it is at work.
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

    Nothing is sent to it any more.
    """
    return _shown(request, await request.services.webhooks.delete(request.user, webhook))


@post(
    "/{webhook:str}/rotate", status_code=201, opt=needs("devices:write"), responses=documented(404, 413, 415)
)
async def rotate_webhook_secret(
    request: Call, webhook: FromPath[str], data: JSONBody[RotateBody | None] = None
) -> WebhookView:
    """Give a webhook a new secret

    Shown this once. For a day, or as long as `overlap_sec` says, both sign.
    """
    overlap_sec = DAY_SEC if data is None else data.overlap_sec
    changed, secret = await request.services.webhooks.rotate(request.user, webhook, overlap_sec)
    return _shown(request, changed, secret)


@post("/{webhook:str}/resume", status_code=200, opt=needs("devices:write"), responses=documented(404, 409))
async def resume_webhook(request: Call, webhook: FromPath[str]) -> WebhookView:
    """Resume a webhook

    It goes on where it stopped. One that is at work tries now what failed before.
    """
    return _shown(request, await request.services.webhooks.resume(request.user, webhook))


@post(
    "/{webhook:str}/redrive", status_code=200, opt=needs("devices:write"), responses=documented(404, 413, 415)
)
async def redrive_webhook(request: Call, webhook: FromPath[str], data: JSONBody[RedriveBody]) -> WebhookView:
    """Send again from a position

    Everything wanted from there on, in order and with the same ids: receivers know what they have.
    """
    return _shown(request, await request.services.webhooks.redrive(request.user, webhook, data.position))


@get("/{webhook:str}/deliveries", opt=needs("devices:write"), responses=documented(404))
async def list_deliveries(
    request: Call,
    webhook: FromPath[str],
    outcome: ByOutcome = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> DeliveryList:
    """List the attempts of a webhook

    Newest first, the last 1,000 since the broker started.
    """
    known = request.services.webhooks.seen(request.user, webhook)
    pager = Pager(request.services.cursor_key, "deliveries", webhook, outcome)
    before = pager.after(cursor)
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
    responses=documented(404, 409, 429),
)
async def resend_delivery(request: Call, webhook: FromPath[str], position: FromPath[str]) -> Delivery:
    """Send one event again

    Any event of the project, once, now; the answer says what became of it. 409 while it is still to be sent
    in its order.
    """
    number = int(position[:18]) if position.isdecimal() else 0
    return views.delivery(await request.services.webhooks.resend(request.user, webhook, number))


async def _chosen(
    request: Call, project: str, events: tuple[str, ...], device: str | None, type: str | None
) -> dict[str, Any]:
    """What an endpoint gets, checked."""
    device_id = None
    if device is not None:
        caller, reading = request.user, request.services.commands.writer.storage.read
        try:
            found = await reading(lambda sql: find_device(sql, caller, device))
        except Refusal as refusal:
            raise invalid("device", "is not known here", device) from refusal
        if found.project != project:
            raise invalid("device", f"is not of project {project}", device)
        device_id = found.id
    return {"events": tuple(dict.fromkeys(events)), "device_id": device_id, "command": type}


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
        list_deliveries,
        resend_delivery,
    ],
    opt={"also": ["events:read"]},
    before_request=authorize,
    tags=["Webhooks"],
)
