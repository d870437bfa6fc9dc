"""One command to many devices over HTTP: each device's own outcome, repeated requests, and bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from broker.settings import Limits
from tests.integration.core_support import until
from tests.integration.http.support import READ, Broker, error_of, register, running
from tests.integration.http.test_commands import ids, send, state_is
from tests.stretches import LONGEST_SEC, Stretches


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def fan_out(
    client: httpx2.AsyncClient, devices: list[str], headers: dict[str, str] | None = None, **body: Any
) -> dict[str, Any]:
    body = {"type": "blink", "devices": devices} | body
    answer = await client.post("/v1/commands", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def lamps(client: httpx2.AsyncClient, count: int) -> list[str]:
    names = [f"lamp-{number}" for number in range(count)]
    await asyncio.gather(*(register(client, name) for name in names))
    return names


async def test_a_refused_device_does_not_affect_the_others(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    await register(client, "lamp-1", id="dev_one")
    await register(client, "rec-1", type="recorder")
    await register(client, "gone-1")
    await client.delete("/v1/devices/gone-1")
    await register(neighbour, "theirs-1")

    found = await fan_out(client, ["rec-1", "dev_one", "nobody", "theirs-1", "gone-1", "no name", "lamp-1"])

    assert list(found) == ["rec-1", "dev_one", "nobody", "theirs-1", "gone-1", "no name", "lamp-1"]
    assert list(found["dev_one"]) == ["command_id"]
    assert found["lamp-1"] == found["dev_one"]
    assert found["rec-1"]["error"]["code"] == "invalid_request"
    assert found["rec-1"]["error"]["details"]["field"] == "type"
    for name in ("nobody", "theirs-1", "gone-1", "no name"):
        assert list(found[name]) == ["error"]
        assert found[name]["error"] == {
            "code": "not_found", "message": f"no device {name!r} is known here",
        }  # fmt: skip
    assert await ids(client, "/v1/commands") == [found["dev_one"]["command_id"]]
    assert await ids(neighbour, "/v1/commands") == []


async def test_a_command_of_a_fan_out_equals_one_sent_alone(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 2)
    fields: dict[str, Any] = {"params": {"for": [1, None]}, "ttl_sec": 60}
    broker.online("lamp-0")

    found = await fan_out(client, names, **fields)
    alone = await send(client, "lamp-1", **fields)

    many = (await client.get(f"/v1/commands/{found['lamp-1']['command_id']}")).json()
    own = ("id", "created_at", "expires_at", "grant_token")
    assert {key: many[key] for key in many if key not in own} == {
        key: alone[key] for key in alone if key not in own
    }
    await state_is(client, found["lamp-0"]["command_id"], "published")
    broker.says("lamp-0", b'{"id": "%s", "status": "executed"}' % found["lamp-0"]["command_id"].encode())
    await state_is(client, found["lamp-0"]["command_id"], "executed")


async def test_ten_thousand_devices_are_accepted_and_one_more_is_refused(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 3)
    strangers = [f"{'x' * 58}{number:06}" for number in range(9_998)]

    found = await fan_out(client, names[:2] + strangers)

    assert len(found) == 10_000
    assert [name for name in found if "command_id" in found[name]] == names[:2]
    for devices, reason in (([*names, *strangers], "1 to 10000 items"), ([], "1 to 10000 items")):
        answer = await client.post("/v1/commands", json={"type": "blink", "devices": devices})
        error = error_of(answer, 400, "invalid_request")
        assert error["details"]["field"] == "devices"
        assert reason in error["details"]["reason"]
    assert len(await ids(client, "/v1/commands")) == 2


async def test_a_fan_out_larger_than_a_transaction_is_complete_and_in_order(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 501)

    found = await fan_out(client, names)

    sent = [found[name]["command_id"] for name in names]
    assert (await ids(client, "/v1/commands", limit=100))[::-1] == sent


async def test_a_body_of_four_mebibytes_is_accepted_and_a_larger_one_refused(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    rest = b'{"type": "blink", "devices": ["lamp-1"], "params": {}}'
    json_type = {"Content-Type": "application/json"}

    fits = await client.post("/v1/commands", content=rest.ljust(4_194_304), headers=json_type)
    too_large = await client.post("/v1/commands", content=rest.ljust(4_194_305), headers=json_type)

    assert fits.status_code == 200
    error_of(too_large, 413, "too_large")
    error_of(
        await client.post(
            "/v1/devices/lamp-1/commands", content=b"{}".ljust(262_145), headers=json_type
        ), 413, "too_large",
    )  # fmt: skip


async def test_a_fault_of_the_whole_request_is_400_and_sends_nothing(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for body, field in (
        ({"devices": ["lamp-1"]}, "type"),
        ({"type": "blink"}, "devices"),
        ({"type": "blink", "devices": "lamp-1"}, "devices"),
        ({"type": "blink", "devices": ["lamp-1", 7]}, "devices[1]"),
        ({"type": 7, "devices": ["lamp-1"]}, "type"),
        ({"type": "blink", "devices": ["lamp-1"], "ttl_sec": 0}, "ttl_sec"),
        ({"type": "blink", "devices": ["lamp-1"], "collapse_key": "a b"}, "collapse_key"),
        ({"type": "blink", "devices": ["lamp-1"], "device": 1}, "device"),
        ({"type": "blink", "devices": ["lamp-1"], "idempotency_key": ""}, "idempotency_key"),
    ):
        error = error_of(await client.post("/v1/commands", json=body), 400, "invalid_request")
        assert error["details"]["field"] == field
    reader = await broker.someone(scopes=READ)
    whole = {"type": "blink", "devices": ["lamp-1"]}
    error_of(await reader.post("/v1/commands", json=whole), 403, "forbidden")
    two_keys = await client.post(
        "/v1/commands", json=whole | {"idempotency_key": "k"}, headers={"Idempotency-Key": "l"}
    )
    assert error_of(two_keys, 400, "invalid_request")["details"]["field"] == "idempotency_key"
    assert await ids(client, "/v1/commands") == []


async def test_a_repeated_request_returns_existing_commands_and_creates_missing_ones(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 3)
    key = {"Idempotency-Key": "k"}

    first = await fan_out(client, [*names[:2], "late-1"], key, params={"b": 1, "a": 2})
    await register(client, "late-1")
    again = await fan_out(client, [*names, "late-1"], params={"a": 2, "b": 1}, idempotency_key="k")

    assert first["late-1"]["error"]["code"] == "not_found"
    assert [again[name] for name in names[:2]] == [first[name] for name in names[:2]]
    made = {again[name]["command_id"] for name in [*names, "late-1"]}
    assert set(await ids(client, "/v1/commands")) == made
    assert len(made) == 4


async def test_a_key_is_bound_to_one_body_per_device(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 2)
    first = await fan_out(client, names[:1], idempotency_key="k")

    other = await fan_out(client, names, idempotency_key="k", type="glow")

    assert other["lamp-0"]["error"]["code"] == "idempotency_conflict"
    assert other["lamp-0"]["error"]["details"] == first["lamp-0"]
    assert list(other["lamp-1"]) == ["command_id"]
    alone = await client.post("/v1/devices/lamp-0/commands", json={"type": "x", "idempotency_key": "k"})
    assert alone.status_code == 201


async def test_many_requests_with_one_key_make_one_command_per_device(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 40)

    answers = await asyncio.gather(*(fan_out(client, names, idempotency_key="k") for _ in range(16)))

    assert all(answer == answers[0] for answer in answers)
    assert len(await ids(client, "/v1/commands", limit=100)) == 40


async def test_the_commands_of_a_key_are_known_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as broker:
        client = await broker.someone()
        names = await lamps(client, 3)
        first = await fan_out(client, names[:2], idempotency_key="k")
        await client.delete(f"/v1/devices/lamp-0/commands/{first['lamp-0']['command_id']}")
    async with running(tmp_path / "data") as broker:
        client = await broker.someone()
        again = await fan_out(client, names, idempotency_key="k")

        assert [again[name] for name in names[:2]] == [first[name] for name in names[:2]]
        assert len(await ids(client, "/v1/commands")) == 3


async def test_a_full_queue_is_an_error_of_its_device_only(tmp_path: Path) -> None:
    async with running(tmp_path / "data", Limits(queue_per_name=1)) as broker:
        client = await broker.someone()
        names = await lamps(client, 2)
        await send(client, "lamp-0")

        found = await fan_out(client, names)

        assert found["lamp-0"]["error"]["code"] == "queue_full"
        assert list(found["lamp-1"]) == ["command_id"]


# --- collapse keys ---------------------------------------------------------------------------------


async def test_a_command_replaces_pending_ones_with_the_same_collapse_key(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 2)
    old = [await send(client, "lamp-0", collapse_key="brightness") for _ in range(1)]
    other_key = await send(client, "lamp-0", collapse_key="colour")
    plain = await send(client, "lamp-0")
    other_device = await send(client, "lamp-1", collapse_key="brightness")

    new = await send(client, "lamp-0", collapse_key="brightness")

    gone = (await client.get(f"/v1/commands/{old[0]['id']}")).json()
    assert (gone["state"], gone["status"]) == ("cancelled", "cancelled")
    events = (await client.get(f"/v1/commands/{gone['id']}/events")).json()["data"]
    assert events[-1]["data"] == {"by": "broker", "superseded_by": new["id"]}
    assert events[-1]["evidence"] == "broker"
    for kept in (other_key, plain, other_device, new):
        assert (await client.get(f"/v1/commands/{kept['id']}")).json()["state"] == "pending"
    found = await fan_out(client, names, collapse_key="brightness")
    for before, name in ((new, "lamp-0"), (other_device, "lamp-1")):
        explained = (await client.get(f"/v1/commands/{before['id']}/explain")).json()
        assert explained["state"] == "cancelled"
        assert found[name]["command_id"] in explained["summary"]


async def test_a_handed_over_command_is_not_replaced(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    broker.online("lamp-1")
    handed, waiting = [await send(client, collapse_key="k") for _ in range(2)]
    await state_is(client, handed["id"], "published")

    await send(client, collapse_key="k")

    assert (await client.get(f"/v1/commands/{handed['id']}")).json()["state"] == "published"
    assert (await client.get(f"/v1/commands/{waiting['id']}")).json()["state"] == "cancelled"
    assert len(broker.link.sent) == 1


async def test_a_full_queue_accepts_a_successor(tmp_path: Path) -> None:
    async with running(tmp_path / "data", Limits(queue_per_name=2, queue_per_device=2)) as broker:
        client = await broker.someone()
        await register(client)
        for key in ("a", "b"):
            await send(client, collapse_key=key)

        answer = await client.post("/v1/devices/lamp-1/commands", json={"type": "blink", "collapse_key": "c"})
        await send(client, collapse_key="a")

        error_of(answer, 429, "queue_full")
        assert len(await ids(client, "/v1/commands", state="pending")) == 2


async def test_a_repeated_request_supersedes_nothing(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    first = await send(client, collapse_key="k", idempotency_key="1")
    second = await send(client, collapse_key="k", idempotency_key="2")

    again = await client.post(
        "/v1/devices/lamp-1/commands", json={"type": "blink", "collapse_key": "k", "idempotency_key": "1"}
    )

    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    assert (await client.get(f"/v1/commands/{second['id']}")).json()["state"] == "pending"
    wrong = {"type": "blink", "collapse_key": "a/b"}
    error = error_of(await client.post("/v1/devices/lamp-1/commands", json=wrong), 400, "invalid_request")
    assert error["details"]["field"] == "collapse_key"


async def test_a_body_that_costs_much_is_refused_before_it_is_decoded(broker: Broker) -> None:
    client = await broker.someone()
    lists = b'{"devices": ["lamp-1"], "type": "blink", "params": [%s[]]}' % (b"[]," * 1_300_000)
    names = b'{"devices": [%s""], "type": "blink"}' % (b'"",' * 1_300_000)
    text = b'{"devices": ["lamp-1"], "type": "blink", "params": "%s"}' % (b"x" * 4_000_000)
    app = b'{"device_ident": ["lamp-1"], "name": "blink", "data": "%s"}' % (b"x" * 4_000_000)
    async with Stretches() as longest:
        for path, body in (
            ("/v1/commands", lists),
            ("/v1/commands", names),
            ("/v1/commands", text),
            ("/v1/app/command/send", app),
        ):
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            error_of(answer, 413, "too_large")
    assert longest.cpu_sec < LONGEST_SEC


async def test_a_large_fan_out_holds_the_loop_up_for_no_more_than_a_moment(broker: Broker) -> None:
    client = await broker.someone()
    known = await lamps(client, 600)
    devices = known + [f"{'unknown-' * 7}{n:08}" for n in range(9_400)]
    body = {"devices": devices, "type": "blink", "params": "x" * 60_000, "idempotency_key": "k"}
    content = msgspec.json.encode(body)
    async with Stretches() as longest:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/commands", content=content, headers=headers)
        assert answer.status_code == 200
    assert len(answer.json()) == 10_000
    assert longest.cpu_sec < LONGEST_SEC


async def test_a_fan_out_of_many_values_to_devices_that_are_online_does_not_hold_the_loop_up(
    broker: Broker,
) -> None:
    client = await broker.someone()
    devices = await lamps(client, 100)
    for name in devices:
        broker.online(name)
    body = {"devices": devices, "type": "blink", "params": {"numbers": list(range(3_900))}}
    content = msgspec.json.encode(body)
    async with Stretches() as longest:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/commands", content=content, headers=headers)
        await until(lambda: len(broker.link.sent) == 100)
    assert answer.status_code == 200
    assert longest.cpu_sec < LONGEST_SEC


async def test_more_values_are_allowed_for_the_names_only(broker: Broker) -> None:
    client = await broker.someone()
    body = {"devices": ["lamp-1"], "type": "blink", "params": [0] * 8_001}
    answer = await client.post("/v1/commands", json=body)
    assert "holds more than 8000 values" in error_of(answer, 413, "too_large")["message"]
