"""The simulated MQTT server, link and device port: what arrives, in what order, and what each fault does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from broker.seams import Link, LinkEvents, Message, Outgoing, Presence, Receipt
from tests.simulation.history import History
from tests.simulation.link import SimDevicePort, SimLink
from tests.simulation.loop import Node, SimClock, SimLoop, run
from tests.simulation.network import EMBEDDED, MOSQUITTO, NATS, Faults, ServerKind, SimMqttServer
from tests.simulation.test_disk import write_until_it_stops
from tests.simulation.test_loop import printed_elsewhere

RLS, ACK, STATUS = "iotee/dev/hw1/rls", "iotee/dev/hw1/ack", "iotee/dev/hw1/status"
SEEDS = range(40)


class Broker:
    """The owner of a link. It sends a PUBACK for each message unless told to withhold it."""

    def __init__(self, loop: SimLoop, server: SimMqttServer) -> None:
        self.loop = loop
        self.node = Node("broker")
        self.withhold = False
        self.seen: list[Message] = []
        self.told: list[str] = []
        self.receipts: list[Receipt] = []
        loop.spawn(self.node, self._live(server))

    async def _live(self, server: SimMqttServer) -> None:
        events: LinkEvents = self
        self.sim_link = SimLink(server, events, ("iotee/dev/+/ack", "iotee/dev/+/status"))
        self.link: Link = self.sim_link
        presence: Presence = self
        server.tell(presence)
        await self.sim_link.run()

    def link_up(self) -> None:
        self.told.append("up")

    def link_down(self, why: str) -> None:
        self.told.append(f"down: {why}")

    def message(self, message: Message) -> None:
        self.seen.append(message)
        if not self.withhold:
            self.link.puback(message)

    def device_online(self, hardware_id: str) -> None:
        self.told.append(f"{hardware_id} online")

    def device_offline(self, hardware_id: str) -> None:
        self.told.append(f"{hardware_id} offline")

    def send(self, payload: bytes, topic: str = RLS, expiry_sec: int | None = None) -> bool:
        outgoing = Outgoing(topic=topic, payload=payload, correlation=payload, expiry_sec=expiry_sec)
        return self.link.publish(outgoing, self.receipts.append)

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.seen]


class World:
    """A broker, a device and the MQTT server between them."""

    def __init__(self, loop: SimLoop, kind: ServerKind, **faults: Any) -> None:
        self.loop = loop
        self.history = History(SimClock(loop).true_ms, loop.note)
        self.server = SimMqttServer(loop, kind, history=self.history, faults=Faults(**faults))
        self.broker = Broker(loop, self.server)
        self.device = SimDevicePort(self.server, "hw1", (RLS,))
        self.reached: list[bytes] = []

    async def ready(self) -> World:
        await asyncio.sleep(5)
        self.device.connect(
            lambda message: self.reached.append(message.payload), will=(STATUS, b"offline"), clean=False
        )
        await asyncio.sleep(5)
        assert self.broker.link.up
        assert self.device.up
        return self

    def cut(self, client_id: str) -> None:
        connection = self.server.connection(client_id)
        assert connection is not None
        connection.close("cut")


def simulate(kind: ServerKind, story: Callable[[World], Any], seed: int = 0, **faults: Any) -> Any:
    async def main(loop: SimLoop) -> Any:
        return await story(await World(loop, kind, **faults).ready())

    return run(main, seed)


async def conversation(world: World) -> World:
    for number in range(10):
        assert world.broker.send(b"%d" % number)
        assert world.device.publish(ACK, b"%d" % number)
        await asyncio.sleep(0.01)
    await asyncio.sleep(600)
    return world


@pytest.mark.parametrize("kind", [EMBEDDED, MOSQUITTO, NATS])
def test_without_faults_everything_arrives_once_and_in_order(kind: ServerKind) -> None:
    for seed in SEEDS:
        world = simulate(kind, conversation, seed)

        assert world.reached == world.broker.payloads == [b"%d" % number for number in range(10)]
        assert world.broker.receipts == [Receipt(written=True, reason=0)] * 10
        assert [record.what for record in world.history.wire].count("publish") == 10
        assert [record.what for record in world.history.wire].count("puback") == 10


def fingerprint(seed: int) -> str:
    """A conversation under faults and writes to a disk that loses power, as one line to compare between
    processes."""

    async def main(loop: SimLoop) -> str:
        world = World(loop, MOSQUITTO, duplicate=0.2, late=0.2, reorder_topics=True)
        await conversation(await world.ready())
        answered, found = await write_until_it_stops(loop, power=True, synchronous="NORMAL")
        return f"{loop.trace:08x} {loop.steps} {world.reached} {len(answered)} {len(found)}"

    return run(main, seed)


def test_network_and_disk_are_the_same_in_every_process() -> None:
    here = "".join(fingerprint(seed) + "\n" for seed in range(12))

    assert printed_elsewhere("tests.simulation.test_network", "fingerprint", 12) == [here, here]
    assert len(set(here.splitlines())) == 12


def test_faults_duplicate_delay_and_reorder_but_lose_nothing_on_a_live_link() -> None:
    orders = set()
    for seed in SEEDS:
        world = simulate(MOSQUITTO, conversation, seed, duplicate=0.2, late=0.2, reorder_topics=True)

        assert set(world.reached) == set(world.broker.payloads) == {b"%d" % number for number in range(10)}
        assert len(world.broker.receipts) == 10
        orders.add(tuple(world.reached))
    assert len(orders) > 30


def test_a_cut_link_is_reported_its_open_receipts_are_unknown_and_it_reconnects() -> None:
    async def story(world: World) -> tuple[list[Receipt], int]:
        world.broker.send(b"1")
        world.cut("ordain")
        await asyncio.sleep(60)
        assert world.broker.told == ["up", "hw1 online", "down: cut", "up"]
        assert len(world.reached) <= 1
        return world.broker.receipts, len(world.reached)

    outcomes = [simulate(MOSQUITTO, story, seed) for seed in SEEDS]

    assert all(receipts == [Receipt(written=True, reason=None)] for receipts, _ in outcomes)
    assert {reached for _, reached in outcomes} == {0, 1}


def test_a_link_that_is_down_refuses_messages() -> None:
    async def story(world: World) -> None:
        world.server.restart("kept", down_for_sec=10)
        await asyncio.sleep(1)
        assert not world.broker.send(b"1")
        assert not world.device.publish(ACK, b"1")
        await asyncio.sleep(60)
        assert world.broker.receipts == []
        assert world.broker.link.up

    simulate(MOSQUITTO, story)


def test_a_half_open_link_loses_messages_until_it_is_noticed() -> None:
    async def story(world: World) -> None:
        connection = world.server.connection("ordain")
        assert connection is not None
        connection.go_half_open(noticed_after_sec=20)
        assert world.broker.send(b"1")
        await asyncio.sleep(19)
        assert world.broker.link.up
        assert world.broker.receipts == []
        await asyncio.sleep(60)
        assert world.broker.receipts == [Receipt(written=True, reason=None)]
        assert world.reached == []

    simulate(MOSQUITTO, story)


def test_unacknowledged_messages_are_sent_again_with_dup_after_a_kill() -> None:
    async def story(world: World) -> list[tuple[bytes, bool]]:
        world.broker.withhold = True
        world.device.publish(ACK, b"1")
        await asyncio.sleep(1)
        world.loop.kill(world.broker.node)
        world.device.publish(ACK, b"2")
        await asyncio.sleep(10)
        assert world.broker.payloads == [b"1"]
        second = Broker(world.loop, world.server)
        await asyncio.sleep(10)
        return [(message.payload, message.dup) for message in second.seen]

    assert simulate(MOSQUITTO, story) == [(b"1", True), (b"2", False)]
    assert simulate(EMBEDDED, story) == []


def test_a_puback_on_an_older_connection_does_nothing() -> None:
    async def story(world: World) -> list[bool]:
        world.broker.withhold = True
        world.device.publish(ACK, b"1")
        await asyncio.sleep(1)
        world.cut("ordain")
        world.broker.link.puback(world.broker.seen[0])
        await asyncio.sleep(10)
        world.broker.link.puback(world.broker.seen[0])
        world.cut("ordain")
        await asyncio.sleep(10)
        return [message.dup for message in world.broker.seen]

    assert simulate(MOSQUITTO, story) == [False, True, True]


def test_some_servers_send_again_on_a_live_link_while_the_puback_is_withheld() -> None:
    async def story(world: World) -> int:
        world.broker.withhold = True
        world.device.publish(ACK, b"1")
        await asyncio.sleep(11)
        return len(world.broker.seen)

    assert (simulate(MOSQUITTO, story), simulate(NATS, story)) == (1, 3)


@pytest.mark.parametrize(("sessions", "found"), [("kept", [b"1"]), ("emptied", []), ("lost", [])])
def test_a_restart_keeps_or_loses_acknowledged_messages(sessions: Any, found: list[bytes]) -> None:
    async def story(world: World) -> list[bytes]:
        world.device.disconnect()
        world.broker.send(b"1")
        await asyncio.sleep(1)
        world.server.restart(sessions, down_for_sec=5)
        await asyncio.sleep(30)
        world.device.connect(lambda message: world.reached.append(message.payload), clean=False)
        await asyncio.sleep(30)
        return world.reached

    assert simulate(MOSQUITTO, story) == found


def test_a_message_that_expired_in_the_servers_queue_is_not_delivered() -> None:
    async def story(world: World) -> list[bytes]:
        world.device.disconnect()
        world.broker.send(b"1", expiry_sec=5)
        world.broker.send(b"2", expiry_sec=500)
        await asyncio.sleep(30)
        world.device.connect(lambda message: world.reached.append(message.payload), clean=False)
        await asyncio.sleep(30)
        return world.reached

    assert simulate(MOSQUITTO, story) == [b"2"]
    assert simulate(NATS, story) == [b"1", b"2"]


def test_mqtt_5_reports_missing_subscribers_and_refusals() -> None:
    async def story(world: World) -> list[int | None]:
        world.broker.send(b"1", topic="iotee/dev/hw2/rls")
        await asyncio.sleep(1)
        world.server.refuse = lambda client_id, outgoing: 0x87 if client_id == "ordain" else None
        world.broker.send(b"2")
        await asyncio.sleep(1)
        assert world.reached == []
        return [receipt.reason for receipt in world.broker.receipts]

    assert simulate(MOSQUITTO, story) == [0x10, 0x87]


def test_a_dropped_device_leaves_its_will_and_a_disconnecting_one_does_not() -> None:
    async def rude(world: World) -> list[bytes]:
        world.cut("hw1")
        await asyncio.sleep(1)
        return world.broker.payloads

    async def polite(world: World) -> list[bytes]:
        world.device.disconnect()
        await asyncio.sleep(1)
        return world.broker.payloads

    assert simulate(MOSQUITTO, rude) == [b"offline"]
    assert simulate(MOSQUITTO, polite) == []


def test_a_retained_status_reaches_later_subscribers() -> None:
    async def story(world: World) -> list[bool]:
        world.device.publish(STATUS, b"online", retain=True)
        await asyncio.sleep(1)
        world.cut("ordain")
        await asyncio.sleep(10)
        return [message.retain for message in world.broker.seen]

    assert simulate(MOSQUITTO, story) == [False, True]
    assert simulate(EMBEDDED, story) == [False]


def test_presence_follows_the_newest_connection() -> None:
    async def story(world: World) -> list[str]:
        other = SimDevicePort(world.server, "hw1", (RLS,))
        # no reconnect: otherwise the two clients take over the session from each other for ever
        world.device._wanted = False
        other.connect(lambda message: None)
        await asyncio.sleep(5)
        return world.broker.told

    assert simulate(EMBEDDED, story) == ["up", "hw1 online", "hw1 offline", "hw1 online"]


def test_a_slow_link_is_slow() -> None:
    async def story(world: World) -> list[bytes]:
        connection = world.server.connection("hw1")
        assert connection is not None
        connection.to_client.slow = 10_000
        world.broker.send(b"1")
        await asyncio.sleep(3)
        early = list(world.reached)
        await asyncio.sleep(300)
        assert world.reached == [b"1"]
        return early

    assert simulate(MOSQUITTO, story) == []
