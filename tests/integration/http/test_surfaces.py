"""A command sent through one API is visible in all of them, in each API's own words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from broker.http.compat import app_command, iotee
from broker.http.schema.openapi import document
from broker.http.v1 import views
from devices.clock import parse_rfc3339
from scripts import vocabulary
from tests.integration.core_support import ManualClock
from tests.integration.http.support import Broker, register, running
from tests.integration.http.test_app_command import history, sent
from tests.integration.http.test_commands import send, state_is
from tests.integration.http.test_fanout import fan_out

Send = Callable[[httpx2.AsyncClient], Awaitable[str]]
PARAMS = {"for_sec": 5}


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def natively(client: httpx2.AsyncClient) -> str:
    return str((await send(client, type="unlock", params=PARAMS))["id"])


async def to_many(client: httpx2.AsyncClient) -> str:
    return str((await fan_out(client, ["lamp-1"], type="unlock", params=PARAMS))["lamp-1"]["command_id"])


async def unversioned(client: httpx2.AsyncClient) -> str:
    answer = await client.post("/devices/lamp-1/commands", json={"command": "unlock", "params": PARAMS})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["command_id"])


async def from_an_app(client: httpx2.AsyncClient) -> str:
    return str((await sent(client, "lamp-1", name="unlock", data=PARAMS))["lamp-1"]["command_id"])


WAYS = (natively, to_many, unversioned, from_an_app)


async def seen(client: httpx2.AsyncClient, command_id: str) -> tuple[dict[str, Any], ...]:
    """The command as /v1, the unversioned paths and the app's history show it, alone and in lists."""
    one = (await client.get(f"/v1/commands/{command_id}")).json()
    listed = (await client.get("/v1/devices/lamp-1/commands")).json()["data"]
    old = (await client.get(f"/commands/{command_id}")).json()
    olds = (await client.get("/devices/lamp-1/commands")).json()["commands"]
    (record,) = [
        record
        for record in (await history(client, "lamp-1", name="unlock"))["lamp-1"]
        if record["command_id"] == command_id
    ]
    grants = {"grant_token": ""}
    assert [each | grants for each in listed if each["id"] == command_id] == [one | grants]
    assert [each for each in olds if each["command_id"] == command_id] == [old]
    return one, old, record


