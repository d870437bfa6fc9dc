"""The API under the SDK: sending by name and ident, and the history of sent commands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.http.compat import app_command
from broker.settings import Limits
from devices.clock import parse_rfc3339, rfc3339
from tests.integration.http.support import READ, Broker, error_of, register, running
from tests.integration.http.test_commands import ids, state_is
from tests.integration.http.test_fanout import fan_out, lamps

LONG_AGO = "2020-01-01"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def sent(client: httpx2.AsyncClient, *idents: str, name: str = "reboot", **more: Any) -> dict[str, Any]:
    answer = await client.post(
        "/v1/app/command/send", json={"name": name, "device_ident": list(idents)} | more
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def history(
    client: httpx2.AsyncClient, *idents: str, name: str = "reboot", start: str = LONG_AGO, **more: Any
) -> dict[str, list[dict[str, Any]]]:
    body = {"name": name, "device_idents": list(idents), "start": start} | more
    answer = await client.post("/v1/app/command/history", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, list[dict[str, Any]]] = answer.json()
    return found


async def command(client: httpx2.AsyncClient, outcome: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/commands/{outcome['command_id']}")).json()
    return found


async def test_every_ident_gets_its_own_outcome(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, "sensor_01")
    await register(client, "rec-1", type="recorder")

    found = await sent(client, "sensor_01", "sensor_99", "rec-1", data={"force": False})

    assert list(found) == ["sensor_01", "sensor_99", "rec-1"]
    assert list(found["sensor_01"]) == ["sent", "command_id"]
    assert found["sensor_01"]["sent"] is True
    assert found["sensor_99"] == {"sent": False, "error": "Device not found"}
    assert list(found["rec-1"]) == ["sent", "error"]
    assert found["rec-1"]["error"].startswith("name: recorder has no command 'reboot'")
    made = await command(client, found["sensor_01"])
    assert (made["type"], made["params"], made["hardware_id"]) == ("reboot", {"force": False}, "sensor_01")


@pytest.mark.parametrize("data", [None, 0, "on", [1, {"a": None}], {}])
async def test_data_is_any_json_and_is_returned_as_the_value(broker: Broker, data: Any) -> None:
    client = await broker.someone()
    await register(client)

    await sent(client, "lamp-1", data=data)

    assert [record["value"] for record in (await history(client, "lamp-1"))["lamp-1"]] == [data]


async def test_a_command_without_data_has_an_empty_object(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)

    made = await command(client, (await sent(client, "lamp-1"))["lamp-1"])

    assert made["params"] == {}


async def test_a_command_never_expires_unless_its_type_sets_a_ttl(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, "lamp-1")
    await register(client, "lock-1", type="iotee_device")

    found = await sent(client, "lamp-1", "lock-1", name="lock")

    assert (await command(client, found["lamp-1"]))["expires_at"] is None
    lock = await command(client, found["lock-1"])
    lives = parse_rfc3339(lock["expires_at"]) - parse_rfc3339(lock["created_at"])
    assert 59_000 < lives <= 60_000  # the decision is some ms before its event


async def test_the_reason_against_a_device_is_a_short_sentence(tmp_path: Path) -> None:
    limits = Limits(queue_per_name=1, params_bytes=100, commands_per_minute=2)
    async with running(tmp_path / "data", limits) as broker:
        client = await broker.someone()
        names = await lamps(client, 4)
        first = await sent(client, "lamp-0", idempotency_key="k")

        for found, said in (
            (await sent(client, "lamp-0"), "Queue full"),
            (await sent(client, "lamp-0", data=1, idempotency_key="k"),
             "Idempotency key used for a different request"),
            (await sent(client, "lamp-0", data="x" * 100), "Data too large"),
        ):  # fmt: skip
            assert found == {"lamp-0": {"sent": False, "error": said}}
        assert await sent(client, "lamp-0", idempotency_key="k") == first
        flood = await sent(client, *names[1:])
        assert flood["lamp-1"]["sent"] is True
        for name in names[2:]:
            assert flood[name] == {"sent": False, "error": "Rate limit exceeded"}
        late = await sent(client, names[1], data=2**60)
        assert late[names[1]]["error"].startswith("data: integers beyond")


async def test_a_repeated_send_sends_nothing_twice_and_completes_missing_commands(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 2)
    first = await sent(client, names[0], data=1, idempotency_key="k")

    answer = await client.post(
        "/v1/app/command/send",
        json={"name": "reboot", "device_ident": names, "data": 1},
        headers={"Idempotency-Key": "k"},
    )

    assert answer.json()[names[0]] == first[names[0]]
    assert len(await ids(client, "/v1/commands")) == 2
    other_way = await fan_out(client, names[:1], idempotency_key="k", type="reboot", params=1)
    assert other_way[names[0]]["error"]["code"] == "idempotency_conflict"


# --- history -----------------------------------------------------------------------------------------


async def test_history_is_grouped_by_ident_in_order_and_has_every_field(broker: Broker) -> None:
    client = await broker.someone()
    names = await lamps(client, 3)
    first, second = [(await sent(client, *names[:2], data={"n": n}))["lamp-0"] for n in (1, 2)]
    await sent(client, "lamp-0", name="blink")
    broker.online("lamp-0")
    await state_is(client, first["command_id"], "published")
    broker.says("lamp-0", b'{"id": "%s", "status": "executed"}' % first["command_id"].encode())
    await state_is(client, first["command_id"], "executed")

    found = await history(client, "lamp-0", "lamp-2", "nobody", "lamp-0")

    assert list(found) == ["lamp-0", "lamp-2", "nobody"]
    assert (found["lamp-2"], found["nobody"]) == ([], [])
    created = [parse_rfc3339((await command(client, each))["created_at"]) for each in (first, second)]
    assert found["lamp-0"] == [
        {"value": {"n": 1}, "timestamp": created[0], "command_id": first["command_id"], "status": "executed"},
        {"value": {"n": 2}, "timestamp": created[1], "command_id": second["command_id"], "status": "pending"},
    ]


async def test_history_includes_everything_answered_before(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    seen = []
    for _ in range(20):
        seen.append((await sent(client, "lamp-1"))["lamp-1"]["command_id"])
        records = (await history(client, "lamp-1"))["lamp-1"]
        assert [record["command_id"] for record in records] == seen


async def test_start_is_inclusive_end_is_exclusive_and_both_take_any_iso_8601(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    await sent(client, "lamp-1")
    at = (await history(client, "lamp-1"))["lamp-1"][0]["timestamp"]
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at)
    micro = timedelta(microseconds=1)
    elsewhere = (moment + timedelta(hours=5, minutes=30)).isoformat(timespec="milliseconds")

    async def found(start: str, end: str | None = None) -> int:
        return len((await history(client, "lamp-1", start=start, end=end))["lamp-1"])

    assert await found(rfc3339(at)) == 1
    assert await found(rfc3339(at), rfc3339(at + 1)) == 1
    assert await found(rfc3339(at + 1)) == 0
    assert await found(LONG_AGO, rfc3339(at)) == 0
    assert await found((moment + micro).isoformat()) == 0
    assert await found((moment - micro).isoformat(), (moment + micro).isoformat()) == 1
    assert await found(elsewhere.replace("+00:00", "+05:30")) == 1
    assert await found(moment.isoformat().replace("+00:00", "")) == 1
    assert await found(f"{moment:%Y-%m-%d}", f"{moment + timedelta(days=1):%Y-%m-%d}") == 1
    assert await found(f"{moment:%Y%m%dT%H%M%SZ}") == 1
    assert await found("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00") == 1
    assert await found(f"{moment + timedelta(days=1):%Y-%m-%d}") == 0
    assert await found("2030-01-01", "2020-01-01") == 0


async def test_an_invalid_instant_is_named(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    body = {"name": "reboot", "device_idents": ["lamp-1"], "start": LONG_AGO}
    for wrong, field in (
        (body | {"start": "yesterday"}, "start"),
        (body | {"start": ""}, "start"),
        (body | {"start": 1_700_000_000_000}, "start"),
        (body | {"end": "2026-13-01"}, "end"),
        (body | {"name": "re boot"}, "name"),
        (body | {"device_idents": []}, "device_idents"),
        (body | {"device_idents": "lamp-1"}, "device_idents"),
        ({"name": "reboot", "device_idents": ["lamp-1"]}, "start"),
    ):
        answer = await client.post("/v1/app/command/history", json=wrong)
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == field
    for unsent, field in (
        ({"device_ident": ["lamp-1"]}, "name"),
        ({"name": "reboot", "device_ident": "lamp-1"}, "device_ident"),
        ({"name": "reboot", "device_ident": ["lamp-1"], "params": {}}, "params"),
    ):
        answer = await client.post("/v1/app/command/send", json=unsent)
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == field
    assert await ids(client, "/v1/commands") == []


async def test_too_many_records_are_refused_and_not_truncated(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await broker.someone()
    names = await lamps(client, 3)
    await sent(client, *names)
    await sent(client, *names)
    monkeypatch.setattr(app_command, "MOST_RECORDS", 5)

    body = {"name": "reboot", "device_idents": names, "start": LONG_AGO}
    answer = await client.post("/v1/app/command/history", json=body)

    assert error_of(answer, 400, "invalid_request")["details"]["field"] == "start"
    assert [len(records) for records in (await history(client, *names[:2])).values()] == [2, 2]
    monkeypatch.setattr(app_command, "MOST_RECORDS", 6)
    assert [len(records) for records in (await history(client, *names)).values()] == [2, 2, 2]


async def test_project_and_scopes_limit_sending_and_history(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    await register(client)
    await sent(client, "lamp-1")

    assert await history(neighbour, "lamp-1") == {"lamp-1": []}
    assert await sent(neighbour, "lamp-1") == {"lamp-1": {"sent": False, "error": "Device not found"}}
    reader = await broker.someone(scopes=READ)
    assert len((await history(reader, "lamp-1"))["lamp-1"]) == 1
    body = {"name": "reboot", "device_ident": ["lamp-1"]}
    error_of(await reader.post("/v1/app/command/send", json=body), 403, "forbidden")
    writer = await broker.someone(scopes=("devices:write",))
    body = {"name": "reboot", "device_idents": ["lamp-1"], "start": LONG_AGO}
    error_of(await writer.post("/v1/app/command/history", json=body), 403, "forbidden")


async def test_a_deleted_device_keeps_its_history(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    await sent(client, "lamp-1")
    await client.delete("/v1/devices/lamp-1?force=true")

    assert [record["status"] for record in (await history(client, "lamp-1"))["lamp-1"]] == ["cancelled"]
