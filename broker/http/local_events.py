"""What `ordain replay --into mqtt` asks of a broker: one recorded event to its topic once more."""

from __future__ import annotations

import asyncio

import msgspec
from litestar import post
from litestar.params import JSONBody

from broker.cloudevents import Wanted, cloud_event
from broker.errors import Unavailable, not_found
from broker.http.auth import Call
from broker.seams import Outgoing, Receipt
from projections import outgoing


class EventBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    position: int


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """`topic` null: the event is no command's, and has none."""

    topic: str | None


@post("/events/publish", status_code=200)
async def publish_event(request: Call, data: JSONBody[EventBody]) -> EventView:
    """Sends one recorded event to its MQTT topic once more.

    Raises:
        Refusal: not_found.
        Unavailable: the MQTT server did not take it.
    """
    services, position = request.services, data.position
    writer = services.commands.writer
    found, _ = await writer.storage.read(lambda sql: outgoing.page(sql, Wanted(), position - 1, position, 1))
    if not found:
        raise not_found("event", str(position))
    [entry] = found
    if entry.command_id is None:
        return EventView(topic=None)
    topic = f"{services.commands.prefix}/evt/{entry.hardware_id}/{entry.command_id}"
    taken: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
    payload = msgspec.json.encode(cloud_event(services.log_id, entry))
    sent = services.link.publish(Outgoing(topic=topic, payload=payload), taken.set_result)
    if not sent or (await taken).reason is None:
        raise Unavailable("the MQTT server did not take the event")
    return EventView(topic=topic)
