"""Commands over HTTP: sending, reading, listing, cancelling, abandoning, and repeated requests."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest

from broker.settings import Limits
from tests.integration.http.support import READ, Broker, error_of, register, running

DEADLINE_SEC, LOOK_AGAIN_SEC = 120, 0.005
BOTA = [
    "id", "device_id", "type", "status", "params", "grant_token", "result", "error", "expires_at",
    "delivered_at", "executed_at", "created_at",
]  # fmt: skip
OURS = ["hardware_id", "state", "published_at", "attempts", "retry_of"]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def send(client: httpx2.AsyncClient, device: str = "lamp-1", **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/devices/{device}/commands", json={"type": "blink"} | body)
    assert answer.status_code == 201, answer.text
    command: dict[str, Any] = answer.json()
    return command


async def state_is(client: httpx2.AsyncClient, command_id: str, *states: str) -> dict[str, Any]:
    """Waits until the command is in this state."""
    async with asyncio.timeout(DEADLINE_SEC):
        while True:
            command: dict[str, Any] = (await client.get(f"/v1/commands/{command_id}")).json()
            if command["state"] in states:
                return command
            await asyncio.sleep(LOOK_AGAIN_SEC)


async def ids(client: httpx2.AsyncClient, path: str, **query: Any) -> list[str]:
    """Every id of a list, read page by page."""
    found: list[str] = []
    cursor = None
    while True:
        page = (await client.get(path, params=query | ({"cursor": cursor} if cursor else {}))).json()
        found += [item["id"] for item in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if (cursor := page["next_cursor"]) is None:
            return found


async def test_a_command_is_shown_with_every_field_of_the_contract(broker: Broker) -> None:
    client = await broker.someone()
    device = await register(client, "rec-1", type="recorder")

    command = await send(client, "rec-1", type="start_recording", params={"metadata": {"a": "é"}})

    assert sorted(command) == sorted(BOTA + OURS)
    assert command["id"].startswith("cmd_")
    assert (command["device_id"], command["hardware_id"]) == (device["id"], "rec-1")
    assert (command["status"], command["state"], command["attempts"]) == ("pending", "pending", 0)
    assert command["params"] == {
        "max_duration_sec": 3600, "upload_immediately": True, "metadata": {"a": "é"},
    }  # fmt: skip
    for at in ("created_at", "expires_at"):
        assert command[at][10] == "T"
        assert command[at][-5] == "."
        assert command[at].endswith("Z")
    assert (await client.get(f"/v1/commands/{command['id']}")).json()["params"] == command["params"]


async def test_an_absent_ttl_is_five_minutes_and_null_means_no_expiry(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)

    absent, never = await send(client), await send(client, ttl_sec=None)

    assert never["expires_at"] is None
    events = (await client.get(f"/v1/commands/{absent['id']}/events")).json()["data"]
    assert events[0]["data"]["ttl_ms"] == 300_000
    assert events[0]["data"]["expires_at"] == absent["expires_at"]


async def test_the_grant_names_this_device_and_command_and_verifies_with_the_published_keys(
    broker: Broker,
) -> None:
    client = await broker.someone()
    await register(client)
    token = (await send(client))["grant_token"]

    keys = jwt.PyJWKSet.from_dict((await client.get("/.well-known/jwks.json")).json())
    key = next(key for key in keys.keys if key.key_id == jwt.get_unverified_header(token)["kid"])
    claims = jwt.decode(token, key.key, algorithms=["EdDSA"], audience="lamp-1", issuer="ordain")

    assert claims["cmd"] == "blink"


async def test_grants_are_left_out_of_reads_that_do_not_want_them(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await send(client)
    one, of_device = f"/v1/commands/{command['id']}", f"/v1/devices/lamp-1/commands/{command['id']}"

    for path in (one, of_device):
        assert (await client.get(path)).json() == command
        assert (await client.get(f"{path}?grant=false")).json() == command | {"grant_token": None}
    for path in ("/v1/commands", "/v1/devices/lamp-1/commands"):
        assert (await client.get(path)).json()["data"] == [command]
        assert (await client.get(f"{path}?grant=false")).json()["data"] == [command | {"grant_token": None}]


async def test_a_read_only_key_sees_no_grant(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await send(client)

    reader = await broker.someone(scopes=READ)

    assert (await reader.get(f"/v1/commands/{command['id']}")).json()["grant_token"] is None
    assert (await reader.get("/v1/commands")).json()["data"][0]["grant_token"] is None


async def test_a_command_passes_its_states_and_its_events_show_them(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await send(client)
    path = f"/v1/devices/lamp-1/commands/{command['id']}"

    broker.online("lamp-1")
    handed = await state_is(client, command["id"], "published")
    assert (handed["status"], handed["attempts"], handed["delivered_at"]) == ("pending", 1, None)
    error = error_of(await client.delete(path), 409, "conflict")
    assert error["details"] == {"state": "published"}
    broker.says("lamp-1", json.dumps({"id": command["id"], "status": "acknowledged"}).encode())
    assert (await state_is(client, command["id"], "acknowledged"))["status"] == "delivered"
    broker.says("lamp-1", json.dumps({"id": command["id"], "status": "executed", "result": 3}).encode())
    done = await state_is(client, command["id"], "executed")

    assert done["result"] == {"value": 3}
    assert done["delivered_at"] <= done["executed_at"]
    events = (await client.get(f"/v1/commands/{command['id']}/events")).json()["data"]
    assert [event["type"] for event in events] == ["created", "published", "acknowledged", "executed"]
    assert [event["version"] for event in events] == [1, 2, 3, 4]
    assert [event["evidence"] for event in events] == [
        "accepted", "handed_over", "device_ack", "device_result",
    ]  # fmt: skip
    assert events[1]["data"] == {"attempt": 1, "transport": "mqtt", "counts": True}
    assert list(events[0]) == ["position", "version", "type", "recorded_at", "evidence", "data"]


async def test_events_of_a_command_come_in_pages(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await send(client)
    await client.delete(f"/v1/devices/lamp-1/commands/{command['id']}")
    path = f"/v1/commands/{command['id']}/events"

    first = (await client.get(path, params={"limit": 1})).json()
    second = (await client.get(path, params={"limit": 1, "cursor": first["next_cursor"]})).json()

    assert [event["type"] for event in first["data"] + second["data"]] == ["created", "cancelled"]
    assert (first["has_more"], second["has_more"], second["next_cursor"]) == (True, False, None)


async def test_abandoning_a_handed_over_command_says_that_the_outcome_is_unknown(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await send(client)
    path = f"/v1/commands/{command['id']}/abandon"
    error_of(await client.post(path), 409, "conflict")
    broker.online("lamp-1")
    await state_is(client, command["id"], "published")

    answer = await client.post(path, json={"reason": "the lamp is in the sea"})

    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["state"]) == ("failed", "timed_out")
    assert answer.json()["error"]["code"] == "timeout"
    assert answer.json()["error"]["details"] == {"reason": "operator"}
    assert (await client.post(path)).status_code == 200
    error_of(await client.post(path, json={"why": 1}), 400, "invalid_request")


async def test_cancelling_again_changes_nothing(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    path = f"/v1/devices/lamp-1/commands/{(await send(client))['id']}"

    first, second = await client.delete(path), await client.delete(path)

    assert (first.status_code, second.status_code) == (200, 200)
    assert (first.json()["status"], second.json()["state"]) == ("cancelled", "cancelled")


# --- lists -------------------------------------------------------------------------------------------


async def test_a_list_is_stable_while_commands_arrive(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    sent = [(await send(client))["id"] for _ in range(7)]
    path = "/v1/devices/lamp-1/commands"

    first = (await client.get(path, params={"limit": 3})).json()
    late = [(await send(client))["id"] for _ in range(4)]
    second = (await client.get(path, params={"limit": 3, "cursor": first["next_cursor"]})).json()
    third = (await client.get(path, params={"limit": 3, "cursor": second["next_cursor"]})).json()

    seen = [command["id"] for page in (first, second, third) for command in page["data"]]
    assert seen == sent[::-1]
    assert (third["has_more"], third["next_cursor"]) == (False, None)
    assert await ids(client, path, limit=2) == (sent + late)[::-1]


async def test_lists_are_filtered_by_status_state_type_and_device(broker: Broker) -> None:
    client = await broker.someone()
    lamp = await register(client, "lamp-1")
    await register(client, "lamp-2")
    kept, gone = await send(client), await send(client)
    other = await send(client, "lamp-2", type="glow")
    await client.delete(f"/v1/devices/lamp-1/commands/{gone['id']}")

    for query, wanted in (
        ({"status": "pending"}, [other, kept]),
        ({"status": "cancelled"}, [gone]),
        ({"state": "pending"}, [other, kept]),
        ({"state": "published"}, []),
        ({"status": "pending", "state": "cancelled"}, []),
        ({"type": "glow"}, [other]),
        ({"device": "lamp-1"}, [gone, kept]),
        ({"device": lamp["id"], "status": "pending"}, [kept]),
        ({"device": "nobody"}, []),
    ):
        assert await ids(client, "/v1/commands", **query) == [command["id"] for command in wanted], query
    assert await ids(client, f"/v1/devices/{lamp['id']}/commands", status="pending") == [kept["id"]]


async def test_a_cursor_works_only_for_the_list_that_gave_it(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for _ in range(3):
        await send(client)
    path = "/v1/devices/lamp-1/commands"
    cursor = (await client.get(path, params={"limit": 1})).json()["next_cursor"]
    raw = bytearray(base64.urlsafe_b64decode(cursor))
    raw[7] ^= 1
    forged = base64.urlsafe_b64encode(bytes(raw)).decode()
    neighbour = await broker.someone("other")
    await register(neighbour, "lamp-9")

    for who, where, query in (
        (client, path, {"cursor": forged}),
        (client, path, {"cursor": cursor[:-1]}),
        (client, path, {"cursor": cursor + "A"}),
        (client, path, {"cursor": ""}),
        (client, path, {"cursor": "é"}),
        (client, path, {"cursor": cursor, "status": "pending"}),
        (client, "/v1/commands", {"cursor": cursor}),
        (client, "/v1/devices", {"cursor": cursor}),
        (neighbour, "/v1/devices/lamp-9/commands", {"cursor": cursor}),
    ):
        error = error_of(await who.get(where, params=query), 400, "invalid_request")
        assert error["details"]["field"] == "cursor"


# --- the same request twice --------------------------------------------------------------------------


async def test_many_requests_with_one_key_make_one_command(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)

    def post() -> Any:
        return client.post(
            "/v1/devices/lamp-1/commands", json={"type": "blink", "params": [1], "idempotency_key": "k"}
        )

    answers = await asyncio.gather(*(post() for _ in range(32)))

    assert sorted(answer.status_code for answer in answers) == [200] * 31 + [201]
    for answer in answers:
        replayed = answer.headers.get("idempotent-replayed")
        assert replayed == ("true" if answer.status_code == 200 else None)
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(await ids(client, "/v1/commands")) == 1


async def test_a_key_is_bound_to_one_body_one_device_and_one_project(broker: Broker) -> None:
    client = await broker.someone()
    device = await register(client)
    await register(client, "lamp-2")
    path, key = "/v1/devices/lamp-1/commands", {"Idempotency-Key": "k"}
    body = {"type": "blink", "params": {"b": 1, "a": [2]}}
    first = await client.post(path, json=body, headers=key)
    assert first.status_code == 201

    spelled = b'{ "idempotency_key":"k","params":{"a":[2],"b":1},"type":"\\u0062link"}'
    json_type = {"Content-Type": "application/json"}
    again = await client.post(path, content=spelled, headers=json_type)
    by_id = await client.post(f"/v1/devices/{device['id']}/commands", json=body, headers=key)
    assert [again.status_code, by_id.status_code] == [200, 200]
    assert again.json()["id"] == by_id.json()["id"] == first.json()["id"]

    for where, other in (
        (path, {"type": "glow"}),
        (path, body | {"ttl_sec": 300}),
        (path, {"type": "blink"}),
        ("/v1/devices/lamp-2/commands", body),
    ):
        error = error_of(await client.post(where, json=other, headers=key), 409, "idempotency_conflict")
        assert error["details"] == {"command_id": first.json()["id"]}

    neighbour = await broker.someone("other")
    await register(neighbour, "lamp-3")
    theirs = await neighbour.post("/v1/devices/lamp-3/commands", json=body, headers=key)
    assert theirs.status_code == 201


async def test_a_replay_shows_the_commands_current_state(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = await send(client, idempotency_key="k")
    await client.delete(f"/v1/devices/lamp-1/commands/{command['id']}")

    answer = await client.post("/v1/devices/lamp-1/commands", json={"type": "blink", "idempotency_key": "k"})

    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")


async def test_a_key_is_the_same_in_header_and_body_with_any_characters(broker: Broker) -> None:
    client, path = await broker.someone(), "/v1/devices/lamp-1/commands"
    await register(client)

    first = await client.post(path, json={"type": "blink", "idempotency_key": "Tür-1"})
    again = await client.post(path, json={"type": "blink"}, headers={b"Idempotency-Key": "Tür-1".encode()})

    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]


async def test_two_different_keys_in_one_request_are_refused(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)

    async def post(body: str, header: str) -> httpx2.Response:
        return await client.post(
            "/v1/devices/lamp-1/commands",
            json={"type": "blink", "idempotency_key": body},
            headers={"Idempotency-Key": header},
        )

    assert (await post("k", "k")).status_code == 201
    error = error_of(await post("k", "l"), 400, "invalid_request")
    assert error["details"]["field"] == "idempotency_key"
    for wrong in ("", "x" * 256):
        error_of(await post("k", wrong), 400, "invalid_request")


async def test_a_full_queue_gives_a_retry_after(tmp_path: Path) -> None:
    async with running(tmp_path / "data", Limits(queue_per_name=2)) as broker:
        client = await broker.someone()
        await register(client)
        await send(client)
        await send(client)

        answer = await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})

        error_of(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) > 0
        await send(client, type="glow")


async def test_reads_are_the_same_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as broker:
        client = await broker.someone()
        await register(client)
        command = await send(client, idempotency_key="k")
        await client.delete(f"/v1/devices/lamp-1/commands/{command['id']}")
        page = (await client.get("/v1/commands", params={"limit": 1})).json()["data"]
        await send(client)
        cursor = (await client.get("/v1/commands", params={"limit": 1})).json()["next_cursor"]
        key = client.headers["authorization"]

    async with running(tmp_path / "data") as broker:
        client = broker.client(key.removeprefix("Bearer "))
        again = (await client.get("/v1/commands", params={"limit": 1, "cursor": cursor})).json()["data"]
        for shown in page + again:
            del shown["grant_token"]
        assert again == page
        replay = await client.post(
            "/v1/devices/lamp-1/commands", json={"type": "blink", "idempotency_key": "k"}
        )
        assert (replay.status_code, replay.json()["id"]) == (200, command["id"])


async def test_the_default_ttl_is_a_setting(tmp_path: Path) -> None:
    async with running(tmp_path / "data", Limits(default_ttl_sec=7)) as broker:
        client = await broker.someone()
        await register(client)
        command = await send(client)
        events = (await client.get(f"/v1/commands/{command['id']}/events")).json()["data"]
        assert events[0]["data"]["ttl_ms"] == 7_000
