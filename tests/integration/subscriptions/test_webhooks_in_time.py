"""Webhooks over seconds, hours and three days, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from broker import core
from broker.engine.commands import Caller
from broker.seams import Answer
from broker.subscriptions import webhooks
from broker.subscriptions.webhook_queue import CAP_MS, GIVE_UP_MS, HOLD_MS
from broker.subscriptions.webhook_state import Webhook
from devices.clock import rfc3339
from tests.integration.core_support import PROJECT, Bench, on_virtual_time, simulated, until
from tests.simulation.loop import SimLoop

OWNER = Caller(actor="key:key_1", project=PROJECT)
URL = "https://hooks.example/"
HOUR_SEC = 3_600
FOREVER_SEC = 10 * 86_400


class Far:
    """The receiver: `answer` returns the answer to each request, `at` holds the time of each request in s."""

    def __init__(self, loop: SimLoop) -> None:
        self.answer: Callable[[int], Answer] = lambda _: Answer(status=200)
        self.got: list[int] = []
        self.at: list[float] = []
        self._loop = loop

    async def fault(self, url: str) -> str | None:
        return None

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        position = int(headers["webhook-id"].rpartition("_")[2])
        self.got.append(position)
        self.at.append(self._loop.time())
        return self.answer(position)


async def made(bench: Bench, **fields: Any) -> Webhook:
    webhook, _ = await bench.core.webhooks.create(OWNER, PROJECT, URL, **fields)
    return webhook


def test_after_three_days_of_failures_it_pauses_with_a_reason_and_skips_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Once a minute instead of once a second: three days have few of them.
    monkeypatch.setattr(webhooks, "SAVE_SEC", 60.0)
    monkeypatch.setattr(core, "TICK_SEC", 60.0)

    async def world(loop: SimLoop) -> None:
        far = Far(loop)
        far.answer = lambda _: Answer(status=500)
        async with on_virtual_time(loop, outbound=far) as (bench, _):
            webhook = await made(bench)
            await bench.device(online=False)
            first = bench.core.feed.head
            await until(lambda: len(far.got) > 0)
            command = await bench.order()
            await until(lambda: webhook.endpoint.state == "paused", FOREVER_SEC)

            assert 0 <= far.at[-1] - far.at[0] - GIVE_UP_MS / 1_000 < HOUR_SEC / 60
            assert set(far.got) == {first}
            waits = [after - before for before, after in zip(far.at, far.at[1:], strict=False)]
            assert max(waits) <= CAP_MS / 1_000 + 1
            assert max(waits) > HOUR_SEC / 2
            assert 40 < len(far.got) < 400
            assert webhook.endpoint.reason == (
                f"the event at position {first} could not be delivered for 3 days: answered 500"
            )
            assert webhook.cursor == first
            assert bench.core.webhooks.stopped() == 1

            far.answer, tried = lambda _: Answer(status=200), len(far.got)
            await bench.core.webhooks.resume(OWNER, webhook.endpoint.id)
            await until(lambda: bench.core.webhooks.lag() == 0, 60)
            rows = await bench.rows()
            of_command = [row.position for row in rows if row.stream == command.id]
            assert far.got[tried:] == [first, *of_command]

    simulated(world)


def asked_to_wait(status: int, header: Callable[[Bench], str]) -> float:
    """Seconds until the next request to the receiver, although an event of another device is due."""
    waited: list[float] = []

    async def world(loop: SimLoop) -> None:
        far = Far(loop)
        async with on_virtual_time(loop, outbound=far) as (bench, _):
            await made(bench)
            far.answer = lambda _: Answer(status=status, retry_after=header(bench))
            await bench.device("lamp-1", online=False)
            await until(lambda: len(far.got) == 1)
            far.answer = lambda _: Answer(status=200)
            await bench.device("lamp-2", online=False)
            await until(lambda: len(far.got) == 3, FOREVER_SEC)
            waited.append(far.at[1] - far.at[0])

    simulated(world)
    return waited[0]


def test_retry_after_applies_to_the_whole_endpoint_and_is_capped() -> None:
    # To the millisecond, which is what the broker's clock shows.
    assert 39.999 < asked_to_wait(429, lambda _: "40") < 41
    assert 39.999 < asked_to_wait(503, lambda _: "40") < 41
    assert HOLD_MS / 1_000 - 0.001 < asked_to_wait(503, lambda _: "999999999") < HOLD_MS / 1_000 + 1
    assert asked_to_wait(500, lambda _: "40") < 30, "only 429 and 503 use Retry-After for overload"


def test_a_failing_device_waits_while_other_devices_are_served() -> None:
    async def world(loop: SimLoop) -> None:
        far = Far(loop)
        async with on_virtual_time(loop, outbound=far) as (bench, _):
            webhook = await made(bench)
            await bench.device("lamp-1", online=False)
            bad = bench.core.feed.head
            far.answer = lambda position: Answer(status=500 if position == bad else 200)
            for number in range(2, 40):
                await bench.device(f"lamp-{number}", online=False)
            await until(lambda: len(set(far.got)) == 39, 60)

            assert webhook.cursor == bad
            assert [pending.position for pending in webhook.progress.open] == [bad]
            failing = webhook.failing
            assert failing is not None
            assert rfc3339(failing.failed_since or 0) <= rfc3339(bench.writer.now())

    simulated(world)


def test_a_full_disk_stops_no_delivery_and_progress_is_stored_afterwards() -> None:
    async def world(loop: SimLoop) -> None:
        far = Far(loop)
        async with on_virtual_time(loop, outbound=far) as (bench, disk):
            webhook = await made(bench)
            await bench.device(online=False)
            disk.capacity = sum(len(file.data) for file in disk.files.values())
            await until(lambda: not bench.writer.open, 60)
            disk.capacity = None
            await until(lambda: bench.writer.open and webhook.saved == webhook.progress, 60)
            await bench.device("lamp-2", online=False)
            await until(lambda: bench.core.webhooks.lag() == 0, 60)
            assert len(set(far.got)) == 2

    simulated(world)
