"""Events published to the MQTT server: each one, in order, repeated until accepted. The test is the far
end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from broker.domain.cloudevents import Wanted
from broker.seams import Outgoing, Receipt
from broker.subscriptions.mqtt import IN_FLIGHT
from tests.integration.core_support import ME, TAKEN, UNKNOWN, Bench, running, simulated, until
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import SimClock, SimLoop


class Listener:
    """Collects published events; the test gives their receipts. Publishes of commands are accepted at
    once."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.wire = bench.wire

    @property
    def told(self) -> list[Outgoing]:
        return [outgoing for outgoing in self.wire.sent if "/evt/" in outgoing.topic]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(outgoing.payload) for outgoing in self.told]

    @property
    def ids(self) -> list[int]:
        return [int(event["id"]) for event in self.events]

    def receipts(self, receipt: Receipt = TAKEN) -> None:
        due, self.wire.due = self.wire.due, []
        for outgoing, done in due:
            done(receipt if "/evt/" in outgoing.topic else TAKEN)


@asynccontextmanager
async def listening(storage: SimStorage, loop: SimLoop) -> AsyncIterator[Listener]:
    async with running(storage, SimClock(loop), mqtt_events=True) as bench:
        yield Listener(bench)


def new_storage(loop: SimLoop) -> SimStorage:
    return SimStorage(loop, SimDisk(loop))


def test_every_event_of_a_command_is_published_on_its_topic_after_it_is_durable() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            bench = listener.bench
            durable: list[bool] = []
            bench.wire.on_publish = lambda out: durable.append(
                "/evt/" not in out.topic
                or int(msgspec.json.decode(out.payload)["id"]) <= bench.writer.durable
            )
            await bench.device()
            command = await bench.order()
            await until(lambda: len(listener.told) == 2)
            listener.receipts()
            bench.answers(command.id)
            await until(lambda: len(listener.told) == 3)
            topics = {outgoing.topic for outgoing in listener.told}
            assert topics == {f"iotee/evt/lamp-1/{command.id}"}
            assert [event["type"].split(".")[2] for event in listener.events] == [
                "created",
                "published",
                "executed",
            ]
            page, _ = await bench.core.feed.page(Wanted(), 0, 100)
            assert listener.ids == [entry.position for entry in page if entry.command_id]
            assert all(durable)

    simulated(world)


def test_an_event_that_was_not_accepted_is_published_again_with_the_same_id() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            await listener.bench.device(online=False)
            await listener.bench.order()
            await until(lambda: len(listener.told) == 1)
            listener.receipts()
            await listener.bench.order()
            await listener.bench.order()
            await until(lambda: len(listener.told) == 3)
            first = listener.ids
            listener.receipts(UNKNOWN)
            await until(lambda: len(listener.told) == 5)
            assert listener.ids[3:] == first[1:]

    simulated(world)


def test_events_wait_while_the_link_is_down() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            await listener.bench.device(online=False)
            listener.wire.up = False
            made = [(await listener.bench.order()).id for _ in range(5)]
            await asyncio.sleep(30)
            assert listener.told == []
            assert listener.bench.core.mqtt_events.lag > 0
            listener.wire.up = True
            await until(lambda: len(listener.told) == 5)
            assert [event["subject"] for event in listener.events] == made
            listener.receipts()
            await until(lambda: listener.bench.core.mqtt_events.lag == 0)

    simulated(world)


def test_a_restart_continues_from_the_first_event_not_accepted() -> None:
    async def world(loop: SimLoop) -> None:
        storage = new_storage(loop)
        async with listening(storage, loop) as listener:
            await listener.bench.device(online=False)
            made = [(await listener.bench.order()).id for _ in range(3)]
            await until(lambda: len(listener.told) == 3)
            listener.wire.receipt()
            _, third = listener.wire.due
            third[1](TAKEN)
        async with listening(storage, loop) as listener:
            await until(lambda: len(listener.told) == 2)
            assert [event["subject"] for event in listener.events] == made[1:]
            listener.receipts()
            await until(lambda: listener.bench.core.mqtt_events.lag == 0)
        async with listening(storage, loop) as listener:
            await asyncio.sleep(30)
            assert listener.told == []

    simulated(world)


