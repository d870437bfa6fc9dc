"""Devices over HTTP: registering, changing, listing, and their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.domain.lanes import Presence
from broker.seams import Batch, Placed, Sql
from devices.types import shipped_types
from tests.integration.http.support import Broker, error_of, register, running
from tests.integration.http.test_commands import DEADLINE_SEC


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def test_a_device_is_registered_and_its_token_shown_once(broker: Broker) -> None:
    client = await broker.someone()

    device = await register(client, "lamp-1", name="Hall", attributes={"floor": 2})

    assert device["id"].startswith("dev_")
    assert device["device_token"].startswith("dtok_")
    assert await broker.core.registry.authenticate("lamp-1", device["device_token"]) is not None
    shown = {key: value for key, value in device.items() if key != "device_token"}
    assert (shown["name"], shown["attributes"], shown["type"]) == ("Hall", {"floor": 2}, "generic")
    assert (shown["project"], shown["presence"], shown["last_seen_at"]) == ("acme", "never", None)
    for name in ("lamp-1", device["id"]):
        assert (await client.get(f"/v1/devices/{name}")).json() == shown
    assert (await client.get("/v1/devices")).json() == {
        "data": [shown], "has_more": False, "next_cursor": None,
    }  # fmt: skip


async def test_a_name_is_taken_as_device_id_and_as_hardware_id(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    await register(client, "lamp-1", id="hall")

    for who in (client, neighbour):
        for names in (
            {"hardware_id": "lamp-1"},
            {"hardware_id": "hall"},
            {"hardware_id": "x", "id": "lamp-1"},
        ):
            answer = await who.post("/v1/devices", json={"type": "generic"} | names)
            error_of(answer, 409, "conflict")


async def test_a_wrong_field_of_a_device_is_named(broker: Broker) -> None:
    client = await broker.someone()
    deep: Any = {}
    for _ in range(17):
        deep = {"a": deep}
    for wrong, field in (
        ({"hardware_id": "a/b"}, "hardware_id"),
        ({"hardware_id": "me"}, "hardware_id"),
        ({"hardware_id": "x" * 65}, "hardware_id"),
        ({"hardware_id": 5}, "hardware_id"),
        ({"id": ""}, "id"),
        ({"id": "pending"}, "id"),
        ({"type": "toaster"}, "type"),
        ({"name": "x" * 201}, "name"),
        ({"attributes": []}, "attributes"),
        ({"attributes": deep}, "attributes"),
        ({"colour": "red"}, "colour"),
        ({"project": "other"}, "project"),
    ):
        answer = await client.post("/v1/devices", json={"hardware_id": "lamp-1", "type": "generic"} | wrong)
        error = error_of(answer, 400, "invalid_request")
        assert error["details"]["field"] == field, (wrong, error)
    assert (await client.get("/v1/devices")).json()["data"] == []


async def test_a_change_sets_only_the_named_fields(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, name="Hall", attributes={"floor": 2})

    first = await client.patch("/v1/devices/lamp-1", json={"name": None})
    second = await client.patch("/v1/devices/lamp-1", json={"type": "recorder", "attributes": {"room": 1}})
    nothing = await client.patch("/v1/devices/lamp-1", json={})

    assert (first.json()["name"], first.json()["attributes"]) == (None, {"floor": 2})
    assert (second.json()["type"], second.json()["attributes"]) == ("recorder", {"room": 1})
    assert nothing.json() == second.json()
    for wrong in (
        {"type": None},
        {"hardware_id": "x"},
        {"type": "toaster"},
        {"attributes": None},
        {"name": 1},
    ):
        error = error_of(await client.patch("/v1/devices/lamp-1", json=wrong), 400, "invalid_request")
        assert error["details"]["field"] == next(iter(wrong))


async def test_a_new_token_replaces_the_old_one(broker: Broker) -> None:
    client = await broker.someone()
    old = (await register(client))["device_token"]

    answer = await client.post("/v1/devices/lamp-1/token")

    assert answer.status_code == 201
    registry = broker.core.registry
    assert await registry.authenticate("lamp-1", answer.json()["device_token"]) is not None
    assert await registry.authenticate("lamp-1", old) is None


async def test_devices_are_listed_newest_first_in_pages(broker: Broker) -> None:
    client = await broker.someone()
    for number in range(5):
        await register(client, f"lamp-{number}")

    seen, query = [], {"limit": "2"}
    while True:
        page = (await client.get("/v1/devices", params=query)).json()
        seen += [device["hardware_id"] for device in page["data"]]
        if not page["has_more"]:
            break
        query["cursor"] = page["next_cursor"]
        await register(client, f"late-{len(seen)}")

    assert seen == [f"lamp-{number}" for number in range(4, -1, -1)]


async def test_a_huge_number_in_attributes_is_returned_unchanged(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, attributes={"serial": 10**30})
    assert (await client.get("/v1/devices/lamp-1")).json()["attributes"] == {"serial": 10**30}


async def test_a_device_is_shown_online_when_its_first_presence_is_durable(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await broker.someone()
    device = await register(client)
    storage, gate = broker.core.storage, asyncio.Event()
    append = storage.append

    async def held(batch: Batch) -> Placed:
        await gate.wait()
        return await append(batch)

    async def shown() -> tuple[str, str, int]:
        one, page = await client.get("/v1/devices/lamp-1"), await client.get("/v1/devices")
        counted = (await client.get("/v1/system")).json()["devices"]["online"]
        return one.json()["presence"], page.json()["data"][0]["presence"], counted

    monkeypatch.setattr(storage, "append", held)
    broker.online("lamp-1")
    async with asyncio.timeout(DEADLINE_SEC):
        while broker.core.live.presence.get(device["id"]) is not Presence.ONLINE:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    try:
        assert await shown() == ("never", "never", 0)
    finally:
        gate.set()
    await broker.core.writer.barrier()
    assert await shown() == ("online", "online", 1)


async def test_a_device_that_connects_is_shown_online(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})

    broker.online("lamp-1")
    async with asyncio.timeout(DEADLINE_SEC):
        while (await client.get(f"/v1/commands/{command.json()['id']}")).json()["state"] == "pending":
            pass

    device = (await client.get("/v1/devices/lamp-1")).json()
    assert device["presence"] == "online"
    assert device["last_seen_at"] is not None


async def test_the_device_types_are_described_with_their_parameters(broker: Broker) -> None:
    client = await broker.someone()

    page = (await client.get("/v1/types")).json()

    assert [kind["name"] for kind in page["data"]] == sorted(shipped_types())
    known = {kind["name"]: kind["commands"] for kind in page["data"]}
    recorder = {command["name"]: command for command in known["recorder"]}
    assert recorder["start_recording"]["params"]["properties"]["max_duration_sec"]["maximum"] == 86_400
    assert (page["has_more"], page["next_cursor"]) == (False, None)


async def test_the_commands_of_a_deleted_device_are_the_same_on_every_route(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    await register(client)
    command = (await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})).json()
    path = f"/v1/devices/lamp-1/commands/{command['id']}"
    await client.delete(path)
    await client.delete("/v1/devices/lamp-1")

    assert (await client.get(path)).json() == (await client.get(f"/v1/commands/{command['id']}")).json()
    assert (await client.delete(path)).json()["state"] == "cancelled"
    error_of(await client.post(f"{path}/retry"), 409, "device_deleted")
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/retry")):
        error_of(await neighbour.request(method, where), 404, "not_found")


@dataclass
class Counting:
    """A connection that records its SQL statements."""

    sql: Sql
    statements: list[str]

    async def all(self, text: str, values: Sequence[Any] = (), /) -> list[Any]:
        self.statements.append(text)
        return await self.sql.all(text, values)

    async def one(self, text: str, values: Sequence[Any] = (), /) -> Any:
        self.statements.append(text)
        return await self.sql.one(text, values)

    def each(self, text: str, values: Sequence[Any] = (), /) -> AsyncIterator[Any]:
        self.statements.append(text)
        return self.sql.each(text, values)

    async def form(self) -> str | None:
        return await self.sql.form()


async def test_a_device_of_another_project_costs_the_same_statements_as_a_missing_one(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    await register(client)
    read = broker.core.storage.read
    statements: list[str] = []

    async def counting(work: Callable[[Sql], Awaitable[Any]]) -> Any:
        return await read(lambda sql: work(Counting(sql, statements)))

    monkeypatch.setattr(broker.core.storage, "read", counting)
    for path in ("/v1/commands", "/v1/unmatched"):
        asked = []
        for device in ("lamp-1", "nobody"):
            statements.clear()
            assert (await neighbour.get(path, params={"device": device})).json()["data"] == []
            asked.append(list(statements))
        assert asked[0] == asked[1] != []


async def test_attributes_are_bounded_in_a_registration_and_in_a_change(broker: Broker) -> None:
    client = await broker.someone()
    most = {"x": "y" * (4_096 - len('{"x":""}'))}
    over = {"x": most["x"] + "y"}
    body = {"hardware_id": "lamp-1", "type": "generic"}

    error_of(await client.post("/v1/devices", json=body | {"attributes": over}), 413, "too_large")
    assert (await client.get("/v1/devices/lamp-1")).status_code == 404
    await register(client, "lamp-1", attributes=most)
    error_of(await client.patch("/v1/devices/lamp-1", json={"attributes": over}), 413, "too_large")
    assert (await client.get("/v1/devices/lamp-1")).json()["attributes"] == most
