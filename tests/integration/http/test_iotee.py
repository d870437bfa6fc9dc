"""The unversioned paths: exact fields and words, permissions, and erasing over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.http.support import READ, Broker, error_of, register, running
from tests.integration.http.test_commands import DEADLINE_SEC, state_is

SENT = [
    "command_id", "hardware_id", "device_id", "device_type", "topic", "command", "status", "created_at",
]  # fmt: skip
RECORD = [*SENT, "params", "published_at", "acknowledged_at", "completed_at", "error"]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def admin(broker: Broker) -> httpx2.AsyncClient:
    return await broker.someone(scopes=("admin",))


async def lock(broker: Broker, client: httpx2.AsyncClient) -> dict[str, Any]:
    """Sends a command to ABC123, and waits until it is on the wire: the device can answer only then."""
    broker.link.took.clear()
    if not broker.link.up:
        broker.online("ABC123")
    answer = await client.post("/devices/ABC123/commands", json={"command": "lock"})
    assert answer.status_code == 201, answer.text
    sent: dict[str, Any] = answer.json()
    await state_is(client, sent["command_id"], "published")
    async with asyncio.timeout(DEADLINE_SEC):
        await broker.link.took.wait()
    return sent


async def record(client: httpx2.AsyncClient, command_id: str) -> dict[str, Any]:
    answer = await client.get(f"/commands/{command_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert list(found) == RECORD
    return found


async def test_a_command_is_sent_with_the_fields_and_words_of_iotee(broker: Broker) -> None:
    async with await broker.someone() as client:
        device = await register(client, "ABC123", type="iotee_device")
        answer = await client.post("/devices/ABC123/commands", json={"command": "lock"})

        assert answer.status_code == 201
        sent = answer.json()
        assert list(sent) == SENT
        assert sent["command_id"].startswith("cmd_")
        assert TIME.fullmatch(sent["created_at"])
        assert sent | {"command_id": "", "created_at": ""} == {
            "command_id": "",
            "hardware_id": "ABC123",
            "device_id": device["id"],
            "device_type": "iotee_device",
            "topic": "iotee/dev/ABC123/rls",
            "command": "lock",
            "status": "pending",
            "created_at": "",
        }
        native = (await client.get(f"/v1/commands/{sent['command_id']}")).json()
        assert native["created_at"] == sent["created_at"]


async def test_the_topic_in_the_answer_is_the_one_published_to(broker: Broker) -> None:
    topics = {"lock": "rls", "unlock": "rls", "reboot": "rbt"}
    async with await broker.someone() as client:
        for command in topics:
            await register(client, command, type="iotee_device")
            broker.online(command)
        sent = [
            (await client.post(f"/devices/{each}/commands", json={"command": each})).json() for each in topics
        ]
        for each in sent:
            await state_is(client, each["command_id"], "published")

        assert [each["topic"] for each in sent] == [f"iotee/dev/{name}/{end}" for name, end in topics.items()]
        assert {outgoing.topic for outgoing in broker.link.sent} == {each["topic"] for each in sent}


async def test_a_command_expires_by_its_types_ttl_or_never(broker: Broker) -> None:
    async with await broker.someone() as client:
        await register(client, "ABC123", type="iotee_device")
        await register(client, "lamp-1")
        ids = [
            (await client.post(f"/devices/{name}/commands", json={"command": "lock"})).json()["command_id"]
            for name in ("ABC123", "lamp-1")
        ]
        found = [(await client.get(f"/v1/commands/{each}")).json()["expires_at"] for each in ids]

        assert TIME.fullmatch(found[0])
        assert found[1] is None


async def test_a_device_type_in_the_request_applies_to_that_command_only(broker: Broker) -> None:
    async with await broker.someone() as client:
        await register(client, "ABC123", type="iotee_device")
        body = {"command": "blink", "device_type": "generic", "params": {"times": 2}}
        sent = (await client.post("/devices/ABC123/commands", json=body)).json()
        assert sent["device_type"] == "generic"
        assert (await record(client, sent["command_id"]))["params"] == {"times": 2}
        again = (await client.post("/devices/ABC123/commands", json={"command": "lock"})).json()
        assert again["device_type"] == "iotee_device"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "command"),
        ({"command": "dance"}, "command"),
        ({"command": "a b", "device_type": "generic"}, "command"),
        ({"command": "lock", "device_type": "toaster"}, "device_type"),
        ({"command": "lock", "params": [1]}, "params"),
        ({"command": "lock", "ttl_sec": 5}, "ttl_sec"),
    ],
)
async def test_a_wrong_field_is_named_by_its_name_in_this_api(
    broker: Broker, body: dict[str, Any], field: str
) -> None:
    async with await broker.someone() as client:
        await register(client, "ABC123", type="iotee_device")
        answer = await client.post("/devices/ABC123/commands", json=body)
        assert error_of(answer, 400, "invalid_request")["details"]["field"].partition(".")[0] == field


async def test_a_repeated_request_returns_the_first_command(broker: Broker) -> None:
    async with await broker.someone() as client, await admin(broker) as boss:
        await register(client, "ABC123", type="iotee_device")
        path, keyed = "/devices/ABC123/commands", {"Idempotency-Key": "k-1"}
        first = await client.post(path, headers=keyed, json={"command": "lock"})
        again = await client.post(path, headers=keyed, json={"command": "lock"})
        other = await client.post(path, headers=keyed, json={"command": "unlock"})
        native = await client.post(f"/v1{path}", headers=keyed, json={"type": "lock"})

        assert (first.status_code, again.status_code) == (201, 200)
        assert again.headers["Idempotent-Replayed"] == "true"
        assert again.json() == first.json()
        error_of(other, 409, "idempotency_conflict")
        error_of(native, 409, "idempotency_conflict")
        await boss.delete(f"/commands/{first.json()['command_id']}")
        gone = await client.post(path, headers=keyed, json={"command": "lock"})
        error_of(gone, 410, "gone")


async def test_every_state_has_its_status_word(broker: Broker) -> None:
    async with await broker.someone() as client:
        await register(client, "ABC123", type="iotee_device")
        waits = (await client.post("/devices/ABC123/commands", json={"command": "lock"})).json()
        await client.delete(f"/v1/devices/ABC123/commands/{waits['command_id']}")
        assert (await record(client, waits["command_id"]))["status"] == "cancelled"

        done = await lock(broker, client)
        assert (await record(client, done["command_id"]))["status"] == "published"
        broker.says("ABC123", b"ack")
        await state_is(client, done["command_id"], "acknowledged")
        assert (await record(client, done["command_id"]))["status"] == "acknowledged"
        broker.says("ABC123", b"ok")
        await state_is(client, done["command_id"], "executed")
        found = await record(client, done["command_id"])
        assert (found["status"], found["error"], found["params"]) == ("completed", None, {})
        for name in ("published_at", "acknowledged_at", "completed_at"):
            assert TIME.fullmatch(found[name])

        failed = await lock(broker, client)
        broker.says("ABC123", b"error")
        await state_is(client, failed["command_id"], "failed")
        found = await record(client, failed["command_id"])
        assert (found["status"], found["error"]["code"]) == ("failed", "device_error")
        assert (found["acknowledged_at"], found["completed_at"]) == (None, None)

        silent = await lock(broker, client)
        await client.post(f"/v1/commands/{silent['command_id']}/abandon")
        found = await record(client, silent["command_id"])
        assert (found["status"], found["error"]["code"]) == ("timeout", "timeout")


async def test_lists_are_newest_first_with_their_pagination(broker: Broker) -> None:
    async with await broker.someone() as client, await admin(broker) as boss:
        await register(client, "ABC123", type="iotee_device")
        await register(client, "ABC124", type="iotee_device")
        ids = []
        for number in range(5):
            body = {"command": "lock"}
            sent = (await client.post(f"/devices/ABC12{3 + number % 2}/commands", json=body)).json()
            ids.append(sent["command_id"])
        ids.reverse()

        def shown(answer: httpx2.Response) -> tuple[list[str], dict[str, int]]:
            assert answer.status_code == 200, answer.text
            assert list(answer.json()) == ["commands", "pagination"]
            assert all(list(each) == RECORD for each in answer.json()["commands"])
            return [each["command_id"] for each in answer.json()["commands"]], answer.json()["pagination"]

        assert shown(await boss.get("/commands")) == (ids, {"limit": 100, "offset": 0, "returned": 5})
        assert shown(await boss.get("/commands?limit=2&offset=1")) == (
            ids[1:3],
            {"limit": 2, "offset": 1, "returned": 2},
        )
        assert shown(await boss.get("/commands?offset=9")) == ([], {"limit": 100, "offset": 9, "returned": 0})
        assert shown(await client.get("/devices/ABC124/commands?limit=1000"))[0] == [ids[1], ids[3]]
        for wrong in ("limit=0", "limit=1001", "offset=-1", "limit=x"):
            for path in ("/commands", "/devices/ABC123/commands"):
                answer = await boss.get(f"{path}?{wrong}")
                field = error_of(answer, 400, "invalid_request")["details"]["field"]
                assert field == wrong.partition("=")[0]


async def test_admin_operations_are_refused_to_others(broker: Broker) -> None:
    async with await broker.someone() as client, await broker.someone(scopes=READ) as reader:
        await register(client, "ABC123", type="iotee_device")
        sent = await lock(broker, client)
        path = f"/commands/{sent['command_id']}"

        for asked in (
            client.get("/commands"),
            client.delete(path),
            client.post(f"{path}/retry"),
            client.post("/commands/purge", json={"older_than_days": 90}),
            reader.post("/devices/ABC123/commands", json={"command": "lock"}),
        ):
            error_of(await asked, 403, "forbidden")
        assert (await reader.get(path)).status_code == 200
        assert (await reader.get("/devices/ABC123/commands")).status_code == 200


async def test_a_key_is_required_and_accepted_in_x_api_key(broker: Broker) -> None:
    async with await broker.someone() as client:
        await register(client, "ABC123", type="iotee_device")
        secret = client.headers["Authorization"].removeprefix("Bearer ")
    async with broker.client() as nobody:
        path = "/devices/ABC123/commands"
        error_of(await nobody.get(path), 401, "unauthorized")
        assert (await nobody.get(path, headers={"X-API-Key": secret})).status_code == 200


async def test_another_projects_commands_are_not_found(broker: Broker) -> None:
    async with await broker.someone() as client, await broker.someone("other") as stranger:
        await register(client, "ABC123", type="iotee_device")
        sent = await lock(broker, client)

        for asked in (
            stranger.get(f"/commands/{sent['command_id']}"),
            stranger.get("/devices/ABC123/commands"),
            stranger.post("/devices/ABC123/commands", json={"command": "lock"}),
        ):
            error_of(await asked, 404, "not_found")


async def test_a_deleted_command_is_gone_from_every_read(broker: Broker) -> None:
    async with await broker.someone() as client, await admin(broker) as boss:
        await register(client, "ABC123", type="iotee_device")
        sent = await lock(broker, client)
        command_id = sent["command_id"]
        error_of(await boss.delete(f"/commands/{command_id}"), 409, "conflict")
        broker.says("ABC123", b"ok")
        await state_is(client, command_id, "executed")

        answer = await boss.delete(f"/commands/{command_id}")

        assert (answer.status_code, answer.json()) == (200, {"success": True, "deleted": command_id})
        for path in (
            f"/commands/{command_id}",
            f"/v1/commands/{command_id}",
            f"/v1/commands/{command_id}/events",
            f"/v1/commands/{command_id}/explain",
            f"/v1/devices/ABC123/commands/{command_id}",
        ):
            error_of(await client.get(path), 404, "not_found")
        error_of(await boss.delete(f"/commands/{command_id}"), 404, "not_found")
        error_of(await boss.post(f"/commands/{command_id}/retry"), 404, "not_found")
        assert (await client.get("/v1/commands")).json()["data"] == []
        assert (await boss.get("/commands")).json()["commands"] == []


async def test_a_retry_names_both_commands_and_its_risk(broker: Broker) -> None:
    async with await broker.someone() as client, await admin(broker) as boss:
        await register(client, "ABC123", type="iotee_device")
        failed = await lock(broker, client)
        path = f"/commands/{failed['command_id']}/retry"
        error_of(await boss.post(path), 409, "conflict")
        broker.says("ABC123", b"error")
        await state_is(client, failed["command_id"], "failed")

        answer = await boss.post(path, headers={"Idempotency-Key": "k-1"})
        again = await boss.post(path, headers={"Idempotency-Key": "k-1"})

        assert answer.status_code == again.status_code == 200
        assert "Idempotent-Replayed" not in answer.headers
        assert again.headers["Idempotent-Replayed"] == "true"
        retried = answer.json()
        assert list(retried) == ["success", "original_command_id", "new_command"]
        assert retried["original_command_id"] == failed["command_id"]
        assert retried["new_command"] == {
            "command_id": again.json()["new_command"]["command_id"],
            "status": "pending",
        }
        new = retried["new_command"]["command_id"]
        assert (await client.get(f"/v1/commands/{new}")).json()["retry_of"] == failed["command_id"]

        await state_is(client, new, "published")
        await client.post(f"/v1/commands/{new}/abandon")
        answer = await boss.post(f"/commands/{new}/retry")
        assert answer.json()["new_command"]["may_repeat"] is True


async def test_a_purge_returns_its_cutoff_and_the_number_of_deleted_commands(broker: Broker) -> None:
    async with await broker.someone() as client, await admin(broker) as boss:
        await register(client, "ABC123", type="iotee_device")
        sent = await lock(broker, client)
        broker.says("ABC123", b"ok")
        await state_is(client, sent["command_id"], "executed")

        answer = await boss.post("/commands/purge", json={"older_than_days": 90})

        assert answer.status_code == 200
        purged = answer.json()
        assert list(purged) == ["success", "cutoff_date", "deleted"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT00:00:00\.000Z", purged["cutoff_date"])
        assert purged | {"cutoff_date": ""} == {"success": True, "cutoff_date": "", "deleted": 0}
        assert (await boss.get(f"/commands/{sent['command_id']}")).status_code == 200
        most = await boss.post("/commands/purge", json={"older_than_days": 36_500})
        assert most.json()["cutoff_date"].startswith("19")
        for days in (-1, 36_501, 1.5, "90", None):
            wrong = await boss.post("/commands/purge", json={"older_than_days": days})
            assert error_of(wrong, 400, "invalid_request")["details"]["field"] == "older_than_days"
        error_of(await boss.get("/commands/purge"), 405, "method_not_allowed")
