"""`as_of` and `/v1/diff` over HTTP. `projections/test_past.py` compares the content with the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from devices.clock import parse_rfc3339, rfc3339
from tests.integration.http.support import READ, Broker, error_of, register, running
from tests.integration.http.test_lanes import becomes, get, in_flight, send


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def positions(client: httpx2.AsyncClient, command_id: str) -> dict[str, int]:
    events = (await get(client, f"/v1/commands/{command_id}/events"))["data"]
    return {event["type"]: event["position"] for event in events}


async def executed(broker: Broker, client: httpx2.AsyncClient) -> tuple[str, dict[str, int]]:
    """An executed command and the positions of its events."""
    command_id = await in_flight(broker, client)
    broker.says("lamp-1", b'{"id": "%s", "status": "executed", "result": {"on": 1}}' % command_id.encode())
    await becomes(client, f"/v1/commands/{command_id}", "state", "executed")
    return command_id, await positions(client, command_id)


async def test_a_past_command_is_shown_without_a_grant(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command_id, at = await executed(broker, client)

    for path in (f"/v1/commands/{command_id}", f"/v1/devices/lamp-1/commands/{command_id}"):
        error_of(await client.get(f"{path}?as_of={at['created'] - 1}"), 404, "not_found")
        error_of(await client.get(f"{path}?as_of=0"), 404, "not_found")
        created = await get(client, f"{path}?as_of={at['created']}")
        assert (created["state"], created["attempts"], created["grant_token"]) == ("pending", 0, None)
        published = await get(client, f"{path}?as_of={at['published']}")
        assert (published["state"], published["result"]) == ("published", None)
        now = await get(client, f"{path}?as_of={at['executed']}")
        assert now == await get(client, path) | {"grant_token": None}


async def test_a_time_means_the_state_after_the_last_event_at_or_before_it(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command_id, _ = await executed(broker, client)
    events = (await get(client, f"/v1/commands/{command_id}/events"))["data"]
    path = f"/v1/commands/{command_id}"

    done = await get(client, f"{path}?as_of={events[-1]['recorded_at']}")
    assert done["state"] == "executed"
    before = rfc3339(parse_rfc3339(events[0]["recorded_at"]) - 1)
    error_of(await client.get(f"{path}?as_of={before}"), 404, "not_found")
    shifted = events[-1]["recorded_at"].replace("Z", "%2B00:00")
    assert await get(client, f"{path}?as_of={shifted}") == done


PATHS = [
    "/v1/commands",
    "/v1/commands/cmd_1",
    "/v1/devices/lamp-1/commands",
    "/v1/devices/lamp-1/commands/cmd_1",
    "/v1/devices/lamp-1/lane",
    "/v1/devices/lamp-1/state",
    "/v1/devices",
    "/v1/devices/lamp-1",
]


@pytest.mark.parametrize("path", PATHS)
async def test_a_point_may_name_its_log_and_another_logs_is_gone(broker: Broker, path: str) -> None:
    client = await broker.someone()
    await register(client)
    await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})
    head, log_id = broker.core.writer.durable, broker.core.log_id

    plain = await client.get(f"{path}?as_of={head}")
    full = await client.get(f"{path}?as_of={log_id}:{head}")
    gone = await client.get(f"{path}?as_of=log_{'0' * 26}:{head}")

    assert (full.status_code, full.json()) == (plain.status_code, plain.json())
    assert error_of(gone, 410, "gone")["details"]["position"] == f"{log_id}:{head}"


@pytest.mark.parametrize("path", PATHS)
async def test_an_invalid_or_future_point_is_refused(broker: Broker, path: str) -> None:
    client = await broker.someone()
    await register(client)
    ahead = rfc3339(broker.core.writer.now() + 3_600_000)
    head = broker.core.writer.durable

    for wrong in ("", "-1", "1.5", "yesterday", "2026-11-21", "9" * 30, str(head + 1), ahead, "%D9%A1"):
        answer = await client.get(f"{path}?as_of={wrong}")
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == "as_of", wrong
    assert (await client.get(f"{path}?as_of={head}")).status_code in (200, 404)


async def test_lists_show_the_given_point_and_their_cursors_keep_it(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    sent = [(await send(client, ttl_sec=None))["id"] for _ in range(3)]
    point = broker.core.writer.durable
    await client.delete(f"/v1/devices/lamp-1/commands/{sent[0]}")
    await send(client)

    for path in ("/v1/commands", "/v1/devices/lamp-1/commands"):
        page = await get(client, f"{path}?as_of={point}&limit=2")
        assert ([c["id"] for c in page["data"]], page["has_more"]) == ([sent[2], sent[1]], True)
        rest = await get(client, f"{path}?as_of={point}&limit=2&cursor={page['next_cursor']}")
        assert ([c["id"] for c in rest["data"]], rest["next_cursor"]) == ([sent[0]], None)
        assert rest["data"][0]["state"] == "pending"
        for other in (f"as_of={point - 1}&", ""):
            answer = await client.get(f"{path}?{other}limit=2&cursor={page['next_cursor']}")
            assert error_of(answer, 400, "invalid_request")["details"]["field"] == "cursor"
        assert (await get(client, f"{path}?as_of={point}&state=cancelled"))["data"] == []
        assert len((await get(client, f"{path}?as_of={point}&status=pending"))["data"]) == 3


async def test_a_past_lane_and_device_are_shown(broker: Broker) -> None:
    client = await broker.someone()
    device = await register(client, name="Lamp")
    registered = broker.core.writer.durable
    command_id, at = await executed(broker, client)
    await client.patch("/v1/devices/lamp-1", json={"name": "Other"})
    await client.delete("/v1/devices/lamp-1")

    lane = await get(client, f"/v1/devices/lamp-1/lane?as_of={at['published']}")
    assert (lane["presence"], lane["window"], lane["in_flight"]) == ("online", 1, 1)
    assert [(c["id"], c["state"], c["next"]) for c in lane["open"]] == [(command_id, "published", None)]
    after = await get(client, f"/v1/devices/lamp-1/lane?as_of={at['executed']}")
    assert (after["open"], after["in_flight"]) == ([], 0)

    then = await get(client, f"/v1/devices/{device['id']}?as_of={registered}")
    assert (then["name"], then["presence"], then["last_seen_at"]) == ("Lamp", "never", None)
    assert (await get(client, f"/v1/devices?as_of={registered}"))["data"] == [then]
    assert (await get(client, f"/v1/devices?as_of={registered - 1}"))["data"] == []
    assert (await get(client, "/v1/devices"))["data"] == []
    for gone in (registered - 1, broker.core.writer.durable):
        for path in ("", "/lane", "/commands"):
            error_of(await client.get(f"/v1/devices/lamp-1{path}?as_of={gone}"), 404, "not_found")


async def test_past_objects_of_another_project_are_unknown(broker: Broker) -> None:
    client, stranger = await broker.someone(), await broker.someone("other", READ)
    await register(client)
    command_id = (await send(client))["id"]
    point = broker.core.writer.durable

    for path in (f"commands/{command_id}", f"devices/lamp-1/commands/{command_id}", "devices/lamp-1/lane"):
        mine = await client.get(f"/v1/{path}?as_of={point}")
        assert mine.status_code == 200
        unknown = path.replace(command_id, "cmd_none").replace("lamp-1", "none")
        theirs, none = [await stranger.get(f"/v1/{p}?as_of={point}") for p in (path, unknown)]
        assert theirs.status_code == none.status_code == 404
    assert (await get(stranger, f"/v1/commands?as_of={point}"))["data"] == []
    assert (await get(stranger, f"/v1/devices?as_of={point}"))["data"] == []
    assert (await get(stranger, f"/v1/diff?from=0&to={point}"))["data"] == []


async def test_a_diff_shows_values_before_and_after(broker: Broker) -> None:
    client = await broker.someone(scopes=(*READ, "devices:write"))
    device = await register(client)
    start = broker.core.writer.durable
    waiting = (await send(client, ttl_sec=None))["id"]
    between = broker.core.writer.durable
    await client.patch("/v1/devices/lamp-1", json={"name": "Lamp"})
    await client.delete(f"/v1/devices/lamp-1/commands/{waiting}")
    end = broker.core.writer.durable

    first = await get(client, f"/v1/diff?from={start}&to={between}")
    assert first["data"] == [
        {
            "kind": "command",
            "id": waiting,
            "device_id": device["id"],
            "before": None,
            "after": await get(client, f"/v1/commands/{waiting}?as_of={between}"),
        }
    ]
    assert (first["has_more"], first["next_cursor"]) == (False, None)
    changed = (await get(client, f"/v1/diff?from={between}&to={end}"))["data"]
    assert [(c["kind"], c["id"]) for c in changed] == [("device", device["id"]), ("command", waiting)]
    assert [c["before"]["name"] for c in changed[:1]] == [None]
    assert (changed[1]["before"]["state"], changed[1]["after"]["state"]) == ("pending", "cancelled")
    assert (await get(client, f"/v1/diff?from={end}&to={end}"))["data"] == []
    assert await get(client, "/v1/diff") == await get(client, f"/v1/diff?from=0&to={end}")
    gone = (await get(client, f"/v1/diff?from=0&to={end}"))["data"][0]
    assert (gone["before"], gone["after"]["name"]) == (None, "Lamp")


async def test_a_diff_has_pages_and_refuses_points_in_the_wrong_order(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    sent = [(await send(client, ttl_sec=None))["id"] for _ in range(5)]
    end = broker.core.writer.durable

    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await get(client, f"/v1/diff?from=0&to={end}&limit=2{cursor and '&cursor=' + cursor}")
        found += [change["id"] for change in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
    assert found[1:] == sent

    for wrong, field in (
        (f"from={end}&to=1", "from"),
        (f"from=1&to={end + 1}", "to"),
        (f"from=x&to={end}", "from"),
        (f"from=log_x:1&to={end}", "from"),
        ("from=", "from"),
        ("to=", "to"),
    ):
        answer = await client.get(f"/v1/diff?{wrong}")
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == field


async def test_answers_about_the_past_match_the_openapi_description(broker: Broker) -> None:
    client = await broker.someone()
    description = await get(client, "/openapi.json")
    await register(client)
    command_id, at = await executed(broker, client)
    for path, where in (
        ("/v1/devices/{device}/lane", f"/v1/devices/lamp-1/lane?as_of={at['published']}"),
        ("/v1/commands/{command_id}", f"/v1/commands/{command_id}?as_of={at['published']}"),
        ("/v1/commands", f"/v1/commands?as_of={at['published']}"),
        ("/v1/devices", f"/v1/devices?as_of={at['published']}"),
        ("/v1/diff", f"/v1/diff?from=0&to={at['published']}"),
        ("/v1/diff", "/v1/diff?from=0&to=x"),
    ):
        answer = await client.get(where)
        content = description["paths"][path]["get"]["responses"][str(answer.status_code)]["content"]
        schema = content["application/json"]["schema"] | {"components": description["components"]}
        jsonschema_rs.validator_for(schema).validate(answer.json())


async def test_a_time_just_passed_waits_for_events_being_committed(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    creating = asyncio.create_task(send(client))
    while broker.core.writer._last() is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    at = rfc3339(broker.core.writer.now())

    found: dict[str, Any] = await get(client, f"/v1/commands?as_of={at}")

    assert [command["id"] for command in found["data"]] == [(await creating)["id"]]
