"""`?wait=`: the answer comes when the command is closed or the time is over; nothing else changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.settings import Limits
from tests.integration.core_support import until
from tests.integration.http.support import Broker, error_of, register, running

PATH = "/v1/devices/lamp-1/commands"
LONG = f"{PATH}?wait=60"
Answer = asyncio.Task[httpx2.Response]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data", Limits(waits_per_project=1)) as broker:
        yield broker


def waiting(client: httpx2.AsyncClient, path: str = LONG, **body: Any) -> Answer:
    return asyncio.create_task(client.post(path, json={"type": "blink"} | body))


async def sent_to(broker: Broker, count: int = 1) -> str:
    """The id of the newest command that the device got."""
    await until(lambda: len(broker.link.sent) == count)
    return str(json.loads(broker.link.sent[-1].payload)["id"])


def says(broker: Broker, command_id: str, status: str) -> None:
    broker.says("lamp-1", json.dumps({"id": command_id, "status": status}).encode())


@pytest.mark.parametrize("status", ["executed", "failed"])
async def test_the_answer_is_the_closed_command(broker: Broker, status: str) -> None:
    client = await broker.someone()
    await register(client)
    broker.online("lamp-1")
    asked = waiting(client)
    command_id = await sent_to(broker)
    says(broker, command_id, "acknowledged")
    says(broker, command_id, status)

    answer = await asked

    assert (answer.status_code, answer.json()["state"]) == (201, status)
    read = (await client.get(f"/v1/commands/{command_id}")).json()
    assert answer.json() | {"grant_token": ""} == read | {"grant_token": ""}
    assert broker.waits.open == 0


async def test_a_timeout_closes_too(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    broker.online("lamp-1")
    asked = waiting(client)
    await client.post(f"/v1/commands/{await sent_to(broker)}/abandon")

    answer = await asked

    assert (answer.status_code, answer.json()["state"]) == (201, "timed_out")
    assert answer.json()["error"]["details"]["reason"] == "operator"


async def test_when_the_time_is_over_the_command_is_shown_as_it_is_and_goes_on(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)

    answer = await client.post(f"{PATH}?wait=1", json={"type": "blink"})

    command = answer.json()
    assert (answer.status_code, command["state"]) == (202, "pending")
    assert (await client.get(f"/v1/commands/{command['id']}")).json()["state"] == "pending"


async def test_a_repeated_request_waits_for_the_first_command(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    first = (await client.post(PATH, json={"type": "blink", "idempotency_key": "k"})).json()
    still_open = await client.post(f"{PATH}?wait=1", json={"type": "blink", "idempotency_key": "k"})
    asked = waiting(client, idempotency_key="k")
    await until(lambda: broker.waits.open == 1)
    await client.delete(f"{PATH}/{first['id']}")

    closed = await asked
    at_once = await waiting(client, idempotency_key="k")

    assert [each.status_code for each in (still_open, closed, at_once)] == [202, 200, 200]
    for answer in (still_open, closed, at_once):
        assert answer.headers["idempotent-replayed"] == "true"
        assert answer.json()["id"] == first["id"]
    assert closed.json()["state"] == at_once.json()["state"] == "cancelled"


async def test_the_brokers_end_and_a_revoked_key_end_a_wait(broker: Broker) -> None:
    key, secret = await broker.core.keys.create("acme", ("devices:read", "devices:write"), None)
    client = broker.client(secret)
    await register(await broker.someone())
    asked = waiting(client)
    await until(lambda: broker.waits.open == 1)
    await broker.core.keys.revoke(key.id)
    assert (await asked).status_code == 202

    client = await broker.someone()
    asked = waiting(client)
    await until(lambda: broker.waits.open == 1)
    broker.waits.close()
    assert (await asked).status_code == 202
    assert (await waiting(client)).status_code == 202  # and none begins


async def test_one_wait_too_many_is_answered_without_waiting(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    asked = waiting(client)
    await until(lambda: broker.waits.open == 1)

    more = await waiting(client)
    metrics = (await client.get("/metrics")).text

    assert (more.status_code, more.json()["state"]) == (202, "pending")
    assert "ordain_waiting_requests 1.0" in metrics
    broker.waits.close()
    await asked


@pytest.mark.parametrize("wait", ["0", "61", "-1", "1.5", "x", ""])
async def test_a_wrong_time_is_named_and_nothing_is_created(broker: Broker, wait: str) -> None:
    client = await broker.someone()
    await register(client)
    for path, body in (
        (PATH, {"type": "blink"}),
        ("/v1/app/command/send", {"name": "blink", "device_ident": ["lamp-1"]}),
    ):
        answer = await client.post(f"{path}?wait={wait}", json=body)
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == "wait"
    assert (await client.get("/v1/commands")).json()["data"] == []


async def test_an_app_waits_for_one_device(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    broker.online("lamp-1")
    path, body = "/v1/app/command/send?wait=60", {"name": "blink", "device_ident": ["lamp-1"]}
    asked = asyncio.create_task(client.post(path, json=body))
    command_id = await sent_to(broker)
    says(broker, command_id, "executed")

    answer = await asked

    outcome = answer.json()["lamp-1"]
    assert (answer.status_code, outcome["sent"], outcome["command_id"]) == (200, True, command_id)
    assert (outcome["command"]["id"], outcome["command"]["state"]) == (command_id, "executed")
    still_open = await client.post("/v1/app/command/send?wait=1", json=body)
    assert (still_open.status_code, still_open.json()["lamp-1"]["command"]["state"]) == (202, "published")
    nobody = await client.post(path, json=body | {"device_ident": ["nobody"]})
    assert nobody.json() == {"nobody": {"sent": False, "error": "Device not found"}}
    two = await client.post(path, json=body | {"device_ident": ["lamp-1", "lamp-2"]})
    assert error_of(two, 400, "invalid_request")["details"]["field"] == "wait"


async def test_an_app_sets_a_ttl_and_a_collapse_key(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)

    async def send(**more: Any) -> dict[str, Any]:
        body = {"name": "blink", "device_ident": ["lamp-1"]} | more
        sent = (await client.post("/v1/app/command/send", json=body)).json()["lamp-1"]
        found: dict[str, Any] = (await client.get(f"/v1/commands/{sent['command_id']}")).json()
        return found

    for_ever, never, short = await send(), await send(ttl_sec=None), await send(ttl_sec=60, collapse_key="k")
    newest = await send(collapse_key="k")

    assert for_ever["expires_at"] is never["expires_at"] is None
    assert short["expires_at"] is not None
    states = [(await client.get(f"/v1/commands/{each['id']}")).json()["state"] for each in (short, newest)]
    assert states == ["cancelled", "pending"]
    for wrong in ({"ttl_sec": 0}, {"ttl_sec": "60"}, {"collapse_key": "a b"}):
        body = {"name": "blink", "device_ident": ["lamp-1"]} | wrong
        error = error_of(await client.post("/v1/app/command/send", json=body), 400, "invalid_request")
        assert error["details"]["field"] in wrong
