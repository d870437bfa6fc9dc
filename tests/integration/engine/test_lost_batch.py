"""What a failed commit had taught the broker is unlearnt, and nothing is sent before it is learnt again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import patch

import pytest

from broker.domain import attempts
from broker.domain.errors import Refusal, Unavailable
from broker.domain.lanes import Flight, Presence
from broker.engine import live
from broker.engine.intake import Intake
from broker.seams import Message, Receipt
from broker.settings import Limits
from devices.types import load_type
from tests.integration.core_support import ME, Bench, on_virtual_time, simulated, until
from tests.simulation.disk import SimDisk
from tests.simulation.loop import SimLoop

SIREN = load_type(
    'name = "siren"\npayload = "bare"\ncompletes_on = "published"\n[commands.on]\ntext = "on"\n'
)


@asynccontextmanager
async def no_space(bench: Bench, disk: SimDisk) -> AsyncIterator[None]:
    """What is staged inside is lost; the log can be written again at the end."""
    disk.capacity, epoch = 0, bench.live.epoch
    yield
    await until(lambda: bench.live.epoch > epoch)
    disk.capacity = None


async def lose_a_batch(bench: Bench, disk: SimDisk) -> None:
    async with no_space(bench, disk):
        bench.core.intake.device_offline("lamp-1")
        await until(lambda: not bench.writer.open)
    await until(lambda: bench.writer.open)


async def refused(request: Awaitable[Any]) -> None:
    with suppress(Unavailable):
        await request
        raise AssertionError("answered before it was durable")


def status(bench: Bench, word: bytes, **fields: Any) -> None:
    bench.core.intake.message(Message(topic="iotee/dev/lamp-1/status", payload=word, **fields))


async def presence(bench: Bench, disk: SimDisk) -> None:
    device = await bench.device(online=False)
    async with no_space(bench, disk):
        bench.core.intake.device_online("lamp-1")
        await until(lambda: bench.live.presence.get(device.id) is Presence.ONLINE)
        await until(lambda: bench.live.presence.get(device.id) is None)
    await until(lambda: bench.live.presence.get(device.id) is Presence.ONLINE)


async def quotas(bench: Bench, disk: SimDisk) -> None:
    await bench.device(online=False)
    async with no_space(bench, disk):
        await refused(bench.order())
    await until(lambda: bench.writer.open)
    await bench.order()
    with pytest.raises(Refusal, match="the next is allowed in"):
        await bench.order()


async def slots(bench: Bench, disk: SimDisk) -> None:
    await bench.device(online=False)
    await bench.order()
    dispatch = bench.core.dispatch
    async with no_space(bench, disk):
        bench.core.intake.device_online("lamp-1")
        await until(lambda: dispatch.staged == 1)
        await until(lambda: not bench.writer.open)
        await until(lambda: dispatch.staged == 0)
    await until(lambda: len(bench.wire.sent) == 1)
    assert (dispatch.staged, dispatch.outstanding) == (0, 1)


async def keys(bench: Bench, disk: SimDisk) -> None:
    await bench.device(online=False)
    async with no_space(bench, disk):
        await refused(bench.order(idempotency_key="k", fingerprint=b"1"))
    await until(lambda: bench.writer.open)
    accepted = await bench.accepted(idempotency_key="k", fingerprint=b"2")
    assert not accepted.replayed


async def erasures(bench: Bench, disk: SimDisk) -> None:
    await bench.device(online=False)
    command = await bench.order()
    await bench.core.commands.cancel(ME, command.id)
    async with no_space(bench, disk):
        await refused(bench.core.erasures.delete(ME, command.id))
    await until(lambda: bench.writer.open)
    await bench.core.commands.ready(command_ids=[command.id])
    assert bench.state(command.id) == "cancelled"
    assert bench.core.erasures.erased == 0


async def tokens(bench: Bench, disk: SimDisk) -> None:
    registry = bench.core.registry
    await bench.device(online=False)
    token = (await registry.rotate_token(ME, "lamp-1")).token
    async with no_space(bench, disk):
        await refused(registry.rotate_token(ME, "lamp-1"))
    await until(lambda: bench.writer.open)
    assert await registry.authenticate("lamp-1", token) is not None


async def cursors(bench: Bench, disk: SimDisk) -> None:
    await bench.device(online=False)
    events, webhooks = bench.core.mqtt_events, bench.core.webhooks
    await events.load("log")
    async with no_space(bench, disk):
        events.save()
        webhooks._dirty["whk_gone"] = None
        webhooks.save()
    await until(lambda: bench.writer.open)
    assert "whk_gone" in webhooks._dirty
    assert events._saved == -1


async def receipts(bench: Bench, disk: SimDisk) -> None:
    """A command that may be sent once, of a type that answers nothing: its only PUBACK must not be lost."""
    await bench.device(type="siren")
    command = await bench.order(type="on")
    await until(lambda: len(bench.wire.sent) == 1)
    async with no_space(bench, disk):
        bench.wire.receipt()
        assert bench.state(command.id) == "executed"
    await bench.becomes(command.id, "executed")
    assert await bench.types(command.id) == ["created", "published", "executed"]


async def late_receipts(bench: Bench, disk: SimDisk) -> None:
    """The same for a receipt that comes while the log cannot be written."""
    await bench.device(type="siren")
    command = await bench.order(type="on")
    await until(lambda: len(bench.wire.sent) == 1)
    async with no_space(bench, disk):
        bench.core.intake.device_offline("lamp-1")
        await until(lambda: not bench.writer.open)
        bench.wire.receipt(Receipt(written=True, reason=0x87))
    found = await bench.becomes(command.id, "failed")
    assert found.error is not None
    assert found.error.code == "refused"


async def confirmations(bench: Bench, disk: SimDisk) -> None:
    """An answer without id is still not to a command that the MQTT server does not have yet."""
    await bench.device(type="iotee_device")
    command = await bench.order(type="reboot")
    await until(lambda: len(bench.wire.sent) == 1)
    await lose_a_batch(bench, disk)
    bench.says(b"ok")
    await until(lambda: len(bench.wire.pubacks) == 1)
    assert bench.state(command.id) == "published"
    bench.wire.receipt()
    bench.says(b"ok")
    await bench.becomes(command.id, "executed")


async def unsent(bench: Bench, disk: SimDisk) -> None:
    """Nor is it to a command whose bytes never left, also after that has timed out."""
    await bench.device(type="iotee_device")
    with patch.object(bench.wire, "publish", lambda *_: False):
        command = await bench.order(type="reboot")
        await bench.becomes(command.id, "published")
    await lose_a_batch(bench, disk)
    await bench.becomes(command.id, "timed_out")
    bench.says(b"ok")
    await until(lambda: len(bench.wire.pubacks) == 1)
    assert bench.state(command.id) == "timed_out"


async def misses(bench: Bench, disk: SimDisk) -> None:
    """Nor to one that met no subscriber."""
    await bench.device(type="iotee_device")
    command = await bench.order(type="reboot")
    await until(lambda: len(bench.wire.sent) == 1)
    bench.wire.receipt(Receipt(written=True, reason=0x10))
    await lose_a_batch(bench, disk)
    await bench.becomes(command.id, "timed_out")
    bench.says(b"ok")
    await until(lambda: len(bench.wire.pubacks) == 1)
    assert bench.state(command.id) == "timed_out"


LEARNT: list[Callable[[Bench, SimDisk], Awaitable[None]]] = [
    presence,
    quotas,
    slots,
    keys,
    erasures,
    tokens,
    cursors,
    receipts,
    late_receipts,
    confirmations,
    unsent,
    misses,
]


@pytest.mark.parametrize("learnt", LEARNT, ids=lambda each: each.__name__)
def test_what_a_failed_commit_taught_is_unlearnt(learnt: Callable[[Bench, SimDisk], Awaitable[None]]) -> None:
    async def world(loop: SimLoop) -> None:
        limits = Limits(commands_per_minute=1)
        async with on_virtual_time(loop, limits, types={"siren": SIREN}) as (bench, disk):
            await learnt(bench, disk)

    simulated(world)


def test_a_confirmation_that_comes_while_the_log_is_read_again_counts() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, disk):
            await bench.device(type="iotee_device")
            command = await bench.order(type="reboot")
            await bench.order(type="reboot")
            await until(lambda: len(bench.wire.sent) == 1)

            def recovered(*of: Any) -> Flight:
                loop.call_soon(bench.wire.receipt)  # in the pause before the next command
                return attempts.recovered(*of)

            with patch.object(live, "AT_ONCE", 1), patch.object(live, "attempts") as found:
                found.recovered = recovered
                await lose_a_batch(bench, disk)
            bench.says(b"ok")
            await bench.becomes(command.id, "executed")

    simulated(world)


def test_a_device_that_came_and_left_while_the_disk_was_full_is_sent_nothing() -> None:
    """The only attempt of a command that may be sent once is kept for when the device is there."""

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, disk):
            await bench.device("door", type="recorder", online=False)
            command = await bench.order("door", type="start_recording", ttl_sec=None)
            async with no_space(bench, disk):
                bench.core.intake.device_online("door")
                await until(lambda: not bench.writer.open)
                bench.core.intake.device_offline("door")
            await until(lambda: bench.writer.open)
            await asyncio.sleep(30)
            assert bench.wire.sent == []
            assert bench.state(command.id) == "pending"
            bench.core.intake.device_online("door")
            await until(lambda: len(bench.wire.sent) == 1)

    simulated(world)


def test_a_device_that_was_online_before_the_disk_was_full_and_left_is_sent_nothing() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop) as (bench, disk):
            await bench.device()
            first, second = await bench.order(ttl_sec=None), await bench.order(ttl_sec=None)
            await until(lambda: len(bench.wire.sent) == 1)
            async with no_space(bench, disk):
                bench.answers(first.id)
                await until(lambda: not bench.writer.open)
                bench.core.intake.device_offline("lamp-1")
            await bench.becomes(first.id, "executed")
            await asyncio.sleep(30)
            assert bench.state(second.id) == "pending"
            assert len(bench.wire.sent) == 1

    simulated(world)


def test_a_new_session_of_our_link_outlives_the_presence_of_a_lost_commit() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, disk):
            device = await bench.device(online=False)
            status(bench, b"online")
            await until(lambda: bench.live.presence.get(device.id) is Presence.ONLINE)
            await bench.writer.barrier()
            async with no_space(bench, disk):
                status(bench, b"offline")
                await until(lambda: bench.live.presence.get(device.id) is Presence.OFFLINE)
                bench.core.intake.link_up()
                await until(lambda: bench.live.presence.get(device.id) is Presence.UNKNOWN)
            await until(lambda: bench.writer.open)
            await until(lambda: bench.live.presence.get(device.id) is Presence.OFFLINE)

    simulated(world)


def test_backlog_that_waited_until_the_log_could_be_written_is_still_backlog() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, disk):
            device = await bench.device(online=False)
            bench.core.intake.link_up()
            async with no_space(bench, disk):
                bench.says(b"?")
                await asyncio.sleep(3)
            await until(lambda: len(bench.wire.pubacks) == 1)
            assert bench.live.presence.get(device.id) is Presence.UNKNOWN

    simulated(world)


def test_a_retained_will_of_an_older_session_holds_nothing_back() -> None:
    """The MQTT server noticed the end of an old connection after the device had come back."""

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, embedded=False) as (bench, _):
            device = await bench.device(online=False)
            status(bench, b'{"status":"online","session":"s2"}')
            await until(lambda: bench.live.presence.get(device.id) is Presence.ONLINE)
            bench.core.intake.link_up()
            status(bench, b'{"status":"offline","session":"s1"}', retain=True)
            await until(lambda: bench.live.presence.get(device.id) is Presence.UNKNOWN)
            await bench.order()
            await until(lambda: len(bench.wire.sent) == 1)

    simulated(world)


def test_the_planted_bug_of_presence_that_outlives_a_failed_commit_is_found() -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types={"siren": SIREN}) as (bench, disk):
            await presence(bench, disk)

    with patch.object(Intake, "_again", _kept), pytest.raises(ExceptionGroup):
        simulated(world)


def _kept(self: Intake, batch: list[Message], presence: Any, session: int) -> None:
    """Takes the messages again, and leaves what they had taught."""
    self._queue.extendleft(reversed(batch))
    self._wake.set()
