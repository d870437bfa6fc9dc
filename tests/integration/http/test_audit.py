"""The audit: each change names its key, its request and the address it came from; only admins see that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.log import sqlite as log
from broker.operations import backup
from broker.operations.redecide import redecide
from broker.subscriptions.webhook_worker import NoWayOut
from tests.integration.http.support import READ, WRITE, Broker, error_of, register, running


class Silent(NoWayOut):
    async def fault(self, url: str) -> str | None:
        return None


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data", outbound=Silent()) as broker:
        yield broker


async def entries(client: httpx2.AsyncClient, query: str = "") -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/audit{query}")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def test_each_change_names_its_key_its_request_and_its_address(broker: Broker) -> None:
    key, secret = await broker.core.keys.create("acme", WRITE, None)
    client, admin = broker.client(secret), await broker.someone("ops", ("admin",))
    device = await register(client)
    path = "/v1/devices/lamp-1/commands"
    sent = await client.post(path, json={"type": "blink"}, headers={"X-Request-Id": "night-7"})
    command = sent.json()["id"]
    cancelled = await client.delete(f"{path}/{command}", headers={"X-Request-Id": "not a name"})
    await client.post("/v1/devices/lamp-1/token")

    found = await entries(admin, f"?key={key.id}")

    assert [(each["action"], each["subject"]) for each in found] == [
        ("device.registered", device["id"]),
        ("command.created", command),
        ("command.cancelled", command),
        ("device.token_rotated", device["id"]),
    ]
    assert {each["actor"] for each in found} == {f"key:{key.id}"}
    assert {each["peer"] for each in found} == {"127.0.0.1"}
    assert found[1]["request_id"] == sent.headers["x-request-id"] == "night-7"
    assert found[2]["request_id"] == cancelled.headers["x-request-id"]
    assert found[2]["request_id"].startswith("req_")
    assert "token_digest" not in str(found)


async def test_what_lies_beside_the_log_is_recorded_in_it(broker: Broker) -> None:
    admin = await broker.someone("ops", ("admin",))
    operator = broker.client(app=broker.private)
    made = await admin.post("/v1/keys", json={"project": "acme", "scopes": READ, "devices": ["a"]})
    key = made.json()
    await admin.delete(f"/v1/keys/{key['id']}")
    await admin.delete(f"/v1/keys/{key['id']}")
    await operator.post("/local/grants/rotate")
    url = "https://example.org/secret-path"
    webhook = (await admin.post("/v1/webhooks", json={"url": url, "project": "acme"})).json()["id"]
    await admin.patch(f"/v1/webhooks/{webhook}", json={"name": "x", "enabled": False})
    await admin.delete(f"/v1/webhooks/{webhook}")

    found = await entries(admin)

    acts = [each["action"] for each in found if each["action"] != "key.created"]
    assert acts == [
        "broker.started", "key.revoked", "grant_key.rotated", "webhook.created", "webhook.changed",
        "webhook.paused", "webhook.deleted",
    ]  # fmt: skip
    created = next(each for each in found if each["subject"] == key["id"])
    assert created["data"] == {"scopes": ["devices:read"], "devices": {"names": ["a"]}}
    rotated = next(each for each in found if each["action"] == "grant_key.rotated")
    assert (rotated["actor"], rotated["peer"], rotated["project"]) == ("operator:local", "local", None)
    for secret in (key["key"], "secret-path"):
        assert secret not in str(found)
    verified = await broker.core.storage.read(log.verify)
    assert verified.fault is None


async def test_addresses_and_acts_are_in_no_event_that_services_get(broker: Broker) -> None:
    client, admin = await broker.someone(), await broker.someone("ops", ("admin",))
    await register(client)
    sent = await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})

    for reader in (client, admin):
        for path in ("/v1/events", f"/v1/commands/{sent.json()['id']}/events"):
            page = (await reader.get(path)).text
            assert "created" in page or "registered" in page
            assert "127.0.0.1" not in page
            assert "operated" not in page
    error_of(await client.get("/v1/audit"), 403, "forbidden")


async def test_the_audit_can_begin_at_a_time_and_is_read_in_pages(broker: Broker) -> None:
    client, admin = await broker.someone(), await broker.someone("ops", ("admin",))
    for number in range(3):
        await register(client, f"lamp-{number}")
    every = await entries(admin)

    first = (await admin.get("/v1/audit?limit=2")).json()
    rest = (await admin.get(f"/v1/audit?limit=100&cursor={first['next_cursor']}")).json()

    assert first["data"] + rest["data"] == every
    assert (first["has_more"], rest["has_more"]) == (True, False)
    since = every[-1]["at"]
    assert await entries(admin, f"?since={since}") == [each for each in every if each["at"] >= since]
    assert await entries(admin, "?since=2099-01-01T00:00:00Z") == []
    error_of(await admin.get("/v1/audit?since=yesterday"), 400, "invalid_request")


async def test_decisions_are_repeated_alike_whoever_asked(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    sent = await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})
    await client.delete(f"/v1/devices/lamp-1/commands/{sent.json()['id']}")

    rows = await broker.core.storage.read(log.all_rows)

    steps = list(redecide([log.recorded(row) for row in rows], 1))
    assert [step.fault for step in steps] == [None, None]


async def test_a_report_over_http_names_its_request_too(broker: Broker) -> None:
    client, admin = await broker.someone(), await broker.someone("ops", ("admin",))
    token = (await register(client, type="recorder"))["device_token"]
    body = {"type": "start_recording"}
    command = (await client.post("/v1/devices/lamp-1/commands", json=body)).json()["id"]
    device = broker.client(token)
    await device.post("/v1/devices/me/commands/claim")
    done = await device.post(f"/v1/devices/me/commands/{command}/result", json={"status": "executed"})

    rows = await broker.core.storage.read(lambda sql: log.stream(sql, command))

    assert done.status_code == 200, done.text
    assert all(b'"via"' in (row.data or b"") for row in rows), rows
    assert await entries(admin, "?key=key_none") == []


async def test_a_restore_is_recorded_once_at_the_first_start_after_it(broker: Broker, tmp_path: Path) -> None:
    old, there = broker.core.log_id, tmp_path / "restored"
    backup.take(tmp_path / "data", tmp_path / "backup.db")
    backup.restore(tmp_path / "backup.db", there)
    for _ in range(2):
        async with running(there) as restored:
            found = await entries(await restored.someone("ops", ("admin",)))
    acts = [each for each in found if each["action"] == "restored"]
    assert [each["data"] for each in acts] == [{"restored_from": old}]
