"""Webhooks of a real broker: killed during delivery it skips no event; and the operator's commands."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from standardwebhooks.webhooks import Webhook

from tests.integration.subscriptions.receiver import Got, Receiver, receiving
from tests.system.conftest import NewBroker
from tests.system.support import WITHIN_SEC, Broker

DEVICES = [f"lamp-{number}" for number in range(5)]


def started(new_broker: NewBroker, directory: Path) -> Broker:
    config = directory / "ordain.toml"
    config.write_text('webhook_allow = ["127.0.0.0/8"]\n')
    return new_broker("--config", str(config)).start()


def hook(broker: Broker, receiver: Receiver) -> dict[str, Any]:
    answer = broker.http("POST", "/v1/webhooks", {"url": receiver.url})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def outward(broker: Broker) -> dict[int, str]:
    """Position and device of every event of a command or a device."""
    tail = broker.ordain("log", "tail", "--lines", "100000", "--json")
    rows = [json.loads(line) for line in tail.stdout.splitlines()]
    return {row["position"]: row["device_id"] for row in rows if row["device_id"] is not None}


async def test_a_repeatedly_killed_broker_skips_no_event_and_keeps_the_order_per_device(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    taken: list[Got] = []

    def reply(got: Got) -> tuple[int, dict[str, str]]:
        if len(receiver.got) % 7 == 0:
            return 503, {"Retry-After": "1"}
        taken.append(got)
        return 204, {}

    async with receiving() as receiver:
        receiver.reply = reply
        broker = await asyncio.to_thread(started, new_broker, tmp_path)
        webhook = await asyncio.to_thread(hook, broker, receiver)
        for name in DEVICES:
            await asyncio.to_thread(broker.device, name)
        for _ in range(3):
            before = len(receiver.got)
            for name in DEVICES * 3:
                await asyncio.to_thread(broker.create, name)
            await receiver.until(lambda before=before: len(receiver.got) > before + 3)  # type: ignore[misc]
            broker.kill()
            await asyncio.to_thread(broker.start)
        wanted = await asyncio.to_thread(outward, broker)
        await receiver.until(lambda: {got.position for got in taken} >= wanted.keys(), WITHIN_SEC)

    firsts = list(dict.fromkeys(got.position for got in taken))
    assert set(firsts) == wanted.keys()
    for device in set(wanted.values()):
        mine = [position for position in firsts if wanted[position] == device]
        assert mine == sorted(mine)
    for got in taken:
        Webhook(webhook["secret"]).verify(got.body, got.headers)
    assert len({(got.headers["webhook-id"], got.body) for got in taken}) == len(wanted)
    assert webhook["secret"] not in broker.said()


async def test_an_operator_pauses_resumes_and_redrives_with_and_without_the_broker(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    async with receiving() as receiver:
        broker = await asyncio.to_thread(started, new_broker, tmp_path)
        webhook = await asyncio.to_thread(hook, broker, receiver)

        async def ordain(*words: str) -> str:
            done = await asyncio.to_thread(broker.ordain, "webhooks", *words)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert " paused, from position " in await ordain("pause", webhook["id"])
        await asyncio.to_thread(broker.device, "lamp-1")
        (listed,) = json.loads(await ordain("list", "--json"))
        assert (listed["state"], listed["reason"]) == ("paused", "operator:local paused it")
        assert "paused" in await ordain("list")
        assert " active, from position " in await ordain("resume", webhook["id"])
        (first,) = await receiver.count(1)
        await ordain("redrive", webhook["id"], "--from", str(first.position))
        again = (await receiver.count(2))[1]
        assert again.headers["webhook-id"] == first.headers["webhook-id"]
        unknown = await asyncio.to_thread(broker.ordain, "webhooks", "pause", "whk_none")
        assert (unknown.returncode, "whk_none" in unknown.stderr) == (1, True)

        assert await asyncio.to_thread(broker.end) == 0
        await ordain("redrive", webhook["id"], "--from", str(first.position))
        assert len(receiver.got) == 2, "without a broker no request is sent"
        await asyncio.to_thread(broker.start)
        assert (await receiver.count(3))[2].body == first.body
