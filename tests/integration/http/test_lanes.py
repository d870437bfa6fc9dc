"""Lanes, deleted devices, unmatched answers, and the broker's own state, as HTTP shows them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from broker.http.v1.system import shown_url
from broker.log import sqlite as log
from broker.settings import Limits, Settings
from devices.clock import parse_rfc3339
from tests.integration.core_support import until
from tests.integration.http.support import READ, Broker, error_of, register, running

DEADLINE_SEC = 120


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def get(client: httpx2.AsyncClient, path: str) -> Any:
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def send(client: httpx2.AsyncClient, device: str = "lamp-1", **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/devices/{device}/commands", json={"type": "blink"} | body)
    assert answer.status_code == 201, answer.text
    command: dict[str, Any] = answer.json()
    return command


async def becomes(client: httpx2.AsyncClient, path: str, key: str, value: Any) -> dict[str, Any]:
    """Waits until the command is in this state."""
    async with asyncio.timeout(DEADLINE_SEC):
        while True:
            found: dict[str, Any] = await get(client, path)
            if found[key] == value:
                return found


async def in_flight(broker: Broker, client: httpx2.AsyncClient, hardware_id: str = "lamp-1") -> str:
    broker.online(hardware_id)
    command_id: str = (await send(client, hardware_id))["id"]
    await becomes(client, f"/v1/commands/{command_id}", "state", "published")
    return command_id


# --- lanes


async def test_a_lane_shows_open_commands_in_order_and_what_comes_next(broker: Broker) -> None:
    client, reader = await broker.someone(), await broker.someone(scopes=READ)
    device = await register(client)
    assert await get(reader, "/v1/devices/lamp-1/lane") == {
        "device_id": device["id"],
        "hardware_id": "lamp-1",
        "presence": "never",
        "offline_since": None,
        "open": [],
        "window": 1,
        "in_flight": 0,
        "shut_until": None,
    }
    first = await in_flight(broker, client)
    second = await send(client, type="dim", ttl_sec=None)

    lane = await get(reader, f"/v1/devices/{device['id']}/lane")

    assert (lane["presence"], lane["in_flight"], lane["window"]) == ("online", 1, 1)
    flying, waiting = lane["open"]
    assert (flying["id"], flying["state"], flying["attempts"]) == (first, "published", 1)
    assert flying["next"] == (await get(client, f"/v1/commands/{first}/explain"))["next"]
    assert flying["next"]["action"] == "back_off"
    created = (await get(client, f"/v1/commands/{second['id']}/events"))["data"][0]
    assert waiting == {
        "id": second["id"],
        "type": "dim",
        "state": "pending",
        "position": created["position"],
        "attempts": 0,
        "created_at": second["created_at"],
        "expires_at": None,
        "next": {"action": "hand_over"},
    }


async def test_a_lane_shows_since_when_its_device_is_offline(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    broker.online("lamp-1")
    await becomes(client, "/v1/devices/lamp-1", "presence", "online")
    broker.core.intake.device_offline("lamp-1")

    lane = await becomes(client, "/v1/devices/lamp-1/lane", "presence", "offline")

    device = await get(client, "/v1/devices/lamp-1")
    assert lane["offline_since"] == device["last_seen_at"]


async def test_a_lane_shut_for_a_late_answer_without_id_shows_until_when(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, type="iotee_device")
    broker.online("lamp-1")
    locked = (await send(client, type="lock"))["id"]
    await becomes(client, f"/v1/commands/{locked}", "state", "published")
    await client.post(f"/v1/commands/{locked}/abandon")

    lane = await get(client, "/v1/devices/lamp-1/lane")

    closed = (await get(client, f"/v1/commands/{locked}/events"))["data"][-1]
    assert parse_rfc3339(lane["shut_until"]) == parse_rfc3339(closed["recorded_at"]) + 20_000


async def test_a_lane_of_another_project_is_not_found(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    await register(client)

    for who, device in ((neighbour, "lamp-1"), (client, "nobody")):
        error_of(await who.get(f"/v1/devices/{device}/lane"), 404, "not_found")


# --- changed and deleted devices


async def on_the_wire(broker: Broker, number: int) -> bytes:
    """Waits for the next publish and returns its payload; its event is readable a moment earlier."""
    await until(lambda: len(broker.link.sent) > number)
    return broker.link.sent[number].payload


async def test_a_change_of_type_leaves_open_commands_unchanged(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, type="recorder")
    command = await send(client, type="start_recording")
    await client.patch("/v1/devices/lamp-1", json={"type": "iotee_device"})

    assert (await get(client, f"/v1/commands/{command['id']}"))["params"] == command["params"]
    broker.online("lamp-1")
    await becomes(client, f"/v1/commands/{command['id']}", "state", "published")

    sent = json.loads(await on_the_wire(broker, 0))
    assert (sent["id"], sent["type"]) == (command["id"], "start_recording")
    answer = {"id": command["id"], "status": "executed", "result": {"file": "a"}}
    broker.says("lamp-1", json.dumps(answer).encode())
    await becomes(client, f"/v1/commands/{command['id']}", "state", "executed")
    locked = await send(client, type="lock")
    await becomes(client, f"/v1/commands/{locked['id']}", "state", "published")
    assert await on_the_wire(broker, 1) == b"1"


async def test_a_device_with_an_empty_lane_is_deleted_for_ever(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    device = await register(client)

    gone = (await client.delete("/v1/devices/lamp-1")).json()

    assert gone == {key: value for key, value in device.items() if key != "device_token"} | {
        "deleted_at": gone["deleted_at"],
        "updated_at": gone["deleted_at"],
    }
    for name in ("lamp-1", device["id"]):
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("GET", "/lane"), ("GET", "/commands"), ("POST", "/token"),
        ):  # fmt: skip
            answer = await client.request(method, f"/v1/devices/{name}{path}")
            error_of(answer, 404, "not_found")
        for who in (client, neighbour):
            for names in ({"hardware_id": name}, {"hardware_id": "new", "id": name}):
                error_of(await who.post("/v1/devices", json={"type": "generic"} | names), 409, "conflict")
    assert (await get(client, "/v1/devices"))["data"] == []
    assert await broker.core.registry.authenticate("lamp-1", device["device_token"]) is None


async def test_a_device_with_open_commands_is_deleted_only_with_force(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    reader = await broker.someone(scopes=READ)
    device = await register(client)
    running = await in_flight(broker, client)
    waiting = (await send(client))["id"]

    for query in ("", "?force=false"):
        error = error_of(await client.delete(f"/v1/devices/lamp-1{query}"), 409, "conflict")
        assert error["details"] == {"open_commands": 2}
    error_of(await client.delete("/v1/devices/lamp-1?force=maybe"), 400, "invalid_request")
    error_of(await neighbour.delete("/v1/devices/lamp-1?force=true"), 404, "not_found")
    error_of(await reader.delete("/v1/devices/lamp-1?force=true"), 403, "forbidden")
    gone = await client.delete(f"/v1/devices/{device['id']}?force=true")

    assert gone.json()["deleted_at"] is not None
    timed_out = await get(client, f"/v1/commands/{running}")
    assert (timed_out["state"], timed_out["error"]["details"]) == ("timed_out", {"reason": "device_deleted"})
    assert (await get(client, f"/v1/commands/{waiting}"))["state"] == "cancelled"
    assert len(broker.link.sent) == 1, "nothing was handed over meanwhile"
    explained = await get(client, f"/v1/commands/{running}/explain")
    assert "its device was deleted" in explained["summary"]
    assert "late" not in explained["summary"]


async def test_answers_of_a_deleted_device_are_ignored(broker: Broker) -> None:
    client, admin = await broker.someone(), await broker.someone(scopes=("admin",))
    await register(client)
    running = await in_flight(broker, client)
    await client.delete("/v1/devices/lamp-1?force=true")

    broker.says("lamp-1", json.dumps({"id": running, "status": "executed"}).encode())

    page = await has_rows(admin, "/v1/unmatched", 1)
    assert page["data"][0]["reason"] == "unknown_device"
    assert (await get(client, f"/v1/commands/{running}"))["state"] == "timed_out"


# --- unmatched answers


async def has_rows(client: httpx2.AsyncClient, path: str, count: int) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_SEC):
        while True:
            page: dict[str, Any] = await get(client, path)
            if len(page["data"]) == count:
                return page


async def test_unmatched_answers_are_kept_newest_first_with_their_content(broker: Broker) -> None:
    client = await broker.someone()
    device = await register(client)
    broker.says("lamp-1", b"[")
    broker.says("lamp-1", b"\xff\x00")
    broker.says("lamp-1", b'{"id":"cmd_x","status":"executed"}')

    page = await has_rows(client, "/v1/unmatched", 3)

    unknown, binary, text = page["data"]
    assert unknown == {
        "id": unknown["id"],
        "at": unknown["at"],
        "device_id": device["id"],
        "reason": "unknown",
        "topic": "iotee/dev/lamp-1/ack",
        "command_id": "cmd_x",
        "payload": '{"id":"cmd_x","status":"executed"}',
        "encoding": "utf-8",
    }
    assert (binary["payload"], binary["encoding"], binary["reason"]) == ("/wA=", "base64", "malformed")
    assert (text["payload"], text["encoding"], text["command_id"]) == ("[", "utf-8", None)
    assert unknown["id"] > binary["id"] > text["id"]
    assert (page["has_more"], page["next_cursor"]) == (False, None)


async def test_the_number_of_kept_unmatched_answers_is_a_setting(tmp_path: Path) -> None:
    limits = Limits(unmatched_per_device=2, unmatched_in_all=4)
    async with running(tmp_path / "data", limits) as broker:
        client = await broker.someone()
        for name in ("lamp-1", "lamp-2"):
            await register(client, name)
            for payload in (b"1", b"2", b"3"):
                broker.says(name, payload)
            async with asyncio.timeout(DEADLINE_SEC):
                while (page := await get(client, "/v1/unmatched"))["data"][:1] == [] or (
                    page["data"][0]["topic"], page["data"][0]["payload"]
                ) != (f"iotee/dev/{name}/ack", "3"):  # fmt: skip
                    continue
        assert [row["payload"] for row in page["data"]] == ["3", "2", "3"]


async def test_unmatched_answers_are_filtered_and_paged(broker: Broker) -> None:
    client = await broker.someone()
    device = await register(client)
    await register(client, "lamp-2")
    for payload in (b"1", b"2", b"3"):
        broker.says("lamp-1", payload)
    broker.says("lamp-2", b'{"id":"cmd_x","status":"executed"}')
    await has_rows(client, "/v1/unmatched", 4)

    for query, payloads in (
        ("device=lamp-1", ["3", "2", "1"]),
        (f"device={device['id']}&reason=malformed", ["3", "2", "1"]),
        ("reason=contradiction", []),
        ("device=nobody", []),
    ):
        found = await get(client, f"/v1/unmatched?{query}")
        assert [row["payload"] for row in found["data"]] == payloads, query
    first = await get(client, "/v1/unmatched?device=lamp-1&limit=2")
    broker.says("lamp-1", b"4")
    await has_rows(client, "/v1/unmatched", 5)
    rest = await get(client, f"/v1/unmatched?device=lamp-1&limit=2&cursor={first['next_cursor']}")
    assert [row["payload"] for row in first["data"] + rest["data"]] == ["3", "2", "1"]
    for query, field in (
        (f"cursor={first['next_cursor']}", "cursor"),
        ("reason=bored", "reason"),
        ("limit=101", "limit"),
    ):
        error = error_of(await client.get(f"/v1/unmatched?{query}"), 400, "invalid_request")
        assert error["details"]["field"] == field


async def test_unmatched_answers_without_a_project_are_visible_to_admins_only(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    admin, writer = await broker.someone(scopes=("admin",)), await broker.someone(scopes=("devices:write",))
    await register(client)
    broker.says("lamp-1", b"[")
    broker.says("ghost", b"[")

    page = await has_rows(admin, "/v1/unmatched", 2)

    assert [row["reason"] for row in page["data"]] == ["unknown_device", "malformed"]
    assert page["data"][0]["device_id"] is None
    assert [row["reason"] for row in (await get(client, "/v1/unmatched"))["data"]] == ["malformed"]
    for query in ("", "?device=lamp-1"):
        assert (await get(neighbour, f"/v1/unmatched{query}"))["data"] == []
    error_of(await writer.get("/v1/unmatched"), 403, "forbidden")


# --- the broker itself


async def test_the_system_state_counts_only_what_the_key_may_see(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    admin = await broker.someone(scopes=("admin",))
    await register(client)
    await register(client, "lamp-2")
    await register(neighbour, "lamp-3")
    await client.delete("/v1/devices/lamp-2")
    broker.online("lamp-1")
    await becomes(client, "/v1/devices/lamp-1", "presence", "online")
    await in_flight(broker, client)
    await send(neighbour, "lamp-3")

    seen = await get(client, "/v1/system")

    counts = [
        (found["devices"]["known"], found["devices"]["online"], found["open_commands"])
        for found in (seen, await get(neighbour, "/v1/system"), await get(admin, "/v1/system"))
    ]
    assert counts == [(1, 1, 1), (1, 0, 1), (2, 1, 2)]
    assert seen["log_id"] == broker.core.log_id
    assert seen["mqtt"] == {
        "kind": "embedded",
        "up": True,
        "url": "mqtt://127.0.0.1:1883",
        "listener": None,
        "rules": None,
        "users": "none",
    }
    assert seen["not_ready"] == []
    assert seen["uptime_sec"] >= 0
    assert seen["started_at"] <= seen["clock"]["now"]
    assert seen["clock"]["step_ms"] < 1_000
    assert seen["settings"]["limits"]["queue_per_name"] == 100
    assert seen["position"] == (await broker.core.storage.read(log.head)).position


def test_the_mqtt_servers_address_is_shown_without_its_user() -> None:
    assert shown_url(Settings(mqtt_url="mqtts://ordain:secret@example.org?v=5")) == "mqtts://example.org:8883"


async def test_answers_match_the_openapi_description(broker: Broker) -> None:
    client = await broker.someone()
    description = await get(client, "/openapi.json")
    await register(client)
    await in_flight(broker, client)
    broker.says("lamp-1", b"[")
    await has_rows(client, "/v1/unmatched", 1)

    for method, path, where in (
        ("GET", "/v1/devices/{device}/lane", "/v1/devices/lamp-1/lane"),
        ("GET", "/v1/unmatched", "/v1/unmatched"),
        ("GET", "/v1/system", "/v1/system"),
        ("DELETE", "/v1/devices/{device}", "/v1/devices/lamp-1"),
        ("DELETE", "/v1/devices/{device}", "/v1/devices/lamp-1?force=true"),
        ("DELETE", "/v1/devices/{device}", "/v1/devices/lamp-1"),
    ):
        answer = await client.request(method, where)
        content = description["paths"][path][method.lower()]["responses"][str(answer.status_code)]["content"]
        schema = content["application/json"]["schema"] | {"components": description["components"]}
        jsonschema_rs.validator_for(schema).validate(answer.json())
