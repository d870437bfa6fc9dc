"""Services on the listener: the events of their project, in order, each at least once while connected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from broker.mqtt import packets as p
from broker.mqtt.access import Scope
from broker.mqtt.packets import Reason
from broker.mqtt.services import Services
from broker.seams import Outgoing
from tests.integration.core_support import PROJECT, Bench, running, until
from tests.integration.mqtt.listener_support import (
    V5,
    V311,
    Owner,
    Raw,
    Server,
    connect,
    device,
    listening,
    raw,
)
from tests.integration.mqtt.test_link import DEADLINE_SEC

ALL = "iotee/evt/#"


class House:
    """A running core, its listener, and a key for each of two projects."""

    def __init__(self, bench: Bench, server: Server, revoked: set[str]) -> None:
        self.bench, self.server, self.revoked = bench, server, revoked

    async def orders(self, count: int, name: str = "lamp-1") -> list[str]:
        return [(await self.bench.order(name)).id for _ in range(count)]


@contextlib.asynccontextmanager
async def house(tmp_path: Path, **limits: Any) -> AsyncIterator[House]:
    revoked: set[str] = set()

    async def check(key: str) -> Scope | None:
        if key not in ("ours", "also ours", "theirs", "all"):
            return None
        project = {"theirs": "another", "all": None}.get(key, PROJECT)
        return Scope(project, lambda: key not in revoked)

    async with running(tmp_path) as bench:
        await bench.device(online=False)
        services = Services(
            bench.core.feed,
            "iotee/evt/",
            lambda: "log_x",
            lambda name: (PROJECT, name, name),
            stalled_sec=limits.get("stalled_sec", 30),
        )
        async with listening(Owner(), check_service=check, services=services, **limits) as server:
            yield House(bench, server, revoked)


def service(key: str = "ours", name: str = "", **more: Any) -> p.Connect:
    return connect(name, user="service", password=key.encode(), **more)


@contextlib.asynccontextmanager
async def serving(
    server: Server,
    *filters: str,
    key: str = "ours",
    name: str = "",
    version: int = 5,
    qos: int = 1,
    **more: Any,
) -> AsyncIterator[Raw]:
    async with raw(server, version=version, greeting=False) as client:
        client.say(service(key, name, version=version, **more))
        connack = await client.hear()
        assert isinstance(connack, p.Connack)
        assert connack.reason == 0
        client.say(p.Subscribe(1, [p.Filter(each, qos) for each in filters or (ALL,)]))
        suback = await client.hear()
        assert isinstance(suback, p.Granted)
        assert suback.reasons == [qos] * len(suback.reasons)
        yield client


async def event(client: Raw, *, ack: bool = True) -> p.Publish:
    packet = await client.hear()
    assert isinstance(packet, p.Publish)
    if ack and packet.qos:
        client.say(p.Ack(p.PUBACK, packet.packet_id))
    return packet


def command_of(packet: p.Publish) -> str:
    return packet.topic.rpartition("/")[2]


@pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5"])
async def test_a_service_hears_the_events_of_its_project_in_order(tmp_path: Path, version: Any) -> None:
    async with house(tmp_path) as home:
        login = {"identifier": "ha", "username": "service", "password": "ours", "protocol": version}
        async with device(home.server, **login) as client:
            await client.subscribe(ALL, qos=1)
            ids = await home.orders(30)
            heard = [await anext(aiter(client.messages)) for _ in range(30)]
            assert [str(message.topic) for message in heard] == [f"iotee/evt/lamp-1/{each}" for each in ids]
            first = msgspec.json.decode(bytes(heard[0].payload))
            assert (first["subject"], first["type"]) == (ids[0], "ordain.command.created.v1")
            if version is V5:
                assert heard[0].properties.ContentType == "application/cloudevents+json"  # type: ignore[union-attr]


async def test_another_project_hears_nothing_and_an_admins_key_all(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        async with serving(home.server, key="theirs") as blind, serving(home.server, key="all") as sees:
            await home.orders(1)
            await event(sees)
            blind.say(p.Ping())
            assert await blind.hear() == p.Ping(p.PINGRESP)


async def test_a_service_without_a_client_id_is_given_one_and_two_have_two(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        names = set()
        async with raw(home.server, greeting=False) as one, raw(home.server, greeting=False) as two:
            for client in (one, two):
                client.say(service())
                connack = await client.hear()
                assert isinstance(connack, p.Connack)
                names.add(connack.properties["assigned_id"])
            assert len(names) == 2
            assert len(home.server.listener.peers) == 2


async def test_foreign_filters_of_a_service_are_refused_one_by_one_and_its_messages_are_discarded(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as home, raw(home.server, greeting=False) as client:
        client.say(service(will=p.Will(topic="ha/status", payload=b"offline", retain=True)))
        await client.hear()
        topics = [
            "#",
            "iotee/#",
            "iotee/dev/#",
            "iotee/dev/lamp-1/rls",
            "$SYS/#",
            "+/evt/#",
            "iotee/evt/#/x",
            ALL,
        ]
        client.say(p.Subscribe(3, [p.Filter(topic, 1) for topic in topics]))
        no = Reason.NOT_AUTHORIZED
        assert await client.hear() == p.Granted(p.SUBACK, 3, [no] * 6 + [Reason.BAD_FILTER, 1])
        client.say(p.Publish("homeassistant/status", b"online", 1, 7))
        assert await client.hear() == p.Ack(p.PUBACK, 7)
        client.say(p.Publish("iotee/dev/lamp-1/ack", b"{}", 1, 8))
        assert await client.hear() == p.Ack(p.PUBACK, 8)
        client.say(p.Ping())
        assert await client.hear() == p.Ping(p.PINGRESP)
        assert home.server.listener.counts["discarded"] == 2


async def test_filters_narrow_and_their_numbers_come_with_the_events(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await home.bench.device("lamp-2", online=False)
        async with raw(home.server, greeting=False) as client:
            client.say(service())
            await client.hear()
            client.say(p.Subscribe(1, [p.Filter("iotee/evt/lamp-2/+", 0)], {"subscription_id": [5]}))
            client.say(p.Subscribe(2, [p.Filter("iotee/evt/lamp-2/#", 1)], {"subscription_id": [6]}))
            await client.hear()
            await client.hear()
            await home.orders(2, "lamp-1")
            await home.orders(1, "lamp-2")
            found = await event(client)
            assert found.topic.startswith("iotee/evt/lamp-2/")
            assert (found.qos, sorted(found.properties["subscription_id"])) == (1, [5, 6])
            client.say(p.Unsubscribe(3, ["iotee/evt/lamp-2/+", "iotee/evt/lamp-2/#", "never"]))
            released = [Reason.SUCCESS, Reason.SUCCESS, Reason.NO_SUBSCRIPTION]
            assert await client.hear() == p.Granted(p.UNSUBACK, 3, released)
            await home.orders(1, "lamp-2")
            client.say(p.Ping())
            assert await client.hear() == p.Ping(p.PINGRESP)


async def test_the_receive_maximum_of_a_service_is_its_window(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        async with serving(home.server, properties={"receive_maximum": 3}) as client:
            await home.orders(10)
            held = [await event(client, ack=False) for _ in range(3)]
            client.say(p.Ping())
            assert await client.hear() == p.Ping(p.PINGRESP)
            for packet in held:
                client.say(p.Ack(p.PUBACK, packet.packet_id))
            assert len([await event(client) for _ in range(7)]) == 7


async def test_a_service_that_does_not_acknowledge_delays_no_other(tmp_path: Path) -> None:
    async with house(tmp_path, stalled_sec=3_600) as home:
        async with serving(home.server, properties={"receive_maximum": 1}), serving(home.server) as quick:
            await home.orders(5)
            assert len([await event(quick) for _ in range(5)]) == 5


async def test_a_service_that_does_not_acknowledge_is_disconnected(tmp_path: Path) -> None:
    async with house(tmp_path, stalled_sec=0.3) as home:
        async with serving(home.server, properties={"receive_maximum": 1}) as slow:
            await home.orders(5)
            last = (await slow.ended())[-1]
            assert isinstance(last, p.Goodbye)
            assert last.reason == Reason.QUOTA


async def test_a_service_that_stops_reading_is_cut_and_there_is_one_line_about_it(tmp_path: Path) -> None:
    async with house(tmp_path, stalled_sec=0.3) as home:
        with capture_logs() as lines:
            async with serving(home.server, qos=0) as slow:
                slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
                (connection,) = home.server.listener.peers.values()
                async with asyncio.timeout(DEADLINE_SEC):
                    while connection.stalled_at is None:
                        await home.bench.order(params={"text": "x" * 60_000})
                    await until(lambda: len(lines) > 0)
                await home.bench.order()
                assert not slow.writer.is_closing()
        (line,) = lines
        assert (line["event"], line["reason"]) == ("mqtt.closed", "0x97")


async def test_a_group_shares_and_all_events_of_a_command_go_to_one_member(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        shared = "$share/workers/iotee/evt/#"
        async with (
            serving(home.server, shared, name="a") as one,
            serving(home.server, shared, name="b", key="also ours") as two,
            serving(home.server, name="c") as whole,
        ):
            ids = await home.orders(20)
            everything = [await event(whole) for _ in range(20)]
            found: dict[str, list[str]] = {"a": [], "b": []}

            async def take(name: str, client: Raw) -> None:
                """To the answer of a ping, which comes behind all events; it is sent when all are there."""
                while isinstance(packet := await client.hear(), p.Publish):
                    client.say(p.Ack(p.PUBACK, packet.packet_id))
                    found[name].append(command_of(packet))
                    if len(found["a"] + found["b"]) == len(ids):
                        one.say(p.Ping())
                        two.say(p.Ping())

            await asyncio.gather(take("a", one), take("b", two))
            assert sorted(found["a"] + found["b"]) == sorted(ids)
            assert found["a"]
            assert found["b"]
            assert [command_of(packet) for packet in everything] == ids


async def test_events_that_a_member_left_unacknowledged_go_to_another_member(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        shared = "$share/workers/iotee/evt/#"
        async with serving(home.server, shared, name="b") as stays:
            async with serving(home.server, shared, name="a") as leaves:
                ids = await home.orders(20)
                await event(leaves, ack=False)
            heard: set[str] = set()
            async with asyncio.timeout(DEADLINE_SEC):
                while heard != set(ids):
                    heard.add(command_of(await event(stays)))


async def test_an_event_that_a_member_refused_is_not_sent_to_another(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        shared = "$share/workers/iotee/evt/#"
        async with serving(home.server, shared, name="a") as refuses:
            (first,) = await home.orders(1)
            packet = await event(refuses, ack=False)
            refuses.say(p.Ack(p.PUBACK, packet.packet_id, Reason.UNSPECIFIED))
            async with serving(home.server, shared, name="b") as other:
                refuses.say(p.Goodbye())
                await refuses.ended()
                (second,) = await home.orders(1)
                assert command_of(packet) == first
                assert command_of(await event(other)) == second


async def test_a_group_needs_a_name_without_wildcards(tmp_path: Path) -> None:
    async with house(tmp_path) as home, raw(home.server, greeting=False) as client:
        client.say(service())
        await client.hear()
        wrong = [
            "$share//iotee/evt/#",
            "$share/a+/iotee/evt/#",
            "$share/#/iotee/evt/#",
            "$share/a",
            "$share/a/",
        ]
        filters = [p.Filter(each, 1) for each in wrong]
        client.say(p.Subscribe(3, [*filters, p.Filter("$share/a/iotee/evt/#", 1, no_local=True)]))
        assert await client.hear() == p.Granted(p.SUBACK, 3, [Reason.BAD_FILTER] * 6)


async def test_a_revoked_key_is_cut_within_a_second_and_hears_nothing_more(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        async with serving(home.server) as client, serving(home.server, key="also ours") as witness:
            home.revoked.add("ours")
            await home.orders(1)
            await event(witness)
            (last,) = await client.ended()
            assert isinstance(last, p.Goodbye)
            assert last.reason == Reason.ADMINISTRATIVE


async def test_a_replayed_event_reaches_the_services_that_may_receive_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        async with serving(home.server) as client, serving(home.server, key="theirs") as blind:
            owner = Owner()
            message = Outgoing(topic="iotee/evt/lamp-1/cmd_1", payload=b"{}")
            assert home.server.listener.publish(message, owner.done)
            assert (await event(client)).payload == b"{}"
            await owner.until(lambda: [receipt.reason for receipt in owner.receipts] == [0])
            blind.say(p.Ping())
            assert await blind.hear() == p.Ping(p.PINGRESP)


async def test_an_event_larger_than_a_service_takes_is_left_out(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        async with serving(home.server, properties={"maximum_packet": 700}) as client:
            await home.bench.order("lamp-1", params={"text": "x" * 1_000})
            (small,) = await home.orders(1)
            assert command_of(await event(client)) == small


async def test_a_subscription_of_qos_0_is_served_with_qos_0(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        async with serving(home.server, qos=0, version=4) as client:
            await home.orders(3)
            assert [(await event(client)).qos for _ in range(3)] == [0, 0, 0]
