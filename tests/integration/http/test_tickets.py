"""Tickets: a page opens an event stream without showing its key in a URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.http.edge import tickets
from devices.clock import parse_rfc3339
from tests.integration.core_support import ManualClock, until
from tests.integration.http.sse_support import reading
from tests.integration.http.support import Broker, error_of, register, running


async def ticket_of(broker: Broker, project: str = "acme") -> str:
    client = await broker.someone(project, ("events:read",))
    answer = await client.post("/v1/events/ticket")
    assert answer.status_code == 201
    assert set(answer.json()) == {"ticket", "expires_at"}
    return str(answer.json()["ticket"])


async def test_a_ticket_opens_one_stream_with_the_rights_of_its_key(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        ours, theirs = await broker.someone(), await broker.someone("other")
        ticket = await ticket_of(broker)
        async with reading(broker.app, "", f"ticket={ticket}", authorization="") as reader:
            await until(lambda: reader.text != "")
            await register(theirs, "theirs")
            device = await register(ours)
            assert [event["subject"] for event in await reader.has(1)] == [device["id"]]
            async with reading(broker.app, "", f"ticket={ticket}", authorization="") as again:
                await again.end()
            assert again.status == 401


async def test_a_page_reconnects_with_a_new_ticket_and_its_last_id(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        first = await register(client)
        query = f"ticket={await ticket_of(broker)}&after=0"
        async with reading(broker.app, "", query, authorization="") as reader:
            [event] = await reader.has(1)
        assert event["subject"] == first["id"]
        last = f"{broker.core.log_id}:{event['id']}"
        missed = await register(client, "lamp-2")
        query = f"ticket={await ticket_of(broker)}&after={last}"
        async with reading(broker.app, "", query, authorization="") as reader:
            assert [event["subject"] for event in await reader.has(1)] == [missed["id"]]


async def test_a_ticket_expires_after_a_minute(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock=clock) as broker:
        client = await broker.someone()
        answer = (await client.post("/v1/events/ticket")).json()
        assert parse_rfc3339(answer["expires_at"]) - broker.core.writer.now() == 60_000
        clock.pass_ms(60_000)
        error_of(await broker.client().get(f"/v1/events?ticket={answer['ticket']}"), 401, "unauthorized")


async def test_a_revoked_key_ends_its_tickets_and_their_streams(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key, secret = await broker.core.keys.create("acme", ("events:read",), None)
        client = broker.client(secret)
        used, unused = [(await client.post("/v1/events/ticket")).json()["ticket"] for _ in range(2)]
        async with reading(broker.app, "", f"ticket={used}", authorization="") as reader:
            await until(lambda: reader.text != "")
            await broker.core.keys.revoke(key.id)
            await reader.end()
        error_of(await broker.client().get(f"/v1/events?ticket={unused}"), 401, "unauthorized")


async def test_a_ticket_is_good_for_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        nobody = broker.client()
        for path in (
            f"/v1/commands?ticket={await ticket_of(broker)}",
            "/v1/events?ticket=tkt_unknown",
            "/v1/events?ticket=",
        ):
            error_of(await nobody.get(path), 401, "unauthorized")
        error_of(await nobody.post("/v1/events/ticket"), 401, "unauthorized")
        reader = await broker.someone(scopes=("devices:read",))
        error_of(await reader.post("/v1/events/ticket"), 403, "forbidden")
        as_key = broker.client(await ticket_of(broker))
        error_of(await as_key.get("/v1/events"), 401, "unauthorized")


async def test_unused_tickets_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "MOST", 2)
    async with running(tmp_path) as broker:
        first, *others = [await ticket_of(broker) for _ in range(3)]
        metrics = (await broker.client().get("/metrics")).text
        assert "ordain_unused_tickets 2.0" in metrics
        error_of(await broker.client().get(f"/v1/events?ticket={first}"), 401, "unauthorized")
        for ticket in others:
            assert (await broker.client().get(f"/v1/events?ticket={ticket}")).status_code == 200