@pytest.mark.parametrize("way", WAYS)
async def test_a_command_sent_by_any_api_is_the_same_in_all(broker: Broker, way: Send) -> None:
    client = await broker.someone()
    device = await register(client)

    one, old, record = await seen(client, await way(client))

    assert one["device_id"] == old["device_id"] == device["id"]
    assert one["hardware_id"] == old["hardware_id"] == "lamp-1"
    assert one["type"] == old["command"] == "unlock"
    assert one["params"] == old["params"] == record["value"] == PARAMS
    assert one["created_at"] == old["created_at"]
    assert parse_rfc3339(one["created_at"]) == record["timestamp"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_command_sent_by_any_api_is_explained_and_cancelled(broker: Broker, way: Send) -> None:
    client = await broker.someone()
    await register(client)
    command_id = await way(client)

    explained = (await client.get(f"/v1/commands/{command_id}/explain")).json()
    answer = await client.delete(f"/v1/devices/lamp-1/commands/{command_id}")

    assert (explained["command_id"], explained["state"]) == (command_id, "pending")
    assert answer.status_code == 200
    assert [view["status"] for view in await seen(client, command_id)] == ["cancelled"] * 3


@pytest.mark.parametrize("way", WAYS)
async def test_each_api_shows_a_commands_life_in_its_own_words(broker: Broker, way: Send) -> None:
    client = await broker.someone()
    await register(client)
    command_id = await way(client)
    told = [[view["status"] for view in await seen(client, command_id)]]

    broker.online("lamp-1")
    for state, status in (("published", None), ("acknowledged", "acknowledged"), ("executed", "executed")):
        if status is not None:
            broker.says("lamp-1", json.dumps({"id": command_id, "status": status}).encode())
        await state_is(client, command_id, state)
        told.append([view["status"] for view in await seen(client, command_id)])

    assert told == [
        ["pending", "pending", "pending"],
        ["pending", "published", "pending"],
        ["delivered", "acknowledged", "delivered"],
        ["executed", "completed", "executed"],
    ]
    one, old, _ = await seen(client, command_id)
    assert (one["published_at"], one["executed_at"]) == (old["published_at"], old["completed_at"])
    assert one["delivered_at"] == old["acknowledged_at"]


async def test_each_api_shows_failures_in_its_own_words(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path / "data", clock=clock) as broker:
        client = await broker.someone()
        await register(client)
        expired = (await send(client, type="unlock", ttl_sec=1))["id"]
        clock.pass_ms(2_000)
        broker.core.deadlines.look_again()
        await state_is(client, expired, "expired")
        failed, abandoned = [await natively(client) for _ in range(2)]
        broker.online("lamp-1")
        await state_is(client, failed, "published")
        broker.says("lamp-1", json.dumps({"id": failed, "status": "failed", "error": "jammed"}).encode())
        await state_is(client, abandoned, "published")
        await client.post(f"/v1/commands/{abandoned}/abandon")

        told = {
            state: [view["status"] for view in await seen(client, command_id)]
            for state, command_id in (("expired", expired), ("failed", failed), ("timed_out", abandoned))
        }

        assert told == {
            "expired": ["expired", "expired", "expired"],
            "failed": ["failed", "failed", "failed"],
            "timed_out": ["failed", "timeout", "failed"],
        }
        one, old, _ = await seen(client, failed)
        assert one["error"] == old["error"]


# --- the comparison page ---------------------------------------------------------------------------


def named(column: int) -> list[str]:
    return [name for row in vocabulary.FIELDS for name in row[column].split(", ") if name]


def test_the_page_lists_exactly_the_existing_fields() -> None:
    def of(*kinds: type[msgspec.Struct]) -> set[str]:
        return {field for kind in kinds for field in kind.__struct_fields__}

    assert sorted(named(1)) == sorted(of(views.Command))
    assert sorted(named(2)) == sorted(of(iotee.CommandRecord))
    app = of(app_command.SendBody, app_command.HistoryRecord)
    assert sorted(named(3)) == sorted(app - {"device_ident", "idempotency_key"})


def test_the_page_names_only_existing_calls_and_all_words_of_the_smaller_apis() -> None:
    paths = json.loads(document())["paths"]
    there = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    columns = [{name for name in column if name} for column in list(zip(*vocabulary.CALLS, strict=True))[1:]]

    for column in columns:
        assert column <= there
    assert columns[1] == {
        call for call in there if call.partition(" ")[2].startswith(("/commands", "/devices"))
    }
    assert columns[2] == {call for call in there if "/v1/app/" in call}


async def test_an_erased_command_is_gone_from_all_apis_and_its_key_creates_nothing(broker: Broker) -> None:
    client, admin = await broker.someone(), await broker.someone(scopes=("admin",))
    await register(client)
    many = await fan_out(client, ["lamp-1"], type="unlock", idempotency_key="k")
    app = await sent(client, "lamp-1", name="unlock", idempotency_key="l")
    kept = await natively(client)
    for outcome in (many["lamp-1"], app["lamp-1"]):
        assert (await admin.delete(f"/commands/{outcome['command_id']}")).status_code == 200

    assert [each["command_id"] for each in (await history(client, "lamp-1", name="unlock"))["lamp-1"]] == [
        kept
    ]
    again = await fan_out(client, ["lamp-1"], type="unlock", idempotency_key="k")
    assert again["lamp-1"]["error"]["code"] == "gone"
    assert await sent(client, "lamp-1", name="unlock", idempotency_key="l") == {
        "lamp-1": {"sent": False, "error": "Command was erased"}
    }
