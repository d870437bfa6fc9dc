"""Retrying, cancelling many and explaining over HTTP, and explaining on the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from broker.cli.main import run
from broker.engine import repairs
from tests.integration.http.support import READ, WRITE, Broker, error_of, register, running
from tests.integration.http.test_commands import DEADLINE_SEC, state_is

BLINK = "/v1/devices/lamp-1/commands"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def send(client: httpx2.AsyncClient, device: str = "lamp-1", **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/devices/{device}/commands", json={"type": "blink"} | body)
    assert answer.status_code == 201, answer.text
    command: dict[str, Any] = answer.json()
    return command


async def handed_over(broker: Broker, client: httpx2.AsyncClient, **body: Any) -> str:
    """A command that was handed over and has no answer yet."""
    broker.online("lamp-1")
    command = await send(client, **body)
    await state_is(client, command["id"], "published")
    return str(command["id"])


async def abandoned(broker: Broker, client: httpx2.AsyncClient, **body: Any) -> str:
    command_id = await handed_over(broker, client, **body)
    assert (await client.post(f"/v1/commands/{command_id}/abandon")).json()["state"] == "timed_out"
    return command_id


async def cancelled(broker: Broker, client: httpx2.AsyncClient, **body: Any) -> str:
    command = await send(client, **body)
    assert (await client.delete(f"{BLINK}/{command['id']}")).status_code == 200
    return str(command["id"])


async def failed(broker: Broker, client: httpx2.AsyncClient, **body: Any) -> str:
    command_id = await handed_over(broker, client, **body)
    broker.says("lamp-1", json.dumps({"id": command_id, "status": "failed"}).encode())
    await state_is(client, command_id, "failed")
    return command_id


async def expired(broker: Broker, client: httpx2.AsyncClient, **body: Any) -> str:
    command = await send(client, ttl_sec=1, **body)
    await state_is(client, command["id"], "expired")
    return str(command["id"])


# --- retry


@pytest.mark.parametrize(
    ("ended", "may_repeat"), [(abandoned, True), (failed, False), (cancelled, False), (expired, False)]
)
async def test_a_command_that_ended_without_success_is_retried(
    broker: Broker, ended: Callable[..., Any], may_repeat: bool
) -> None:
    client = await broker.someone()
    await register(client)
    params = {"colour": "red"}
    old = await ended(broker, client, params=params)

    for path in (f"{BLINK}/{old}/retry", f"/v1/commands/{old}/retry"):
        answer = await client.post(path)

        assert answer.status_code == 201, answer.text
        new = answer.json()
        assert new["id"] != old
        assert (new["retry_of"], new["may_repeat"]) == (old, may_repeat)
        assert (new["status"], new["type"], new["params"]) == ("pending", "blink", params)
        assert new["grant_token"] is not None
    events = (await client.get(f"/v1/commands/{new['id']}/events")).json()["data"]
    assert events[0]["data"]["retry_of"] == old


async def test_a_retry_has_the_ttl_of_the_old_command(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    forever = await cancelled(broker, client, ttl_sec=None)
    hour = await cancelled(broker, client, ttl_sec=3_600)

    endless = (await client.post(f"/v1/commands/{forever}/retry")).json()
    limited = (await client.post(f"/v1/commands/{hour}/retry")).json()

    assert endless["expires_at"] is None
    events = (await client.get(f"/v1/commands/{limited['id']}/events")).json()["data"]
    assert events[0]["data"]["ttl_ms"] == 3_600_000


async def test_a_repeated_retry_returns_the_first_new_command(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    old = await abandoned(broker, client)
    first = await client.post(f"{BLINK}/{old}/retry", headers={"Idempotency-Key": "k"})
    broker.says("lamp-1", json.dumps({"id": old, "status": "executed"}).encode())
    await state_is(client, old, "executed")

    # The old command was executed after all; a repeated request still gets the first answer.
    for again in (
        await client.post(f"{BLINK}/{old}/retry", json={"idempotency_key": "k"}),
        await client.post(f"/v1/commands/{old}/retry", headers={"Idempotency-Key": "k"}),
    ):
        assert again.status_code == 200, again.text
        assert again.headers["idempotent-replayed"] == "true"
        assert (again.json()["id"], again.json()["may_repeat"]) == (first.json()["id"], True)
    error_of(await client.post(f"{BLINK}/{old}/retry"), 409, "conflict")
    other = await cancelled(broker, client)
    key = {"idempotency_key": "k"}
    error_of(await client.post(f"{BLINK}/{other}/retry", json=key), 409, "idempotency_conflict")
    error_of(await client.post(BLINK, json=key | {"type": "blink"}), 409, "idempotency_conflict")
    two = await client.post(f"{BLINK}/{old}/retry", json=key, headers={"Idempotency-Key": "other"})
    assert error_of(two, 400, "invalid_request")["details"]["field"] == "idempotency_key"


async def test_an_open_or_executed_command_is_not_retried(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    pending = (await send(client))["id"]

    error = error_of(await client.post(f"{BLINK}/{pending}/retry"), 409, "conflict")

    assert error["details"] == {"state": "pending"}
    await client.delete(f"{BLINK}/{pending}")
    running = await handed_over(broker, client)
    for state in ("published", "acknowledged", "executed"):
        if state != "published":
            broker.says("lamp-1", json.dumps({"id": running, "status": state}).encode())
        await state_is(client, running, state)
        error = error_of(await client.post(f"/v1/commands/{running}/retry"), 409, "conflict")
        assert error["details"] == {"state": state}


async def test_a_command_of_a_deleted_device_is_not_retried(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    old = await cancelled(broker, client)
    await client.delete("/v1/devices/lamp-1")

    for path in (f"{BLINK}/{old}/retry", f"/v1/commands/{old}/retry"):
        error_of(await client.post(path), 409, "device_deleted")


async def test_a_retry_of_another_project_or_device_is_not_found(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    reader = await broker.someone(scopes=READ)
    await register(client)
    await register(client, "lamp-2")
    old = await cancelled(broker, client)

    for who, path in (
        (neighbour, f"/v1/commands/{old}/retry"),
        (neighbour, f"{BLINK}/{old}/retry"),
        (client, f"/v1/devices/lamp-2/commands/{old}/retry"),
        (client, f"/v1/devices/nobody/commands/{old}/retry"),
        (client, "/v1/commands/cmd_none/retry"),
    ):
        error_of(await who.post(path), 404, "not_found")
    error_of(await reader.post(f"/v1/commands/{old}/retry"), 403, "forbidden")
    wrong = await client.post(f"/v1/commands/{old}/retry", json={"ttl_sec": 5})
    assert error_of(wrong, 400, "invalid_request")["details"]["field"] == "ttl_sec"


# --- cancelling many


async def cancel(client: httpx2.AsyncClient, **which: Any) -> list[str]:
    answer = await client.post("/v1/commands/cancel", json=which)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {"cancelled", "count"}
    assert body["count"] == len(body["cancelled"])
    found: list[str] = body["cancelled"]
    return found


async def test_only_matching_pending_commands_are_cancelled(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    thief, secret = await broker.core.keys.create("acme", WRITE, "stolen")
    await register(client)
    await register(client, "lamp-2")
    await register(neighbour, "lamp-3")
    running = await handed_over(broker, client)
    first = (await send(client))["id"]
    dim = (await send(client, type="dim"))["id"]
    stolen = (await send(broker.client(secret), "lamp-2"))["id"]
    foreign = (await send(neighbour, "lamp-3"))["id"]

    assert await cancel(client, created_by=thief.id, reason="stolen key") == [stolen]
    assert await cancel(client, device="lamp-1", type="blink") == [first]
    assert await cancel(client, type="blink") == []
    assert await cancel(client, all=True) == [dim]

    for command_id, state in ((running, "published"), (foreign, "pending")):
        who = neighbour if command_id == foreign else client
        assert (await who.get(f"/v1/commands/{command_id}")).json()["state"] == state
    last = (await client.get(f"/v1/commands/{stolen}/events")).json()["data"][-1]
    assert (last["type"], last["data"]["reason"]) == ("cancelled", "stolen key")


async def test_cancelling_everything_needs_all_true(broker: Broker) -> None:
    client, reader = await broker.someone(), await broker.someone(scopes=READ)
    await register(client)
    await send(client)

    for body, field in (
        ({}, "all"),
        ({"reason": "because"}, "all"),
        ({"all": False}, "all"),
        ({"all": True, "type": "blink"}, "all"),
        ({"type": "a/b"}, "type"),
        ({"state": "pending"}, "state"),
        ({"type": "blink", "reason": "x" * 201}, "reason"),
    ):
        answer = await client.post("/v1/commands/cancel", json=body)
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == field, body
    error_of(await client.post("/v1/commands/cancel", json={"device": "nobody"}), 404, "not_found")
    error_of(await reader.post("/v1/commands/cancel", json={"all": True}), 403, "forbidden")
    assert len((await client.get("/v1/commands?state=pending")).json()["data"]) == 1


async def test_more_commands_than_one_batch_are_cancelled_in_order_of_creation(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "BATCH", 3)
    client = await broker.someone()
    made = []
    for device in ("lamp-1", "lamp-2"):
        await register(client, device)
        made += [(await send(client, device))["id"] for _ in range(4)]

    assert await cancel(client, type="blink") == made


# --- explain


async def test_an_explanation_has_the_form_of_the_contract(broker: Broker) -> None:
    client, reader = await broker.someone(), await broker.someone(scopes=READ)
    await register(client)
    command = await send(client)

    found = (await reader.get(f"/v1/commands/{command['id']}/explain")).json()

    assert list(found) == ["command_id", "state", "summary", "reasons", "next"]
    assert (found["command_id"], found["state"]) == (command["id"], "pending")
    assert [reason["code"] for reason in found["reasons"]] == ["never_heard", "link_down"]
    assert found["next"] == {"action": "expire", "at": command["expires_at"]}
    neighbour = await broker.someone("other")
    for who, command_id in ((neighbour, command["id"]), (client, "cmd_none")):
        error_of(await who.get(f"/v1/commands/{command_id}/explain"), 404, "not_found")


async def test_an_explanation_follows_a_command_to_its_end(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command_id = await handed_over(broker, client)
    queued = (await send(client))["id"]

    async def codes(command_id: str) -> list[str]:
        found = (await client.get(f"/v1/commands/{command_id}/explain")).json()
        return [reason["code"] for reason in found["reasons"]]

    assert await codes(command_id) == ["no_answer", "attempt_open"]
    assert await codes(queued) == ["window_full"]
    for status, state in (("acknowledged", "running"), ("executed", "executed")):
        broker.says("lamp-1", json.dumps({"id": command_id, "status": status}).encode())
        await state_is(client, command_id, status)
        assert await codes(command_id) == [state]
    broker.says("lamp-1", json.dumps({"id": command_id, "status": "failed"}).encode())
    async with asyncio.timeout(DEADLINE_SEC):
        while await codes(command_id) != ["executed", "contradiction"]:
            pass
    found = (await client.get(f"/v1/commands/{command_id}/explain")).json()
    assert "But the device has also reported a different outcome" in found["summary"]


async def test_a_device_heard_before_the_start_is_offline_and_not_never_heard(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as broker:
        client = await broker.someone()
        await register(client)
        broker.online("lamp-1")
        async with asyncio.timeout(DEADLINE_SEC):
            while (await client.get("/v1/devices/lamp-1")).json()["presence"] != "online":
                pass
        broker.core.intake.device_offline("lamp-1")
        async with asyncio.timeout(DEADLINE_SEC):
            while (await client.get("/v1/devices/lamp-1")).json()["presence"] != "offline":
                pass
        await broker.core.writer.barrier()
        device = (await client.get("/v1/devices/lamp-1")).json()
    async with running(tmp_path / "data") as broker:
        client = await broker.someone()
        command = await send(client)

        found = (await client.get(f"/v1/commands/{command['id']}/explain")).json()

        reason = {"code": "offline", "since": device["last_seen_at"]}
        assert found["reasons"][0].items() >= reason.items()
        assert (await client.get("/v1/devices/lamp-1")).json()["presence"] == "offline"


def test_the_command_line_explains_in_a_sentence_or_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ordain(*arguments: str) -> tuple[int, str, str]:
        code = run([*arguments, "--data", str(tmp_path / "data")])
        printed = capsys.readouterr()
        return code, printed.out.strip(), printed.err.strip()

    assert ordain("devices", "add", "lamp-1", "--type", "generic")[0] == 0
    command_id = ordain("send", "lamp-1", "blink")[1]

    code, text, note = ordain("explain", command_id)

    assert code == 0
    assert text.startswith("Not handed over yet: the device has not been heard")
    assert note == "ordain: no broker serves this log; the command waits until one does"
    code, whole, _ = ordain("explain", command_id, "--json")
    assert code == 0
    assert json.loads(whole).keys() == {"command_id", "state", "summary", "reasons", "next"}
    assert json.loads(whole)["summary"] == text
    code, text, note = ordain("explain", "cmd_none?")
    assert (code, text) == (1, "")
    assert note == "ordain: command_id: must match [A-Za-z0-9][A-Za-z0-9_-]{0,63} (got 'cmd_none?')"


async def test_answers_match_the_openapi_description(broker: Broker) -> None:
    client = await broker.someone()
    description = (await client.get("/openapi.json")).json()
    await register(client)
    old = await cancelled(broker, client)
    key = {"idempotency_key": "k"}

    for method, path, where, body in (
        ("POST", "/v1/commands/{command_id}/retry", f"/v1/commands/{old}/retry", None),
        ("POST", "/v1/devices/{device}/commands/{command_id}/retry", f"{BLINK}/{old}/retry", key),
        ("POST", "/v1/devices/{device}/commands/{command_id}/retry", f"{BLINK}/{old}/retry", key),
        ("GET", "/v1/commands/{command_id}/explain", f"/v1/commands/{old}/explain", None),
        ("POST", "/v1/commands/cancel", "/v1/commands/cancel", {"all": True}),
        ("POST", "/v1/commands/cancel", "/v1/commands/cancel", {}),
    ):
        answer = await (
            client.request(method, where, json=body) if body is not None else client.request(method, where)
        )
        content = description["paths"][path][method.lower()]["responses"][str(answer.status_code)]["content"]
        schema = content["application/json"]["schema"] | {"components": description["components"]}
        jsonschema_rs.validator_for(schema).validate(answer.json())
