"""`GET /v1/events`: pages and streams over the real core; the reader of a stream is the test."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from broker.http.edge import streams
from broker.seams import Sqlite
from broker.settings import Limits
from broker.subscriptions import feed
from projections import outgoing
from tests.integration.core_support import until
from tests.integration.http.sse_support import reading
from tests.integration.http.support import Broker, error_of, register, running
from tests.reading import tamper


async def key_of(broker: Broker, project: str = "acme", *scopes: str) -> str:
    _, secret = await broker.core.keys.create(project, scopes or ("devices:write", "events:read"), None)
    return secret


async def send(client: httpx2.AsyncClient, device: str = "lamp-1", **fields: Any) -> str:
    answer = await client.post(f"/v1/devices/{device}/commands", json={"type": "open"} | fields)
    assert answer.status_code == 201, answer.text
    command_id: str = answer.json()["id"]
    return command_id


def kinds(page: list[dict[str, Any]]) -> list[str]:
    return [event["type"].split(".")[2] for event in page]


# --- pages -----------------------------------------------------------------------------------------


async def test_a_page_continues_where_the_last_one_ended_until_the_end_of_the_log(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        await register(client)
        made = [await send(client) for _ in range(5)]
        seen, query = list[dict[str, Any]](), {"limit": "2"}
        while True:
            page = (await client.get("/v1/events", params=query)).json()
            assert list(page) == ["data", "has_more", "next_cursor"]
            seen += page["data"]
            if not page["has_more"]:
                break
            assert len(page["data"]) == 2
            assert page["next_cursor"] == f"{broker.core.log_id}:{page['data'][-1]['id']}"
            query["after"] = page["next_cursor"]
        assert page["next_cursor"] is None
        assert kinds(seen) == ["registered", *["created"] * 5]
        assert [event["subject"] for event in seen[1:]] == made
        later = await send(client)
        news = (await client.get("/v1/events", params={"cursor": seen[-1]["id"]})).json()
        assert [event["subject"] for event in news["data"]] == [later]


async def test_a_filter_with_few_matches_gives_short_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LOOKS", 1)
    monkeypatch.setattr(outgoing, "SCANNED", 3)
    async with running(tmp_path) as broker:
        client = await broker.someone()
        await register(client)
        made = [await send(client, type="rare" if number == 9 else "open") for number in range(10)]
        found, pages, cursor = list[str](), 0, "0"
        while cursor:
            page = (await client.get(f"/v1/events?type=rare&after={cursor}")).json()
            found += [event["subject"] for event in page["data"]]
            pages, cursor = pages + 1, page["next_cursor"]
            assert page["has_more"] is (cursor is not None)
        assert found == made[-1:]
        assert pages >= 4


async def test_filters_select_by_device_name_event_and_command(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        lamp, door = await register(client), await register(client, "door-1")
        command = await send(client)
        await send(client, "door-1", type="shut")
        await client.delete(f"/v1/devices/lamp-1/commands/{command}")
        await client.delete("/v1/devices/lamp-1")
        for query, found in (
            ({"device": "lamp-1"}, ["registered", "created", "cancelled", "deleted"]),
            ({"device": lamp["id"]}, ["registered", "created", "cancelled", "deleted"]),
            ({"device": door["id"], "event": "created"}, ["created"]),
            ({"event": "ordain.command.cancelled.v1"}, ["cancelled"]),
            ({"event": "ordain.device.registered.v1"}, ["registered", "registered"]),
            ({"type": "shut"}, ["created"]),
            ({"command": command}, ["created", "cancelled"]),
            ({"device": "nobody"}, []),
            ({"command": "cmd_nothing"}, []),
        ):
            page = (await client.get("/v1/events", params=query)).json()
            assert kinds(page["data"]) == found, query
            assert page["has_more"] is False


async def test_a_key_sees_its_own_project_and_an_admin_sees_all_or_the_requested_one(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        ours, theirs = await broker.someone("acme"), await broker.someone("other")
        admin = await broker.someone("ops", ("admin",))
        await register(ours, "lamp-1")
        await register(theirs, "door-1")

        async def seen(client: httpx2.AsyncClient, **query: str) -> list[str]:
            page = (await client.get("/v1/events", params=query)).json()
            return [event["data"]["hardware_id"] for event in page["data"]]

        assert await seen(ours) == ["lamp-1"]
        assert await seen(ours, device="door-1") == []
        assert await seen(ours, project="acme") == ["lamp-1"]
        assert await seen(admin) == ["lamp-1", "door-1"]
        assert await seen(admin, project="other") == ["door-1"]
        for other in ("other", "nobody"):
            error_of(await ours.get("/v1/events", params={"project": other}), 403, "forbidden")
        error_of(await (await broker.someone(scopes=("devices:read",))).get("/v1/events"), 403, "forbidden")
        error_of(await broker.client().get("/v1/events"), 401, "unauthorized")


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=x", "after"),
        ("after=-1", "after"),
        ("after=99", "after"),
        (f"after={2**80}", "after"),
        ("cursor=99", "cursor"),
        ("after=0&cursor=1", "cursor"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("event=exploded", "event"),
        ("event=ordain.device.executed.v1", "event"),
        ("event=erased", "event"),
        ("type=a%20b", "type"),
        ("device=..", "device"),
    ],
)
async def test_a_wrong_parameter_is_named(tmp_path: Path, accept: str, query: str, field: str) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        await register(client)
        answer = await client.get(f"/v1/events?{query}", headers={"Accept": accept})
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == field


@pytest.mark.parametrize("last", ["x", "-1", "1.0", "99", "9" * 30, "²"])
async def test_an_invalid_last_event_id_is_named(tmp_path: Path, last: str) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last.encode("latin-1")}
        answer = await client.get("/v1/events", headers=headers)  # type: ignore[arg-type]
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == "Last-Event-ID"


async def test_a_position_before_the_retention_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        await register(client)
        await send(client)

    def forget(sql: Sqlite) -> None:
        sql.execute("INSERT INTO meta VALUES ('kept_after', '3')")

    async with running(tmp_path) as broker:
        await tamper(broker.core.storage, forget)
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        for query in ("after=2", "cursor=0"):
            error_of(await client.get(f"/v1/events?{query}"), 410, "gone")
        stream = {"Accept": "text/event-stream", "Last-Event-ID": "2"}
        error_of(await client.get("/v1/events", headers=stream), 410, "gone")
        assert (await client.get("/v1/events?after=3")).status_code == 200
        kept = (await client.get("/v1/events")).json()["data"]
        assert kinds(kept) == ["created"]


OTHER_LOG = "log_" + "0" * 26


async def test_a_position_of_another_log_is_gone_and_the_answer_says_where_to_go_on(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        client = await broker.someone()
        await register(client)
        await send(client)
        for accept in ("application/json", "text/event-stream"):
            for query, last, field in (
                (f"after={OTHER_LOG}:1", None, "after"),
                (f"cursor={OTHER_LOG}:1", None, "cursor"),
                (f"after={OTHER_LOG}:999", None, "after"),
                ("", f"{OTHER_LOG}:1", "Last-Event-ID"),
            ):
                headers = {"Accept": accept} | ({} if last is None else {"Last-Event-ID": last})
                error = error_of(await client.get(f"/v1/events?{query}", headers=headers), 410, "gone")
                now = f"{broker.core.log_id}:{broker.core.feed.head}"
                assert error["details"] == {"field": field, "log_id": broker.core.log_id, "position": now}
                assert now in error["message"]


async def test_a_position_of_this_log_is_accepted_with_and_without_its_log(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        before = broker.core.feed.head
        command = await send(client)
        for after in (str(before), f"{broker.core.log_id}:{before}"):
            for query in ({"after": after}, {"cursor": after}):
                page = (await client.get("/v1/events", params=query)).json()
                assert [event["subject"] for event in page["data"]] == [command]
            async with reading(broker.app, key, "after=0", last_event_id=after) as reader:
                assert [event["subject"] for event in await reader.has(1)] == [command]


async def test_a_stream_of_an_unknown_device_or_command_is_not_found(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        ours, theirs = await broker.someone(), await broker.someone("other")
        device = await register(ours)
        command = await send(ours)
        await ours.delete("/v1/devices/lamp-1?force=true")
        stream = {"Accept": "text/event-stream"}
        for query in ("device=nobody", "command=cmd_nothing"):
            error_of(await ours.get(f"/v1/events?{query}", headers=stream), 404, "not_found")
        key = await key_of(broker)
        for query in ("device=lamp-1", f"device={device['id']}", f"command={command}"):
            error_of(await theirs.get(f"/v1/events?{query}", headers=stream), 404, "not_found")
            async with reading(broker.app, key, f"{query}&after=0") as reader:  # deleted, but it has events
                assert await reader.has(1)


# --- streams ---------------------------------------------------------------------------------------


async def test_a_stream_continues_from_history_into_live_events(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        first = await send(client)
        async with reading(broker.app, key, "after=0") as reader:
            await reader.has(2)
            second = await send(client)
            events = await reader.has(3)
        assert reader.status == 200
        assert reader.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reader.headers["cache-control"] == "no-store"
        assert reader.text.startswith(f"retry: 3000\nid: {broker.core.log_id}:0\n\n")
        assert kinds(events) == ["registered", "created", "created"]
        assert [event["subject"] for event in events[1:]] == [first, second]
        assert events == (await client.get("/v1/events")).json()["data"]


async def test_a_stream_without_a_position_starts_with_the_next_event(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        async with reading(broker.app, key) as reader:
            await until(lambda: reader.text != "")
            command = await send(client)
            assert [event["subject"] for event in await reader.has(1)] == [command]


async def test_last_event_id_has_precedence_over_after(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        ids = [await send(client) for _ in range(3)]
        page = (await client.get("/v1/events")).json()["data"]
        async with reading(broker.app, key, "after=0", last_event_id=page[2]["id"]) as reader:
            assert [event["subject"] for event in await reader.has(1)] == [ids[2]]


async def test_a_stream_shows_only_events_that_match_its_filters(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client, other = broker.client(key), await broker.someone("other")
        await register(client)
        await register(client, "lamp-2")
        await register(other, "door-1")
        async with reading(broker.app, key, "device=lamp-2&event=created") as reader:
            await until(lambda: reader.text != "")
            await send(client)
            await send(other, "door-1")
            wanted = await send(client, "lamp-2")
            await client.delete(f"/v1/devices/lamp-2/commands/{wanted}")
            last = await send(client, "lamp-2")
            assert [event["subject"] for event in await reader.has(2)] == [wanted, last]


async def test_a_payload_with_line_breaks_stays_one_event(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        broker.online("lamp-1")
        async with reading(broker.app, key, "event=executed") as reader:
            await until(lambda: reader.text != "")
            command = await send(client)
            await until(lambda: len(broker.link.sent) == 1)
            said = b'{"id": "%b",\r\n "status": "executed",\n "result":\r{\n"a  b": "c\\n"}}'
            broker.says("lamp-1", said % command.encode())
            [event] = await reader.has(1)
            assert event["data"]["result"] == {"a  b": "c\n"}


async def test_a_silent_stream_is_pinged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_SEC", 0.01)
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        async with reading(broker.app, key) as reader:
            await until(lambda: reader.text.count(": ping\n") >= 3)
            assert reader.text.startswith(f"retry: 3000\nid: {broker.core.log_id}:3\n\n: ping\n")
            await send(client)
            assert len(await reader.has(1)) == 1


async def test_a_revoked_key_ends_its_own_streams_only(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        made, secret = await broker.core.keys.create("acme", ("events:read",), None)
        other = await key_of(broker)
        async with reading(broker.app, secret) as gone, reading(broker.app, other, "after=0") as stays:
            await until(lambda: gone.text != "")
            await broker.core.keys.revoke(made.id)
            await gone.end()
            await register(broker.client(other))
            assert len(await stays.has(1)) == 1
        async with reading(broker.app, secret) as refused:
            await refused.end()
            assert refused.status == 401


async def test_the_brokers_end_closes_every_stream_and_refuses_new_ones(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        async with reading(broker.app, key) as one, reading(broker.app, key) as two:
            await until(lambda: one.text != "" != two.text)
            broker.streams.close()
            await one.end()
            await two.end()
        async with reading(broker.app, key) as late:
            await late.end()
            assert late.status == 503


async def test_the_number_of_streams_per_project_is_limited(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(streams_per_project=1)) as broker:
        key, theirs = await key_of(broker), await key_of(broker, "other")
        async with reading(broker.app, key) as first:
            await until(lambda: first.text != "")
            async with reading(broker.app, await key_of(broker)) as second:
                await second.end()
            assert second.status == 429
            assert second.headers["retry-after"] == "1"
            async with reading(broker.app, theirs) as other:
                await until(lambda: other.status == 200)
        async with reading(broker.app, key) as again:
            await until(lambda: again.status == 200)
        assert broker.streams.open == 0


async def test_a_reader_that_stalls_resumes_from_the_log_and_delays_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.subscriptions.feed.QUEUED", 1_000)
    async with running(tmp_path, Limits(queue_per_name=10_000, queue_per_device=10_000)) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        await register(client)
        await send(client)
        start = broker.core.feed.head
        async with reading(broker.app, key) as slow, reading(broker.app, key) as quick:
            await until(lambda: slow.text != "" != quick.text)
            slow.reading.clear()
            for _ in range(15):
                await asyncio.gather(*(send(client) for _ in range(100)))
            await quick.has(1_500)
            assert slow.events == []
            assert broker.streams.lag > 1_000
            slow.reading.set()
            await slow.has(1_500)
        assert slow.positions == quick.positions == list(range(start + 1, start + 1_501))
        assert broker.streams.lag == 0


async def test_events_erased_while_a_reader_is_slow_arrive_without_data(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker, "acme", "admin")
        client = broker.client(key)
        await register(client)
        start = broker.core.feed.head
        first, _, third = [await send(client, params={"s3cret": "x" * 40_000}) for _ in range(3)]

        async def erase(piece: str) -> None:
            if first in piece:
                assert third not in piece, "it is in the next piece of the same batch"
                assert (await client.delete(f"/commands/{third}")).status_code == 200

        async with reading(broker.app, key, f"after={start}") as reader:
            reader.taken = erase
            events = await reader.has(4)
        assert kinds(events) == ["created", "created", "created", "cancelled"]
        assert [event.get("erased", False) for event in events] == [False, False, True, True]
        assert "s3cret" not in str(events[2:])


async def test_a_head_request_ends_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        async with reading(broker.app, await key_of(broker), method="HEAD") as reader:
            await reader.end()
        assert reader.status == 200
        assert reader.headers["content-type"].startswith("text/event-stream")


async def test_streams_are_counted_but_not_in_the_latency(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        key = await key_of(broker)
        client = broker.client(key)
        async with reading(broker.app, key) as reader:
            await until(lambda: reader.text != "")
            await register(client)
            await reader.has(1)
            text = (await client.get("/metrics")).text
        assert "ordain_event_streams 1.0" in text
        assert 'ordain_subscriber_events_total{kind="sse"} 1.0' in text
        assert 'ordain_subscriber_lag_events{kind="sse"} 0.0' in text
        assert 'ordain_http_requests_total{method="GET",route="/v1/events",status="200"} 1.0' in text


async def test_the_openapi_description_has_both_kinds_of_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        description = msgspec.json.decode((await broker.client().get("/openapi.json")).content)
        answers = description["paths"]["/v1/events"]["get"]["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "401", "403", "410", "429", "503"} <= set(answers)