def test_the_number_of_unaccepted_events_in_flight_is_limited() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            await listener.bench.device(online=False)
            for _ in range(IN_FLIGHT + 5):
                await listener.bench.order()
            await until(lambda: len(listener.told) == IN_FLIGHT)
            await asyncio.sleep(5)
            assert len(listener.told) == IN_FLIGHT
            listener.receipts()
            await until(lambda: len(listener.told) == IN_FLIGHT + 5)
            assert listener.ids == sorted(set(listener.ids))

    simulated(world)


def test_an_event_erased_while_it_waits_is_published_without_its_data() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            bench = listener.bench
            await bench.device(online=False)
            listener.wire.up = False
            made = [(await bench.order(params={"a": 1})).id for _ in range(IN_FLIGHT + 2)]
            listener.wire.up = True
            await until(lambda: len(listener.told) == IN_FLIGHT)
            await bench.core.erasures.delete(ME, made[-1])
            listener.receipts()
            await until(lambda: len(listener.told) == IN_FLIGHT + 3)
            kept, created, cancelled = listener.events[IN_FLIGHT:]
            assert [each["subject"] for each in (kept, created, cancelled)] == [made[-2], *made[-1:] * 2]
            assert kept["data"]["params"] == {"a": 1}
            assert created["erased"] is True
            assert "params" not in created["data"]

    simulated(world)


def test_a_refusing_server_blocks_no_command_and_is_tried_again() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            bench = listener.bench
            await bench.device()
            command = await bench.order()
            await until(lambda: len(listener.told) == 2)
            listener.receipts(Receipt(written=True, reason=0x87))
            bench.answers(command.id)
            await bench.becomes(command.id, "executed")
            await until(lambda: len(listener.told) == 5)
            assert listener.ids[2:4] == listener.ids[:2]

    simulated(world)


def test_an_event_the_server_never_accepts_is_skipped() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            bench = listener.bench
            await bench.device()
            command = await bench.order()
            await until(lambda: len(listener.told) == 2)
            listener.receipts(Receipt(written=True, reason=0x95))
            bench.answers(command.id)
            await until(lambda: len(listener.told) == 3)
            listener.receipts()
            await until(lambda: bench.core.mqtt_events.lag == 0)
            assert len(set(listener.ids)) == len(listener.ids) == 3

    simulated(world)


def test_events_are_skipped_while_no_client_can_subscribe() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            events = listener.bench.core.mqtt_events
            await listener.bench.device(online=False)
            events.wanted = lambda: False
            await listener.bench.order()
            await until(lambda: events.lag == 0)
            events.wanted = lambda: True
            second = await listener.bench.order()
            await until(lambda: len(listener.told) == 1)
            assert listener.events[0]["subject"] == second.id

    simulated(world)


def test_an_idle_hour_takes_no_more_steps_than_without_mqtt_events() -> None:
    async def world(loop: SimLoop) -> None:
        taken = []
        for mqtt_events in (False, True):
            async with running(new_storage(loop), SimClock(loop), mqtt_events=mqtt_events) as bench:
                await bench.device()
                await asyncio.sleep(10)
                assert bench.core.mqtt_events.lag == 0 or not mqtt_events
                before = loop.steps
                await asyncio.sleep(3_600)
                taken.append(loop.steps - before)
        assert abs(taken[1] - taken[0]) < 10

    simulated(world)


def test_a_failed_publish_is_noticed_while_nothing_else_happens() -> None:
    async def world(loop: SimLoop) -> None:
        async with listening(new_storage(loop), loop) as listener:
            await listener.bench.device(online=False)
            await listener.bench.order()
            await until(lambda: len(listener.told) == 1)
            await asyncio.sleep(60)
            listener.receipts(UNKNOWN)
            await asyncio.sleep(3)
            assert listener.ids == listener.ids[:1] * 2

    simulated(world)
