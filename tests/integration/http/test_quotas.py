"""Quotas of a project over HTTP: refusals have a true `Retry-After`, and other projects are not affected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from broker.settings import Limits, ProjectLimits
from tests.integration.core_support import ManualClock
from tests.integration.http.support import Broker, error_of, register, running
from tests.integration.http.test_app_command import history, sent
from tests.integration.http.test_commands import ids, send
from tests.integration.http.test_fanout import fan_out, lamps


async def post(client: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"} | body)


async def refusals(broker: Broker) -> dict[str, float]:
    text = (await broker.client().get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("ordain_refusals_total{")]
    return {line.split('"')[1]: float(line.split()[1]) for line in lines}


async def test_above_its_rate_a_project_gets_the_time_of_the_next_allowed_command(tmp_path: Path) -> None:
    own = ProjectLimits(commands_per_minute=2)
    async with running(tmp_path / "data", clock=ManualClock(), acme=own) as broker:
        client = await broker.someone()
        await register(client)
        first = await post(client, idempotency_key="k")
        await send(client)

        answer = await post(client)

        error = error_of(answer, 429, "rate_limit_exceeded")
        assert error["details"] == {"retry_after_sec": 30}
        assert answer.headers["retry-after"] == "30"
        again = await post(client, idempotency_key="k")
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        cancelled = await client.delete(f"/v1/devices/lamp-1/commands/{first.json()['id']}")
        assert cancelled.status_code == 200
        retry = await client.post(f"/v1/commands/{first.json()['id']}/retry")
        error_of(retry, 429, "rate_limit_exceeded")
        assert (await refusals(broker))["rate_limit_exceeded"] == 2


async def test_each_device_of_a_fan_out_counts_as_one_command_of_the_rate(tmp_path: Path) -> None:
    own = ProjectLimits(commands_per_minute=3)
    async with running(tmp_path / "data", clock=ManualClock(), acme=own) as broker:
        client = await broker.someone()
        names = await lamps(client, 5)

        found = await fan_out(client, names, idempotency_key="k")
        again = await fan_out(client, names, idempotency_key="k")

        assert [list(found[name]) for name in names] == [["command_id"]] * 3 + [["error"]] * 2
        assert found["lamp-3"]["error"]["code"] == "rate_limit_exceeded"
        assert found["lamp-3"]["error"]["details"] == {"retry_after_sec": 20}
        assert [again[name] for name in names[:3]] == [found[name] for name in names[:3]]
        assert (await refusals(broker))["rate_limit_exceeded"] == 4
        assert len(await ids(client, "/v1/commands")) == 3


async def test_a_flood_of_one_project_does_not_affect_others(tmp_path: Path) -> None:
    async with running(tmp_path / "data", Limits(commands_per_minute=2, queue_per_device=3)) as broker:
        client, neighbour = await broker.someone(), await broker.someone("other")
        await register(client)
        await register(neighbour, "lamp-2")
        for _ in range(5):
            await post(client)
        error_of(await post(client), 429, "rate_limit_exceeded")

        assert (await fan_out(neighbour, ["lamp-2"])).keys() == {"lamp-2"}
        assert await send(neighbour, "lamp-2")


async def test_a_project_has_its_own_limits_of_queues_and_parameters(tmp_path: Path) -> None:
    own = ProjectLimits(queue_per_name=1, params_bytes=20)
    async with running(tmp_path / "data", acme=own) as broker:
        client, neighbour = await broker.someone(), await broker.someone("other")
        await register(client)
        await register(neighbour, "lamp-2")
        await send(client)
        large = {"text": "x" * 20}

        full = await post(client)
        too_large = await post(client, type="glow", params=large)
        found = await fan_out(client, ["lamp-1"], type="glow", params=large)

        error_of(full, 429, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        error_of(too_large, 413, "too_large")
        assert found["lamp-1"]["error"]["code"] == "too_large"
        for _ in range(2):
            await send(neighbour, "lamp-2", params=large)
        counted = await refusals(broker)
        assert (counted["queue_full"], counted["too_large"]) == (1, 2)


async def test_events_before_a_projects_retention_are_not_shown(tmp_path: Path) -> None:
    clock = ManualClock()
    short = ProjectLimits(history_retention_sec=60)
    async with running(tmp_path / "data", clock=clock, acme=short) as broker:
        client, neighbour = await broker.someone(), await broker.someone("other")
        await register(client)
        await register(neighbour, "lamp-2")
        old = (await sent(client, "lamp-1"))["lamp-1"]["command_id"]
        await sent(neighbour, "lamp-2")
        clock.pass_ms(60_000)
        new = (await sent(client, "lamp-1"))["lamp-1"]["command_id"]

        records = (await history(client, "lamp-1"))["lamp-1"]
        clock.pass_ms(1)
        later = (await history(client, "lamp-1"))["lamp-1"]

        assert [record["command_id"] for record in records] == [old, new]
        assert [record["command_id"] for record in later] == [new]
        assert len((await history(neighbour, "lamp-2"))["lamp-2"]) == 1
        assert len(await ids(client, "/v1/commands")) == 2
