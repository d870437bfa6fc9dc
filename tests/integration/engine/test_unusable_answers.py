"""Answers of no use are kept and show that the device is there; answers with unfit parts count."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from broker.domain.explain import Explanation
from broker.domain.lanes import Presence
from broker.domain.lifecycle import CommandState
from broker.domain.said import with_answers
from broker.http.v1.unmatched import of_command
from broker.seams import Message
from devices.types import load_type
from tests.integration.core_support import Bench, on_virtual_time, simulated, until
from tests.simulation.loop import SimLoop


async def explained(bench: Bench, command: CommandState) -> Explanation:
    """As `/v1/commands/{id}/explain` makes it."""
    await bench.writer.barrier()
    state = bench.live.command(command.id) or command
    said = await bench.writer.storage.read(lambda sql: of_command(sql, state))
    return with_answers(await bench.core.dispatch.explain(state), said)


def status(bench: Bench, payload: bytes) -> None:
    bench.core.intake.message(Message(topic="iotee/dev/lamp-1/status", payload=payload))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"id":"%s","status":"EXECUTED"}', "malformed"),
        (b'{"id":"%s","status":"executed","result":NaN}', "malformed"),
        (b'{"id":"cmd_00000000000000000000000000","status":"executed"}', "unknown"),
        (b"nonsense", "malformed"),
    ],
)
def test_an_unusable_answer_is_named_by_explain(payload: bytes, reason: str) -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            await bench.device()
            bench.says(b"before it was handed over")
            await asyncio.sleep(1)
            command = await bench.order(ttl_sec=None)
            await until(lambda: len(bench.wire.sent) == 1)
            bench.says(payload.replace(b"%s", command.id.encode()))
            await until(lambda: len(bench.wire.pubacks) == 2)
            found = await explained(bench, command)
            named = [each for each in found.reasons if each["code"] == "unusable_answer"]
            assert [(each["reason"], each["count"]) for each in named] == [(reason, 1)]
            assert named[0]["topic"] == "iotee/dev/lamp-1/ack"

    simulated(world)


def test_an_ambiguous_answer_is_named_by_explain() -> None:
    async def world(loop: SimLoop) -> None:
        kind = load_type('name = "two"\npayload = "json"\nmax_in_flight = 2\n[commands.open]\n')
        async with on_virtual_time(loop, types={"two": kind}) as (bench, _):
            await bench.device(type="two")
            commands = [await bench.order(ttl_sec=None) for _ in range(2)]
            await until(lambda: len(bench.wire.sent) == 2)
            bench.says(b'{"status":"executed"}')
            await until(lambda: len(bench.wire.pubacks) == 1)
            for command in commands:
                found = await explained(bench, command)
                assert found.reasons[-1]["reason"] == "ambiguous"

    simulated(world)


def test_a_malformed_answer_shows_that_the_device_is_online() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(online=False)
            command = await bench.order(ttl_sec=None)
            await asyncio.sleep(5)
            bench.says(b"{")
            await until(lambda: bench.live.presence.get(device.id) is Presence.ONLINE)
            await bench.becomes(command.id, "published")

    simulated(world)


def test_an_unreadable_status_changes_nothing_and_is_named() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(type="recorder", online=False)
            await asyncio.sleep(5)
            status(bench, b"Online")
            await until(lambda: len(bench.wire.pubacks) == 1)
            command = await bench.order(type="start_recording", ttl_sec=None)
            found = await explained(bench, command)
            assert bench.live.presence.get(device.id) is None
            assert {each["code"] for each in found.reasons} >= {"never_heard", "unusable_answer"}
            assert "(it must publish `online` on iotee/dev/lamp-1/status)" in found.summary
            assert found.reasons[-1]["topic"] == "iotee/dev/lamp-1/status"

    simulated(world)


@pytest.mark.parametrize(
    ("beside", "parts"),
    [
        ({"at": 1700000000}, ["at"]),
        ({"at": "2026-11-20T09:30:00+0000"}, ["at"]),
        ({"progress": 100}, ["progress"]),
        ({"at": [], "progress": "all"}, ["at", "progress"]),
    ],
)
def test_an_answer_with_an_unfit_part_counts_and_explain_names_the_part(
    beside: dict[str, Any], parts: list[str]
) -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, _):
            await bench.device()
            command = await bench.order(ttl_sec=None)
            await until(lambda: len(bench.wire.sent) == 1)
            bench.answers(command.id, "executed", **beside)
            await bench.becomes(command.id, "executed")
            found = await explained(bench, command)
            named = [each["part"] for each in found.reasons if each["code"] == "unfit_part"]
            assert named == parts
            assert bench.wire.said == [0], "its PUBACK has no error code"
            assert len(bench.wire.sent) == 1

    simulated(world)


def test_a_status_with_an_unfit_session_counts_but_cannot_end_a_known_session() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(online=False)

            def presence() -> str | None:
                return bench.live.presence.get(device.id)

            def says(word: str, session: Any) -> None:
                status(bench, msgspec.json.encode({"status": word, "session": session}))

            says("online", 5)
            await until(lambda: presence() == "online")
            says("offline", 5)
            await until(lambda: presence() == "offline")
            says("online", "s-1")
            await until(lambda: presence() == "online")
            says("offline", 7)
            says("online", "s-1")
            await until(lambda: len(bench.wire.pubacks) == 5)
            assert presence() == "online"
            assert await bench.unmatched() == ["unfit_session"] * 3

    simulated(world)
