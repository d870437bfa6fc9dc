"""Every error has the common form, names the fault, and reveals nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from broker.seams import Batch, Broken, Full, Placed, Sqlite
from broker.settings import Limits
from tests.integration.http.support import Broker, error_of, register, running
from tests.reading import plain

JSON = {"Content-Type": "application/json"}
COMMANDS = "/v1/devices/lamp-1/commands"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def test_unknown_paths_are_not_found(broker: Broker) -> None:
    client = await broker.someone()
    for path in ("/v1", "/v1/nothing", "/v1/devices/a/b/c/d", "/schema", "/v2/devices", "/v1/%00"):
        error_of(await client.get(path), 404, "not_found")


async def test_a_wrong_method_is_refused_with_the_allowed_ones(broker: Broker) -> None:
    client = await broker.someone()

    answer = await client.put("/v1/devices")

    error_of(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, OPTIONS, POST"
    error_of(await client.request("BREW", "/v1/devices"), 405, "method_not_allowed")


async def test_the_allowed_methods_are_shown_without_a_key(broker: Broker) -> None:
    client = broker.client()
    for path, methods in (("/v1/devices", "GET, OPTIONS, POST"), ("/healthz", "GET, OPTIONS")):
        answer = await client.options(path)
        assert answer.status_code == 204
        assert sorted(answer.headers["allow"].split(", ")) == methods.split(", ")


WRONG_COMMANDS: list[tuple[Any, str]] = [
    ({}, "type"),
    ({"type": None}, "type"),
    ({"type": 1}, "type"),
    ({"type": ""}, "type"),
    ({"type": "../up"}, "type"),
    ({"type": "me"}, "type"),
    ({"type": "blink", "ttl_sec": "300"}, "ttl_sec"),
    ({"type": "blink", "ttl_sec": 1.5}, "ttl_sec"),
    ({"type": "blink", "ttl_sec": True}, "ttl_sec"),
    ({"type": "blink", "ttl_sec": 0}, "ttl_sec"),
    ({"type": "blink", "ttl_sec": -1}, "ttl_sec"),
    ({"type": "blink", "ttl_sec": 31_536_001}, "ttl_sec"),
    ({"type": "blink", "ttl_sec": 10**40}, "ttl_sec"),
    ({"type": "blink", "idempotency_key": ""}, "idempotency_key"),
    ({"type": "blink", "idempotency_key": "x" * 256}, "idempotency_key"),
    ({"type": "blink", "idempotency_key": 7}, "idempotency_key"),
    ({"type": "blink", "idempotency_key": None}, "idempotency_key"),
    ({"type": "blink", "parms": {}}, "parms"),
    ({"type": "blink", "x" * 5_000: {}}, "x" * 200),
    ({"type": "blink", "params": {"n": 2**53}}, "params"),
    ({"type": "blink", "params": 10**40}, "params"),
    ([], "body"),
    ("blink", "body"),
    (None, "body"),
]


async def test_a_wrong_field_of_a_command_is_named(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for wrong, field in WRONG_COMMANDS:
        answer = await client.post(COMMANDS, json=wrong)
        error = error_of(answer, 400, "invalid_request")
        assert error["details"]["field"] == field, (wrong, error)
        assert error["details"]["reason"]
    assert (await client.get("/v1/commands")).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("limit=abc", "limit: must be a whole number from 1 to 100 (got 'abc')"),
        ("limit=0", "limit: must be a whole number from 1 to 100 (got '0')"),
        ("grant=maybe", "grant: must be true or false (got 'maybe')"),
        ("state=odd", "state: must be one of "),
        ("cursor=x", "cursor: was not given by this list with these filters (got 'x')"),
    ],
)
async def test_a_wrong_query_parameter_is_answered_with_its_value_and_what_is_right(
    broker: Broker, query: str, reason: str
) -> None:
    client = await broker.someone()
    error = error_of(await client.get(f"/v1/commands?{query}"), 400, "invalid_request")
    assert error["message"].startswith(reason)
    assert f"(got '{query.partition('=')[2]}')" in error["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"ttl_sec": -1}, "ttl_sec: must be a whole number from 1 to 31536000 or null (got -1)"),
        ({"ttl_sec": "5"}, "ttl_sec: must be a whole number from 1 to 31536000 or null (got '5')"),
        ({"type": None}, "type: must be text (got null)"),
        ({"idempotency_key": ""}, "idempotency_key: must be text of 1 to 255 characters (got '')"),
    ],
)
async def test_a_wrong_field_is_answered_with_its_value_and_what_is_right(
    broker: Broker, body: dict[str, Any], reason: str
) -> None:
    client = await broker.someone()
    await register(client)
    answer = await client.post(COMMANDS, json={"type": "blink"} | body)
    assert error_of(answer, 400, "invalid_request")["message"] == reason
    wait = error_of(await client.post(f"{COMMANDS}?wait=abc", json={"type": "blink"}), 400, "invalid_request")
    assert wait["message"] == "wait: must be a whole number from 1 to 60 (got 'abc')"


async def test_a_wrong_item_of_a_list_is_answered_with_its_value(broker: Broker) -> None:
    client = await broker.someone()
    wrong = await client.post("/v1/commands", json={"devices": ["a", 7], "type": "blink"})
    assert error_of(wrong, 400, "invalid_request")["message"] == "devices[1]: must be text (got 7)"
    none = await client.post("/v1/commands", json={"devices": [], "type": "blink"})
    assert "devices: must be a list of " in error_of(none, 400, "invalid_request")["message"]


async def test_parameters_are_checked_against_the_device_type(broker: Broker) -> None:
    client = await broker.someone()
    await register(client, "rec-1", type="recorder")
    for params, field in (
        ({"max_duration_sec": 0}, "params.max_duration_sec"),
        ({"max_duration_sec": "60"}, "params.max_duration_sec"),
        ({"volume": 3}, "params.volume"),
        ([], "params"),
        (None, "params"),
    ):
        answer = await client.post(
            "/v1/devices/rec-1/commands", json={"type": "start_recording", "params": params}
        )
        error = error_of(answer, 400, "invalid_request")
        assert error["details"]["field"] == field
        if isinstance(params, dict):
            value = repr(next(iter(params.values())))
            assert error["message"].endswith(f" (got {value})")
    answer = await client.post("/v1/devices/rec-1/commands", json={"type": "explode"})
    assert error_of(answer, 400, "invalid_request")["details"]["field"] == "type"


async def test_a_body_that_is_not_json_is_refused(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for content in (
        b"{",
        b"nonsense",
        b'{"type":"blink"}{',
        b'{"type":"\xff\xfe"}',
        b'\xef\xbb\xbf{"type":"blink"}',
        b'{"type":"\\ud800"}',
        b'{"type":"blink","params":NaN}',
        b'{"type":"blink","params":Infinity}',
        b'{"type":"blink","params":1e999}',
        b'{"type":"blink","params":1' + b"0" * 5_000 + b"}",
        b'{"type":"blink","params":' + b"[" * 50 + b"{}" + b"]" * 49 + b"}",
        b'{"type":"blink","params":' + b"[" * 80 + b"]" * 80 + b"}",
        b'{"type":"blink","params":' + b"[" * 7_900 + b"]" * 7_900 + b"}",
        b'{"type":"blink","params":' + b'{"a":' * 4_000 + b"1" + b"}" * 4_000 + b"}",
        b"",
    ):
        answer = await client.post(COMMANDS, content=content, headers=JSON)
        assert error_of(answer, 400, "invalid_request")["details"]["field"] in ("body", "params"), content[
            :40
        ]


async def test_a_body_without_the_json_content_type_is_refused(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    body = b'{"type":"blink"}'
    for wrong in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "",
        "multipart/form-data",
    ):
        answer = await client.post(COMMANDS, content=body, headers={"Content-Type": wrong})
        error_of(answer, 415, "unsupported_media_type")
    error_of(await client.post(COMMANDS, content=body), 415, "unsupported_media_type")
    for right in ("application/json", "Application/JSON; charset=utf-8"):
        answer = await client.post(COMMANDS, content=body, headers={"Content-Type": right})
        assert answer.status_code == 201


async def test_a_body_with_many_numbers_that_take_long_to_read_is_refused(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for route in (COMMANDS, "/v1/commands"):
        body = b'{"type":"blink","devices":["lamp-1"],"params":{"a":[' + b"1e-310," * 501 + b"1]}}"
        answer = await client.post(route, content=body, headers=JSON)
        assert "501 numbers" in error_of(answer, 413, "too_large")["message"]
    large = b'{"devices":["' + b"a" * 300_000 + b'"],"type":"blink","params":[' + b"1e-310," * 501 + b"1]}"
    answer = await client.post("/v1/commands", content=large, headers=JSON)
    assert "501 numbers" in error_of(answer, 413, "too_large")["message"]


async def test_a_too_large_body_is_refused_with_and_without_a_length(tmp_path: Path) -> None:
    async with running(tmp_path / "data", Limits(body_bytes=4_096, params_bytes=1_000)) as broker:
        client = await broker.someone()
        await register(client)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b" " * 1_000

        error_of(await client.post(COMMANDS, content=b" " * 4_097, headers=JSON), 413, "too_large")
        error_of(await client.post(COMMANDS, content=chunks(), headers=JSON), 413, "too_large")
        answer = await client.post(COMMANDS, json={"type": "blink", "params": "x" * 999})
        error_of(answer, 413, "too_large")
        assert (await client.post(COMMANDS, json={"type": "blink", "params": "x" * 998})).status_code == 201


async def test_a_wrong_list_parameter_is_named(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for query in (
        {"limit": "0"}, {"limit": "101"}, {"limit": "ten"}, {"limit": ""},
        {"limit": "9" * 400}, {"status": "published"}, {"status": ""}, {"state": "delivered"},
        {"type": "a b"}, {"cursor": "x"}, {"status": "null"}, {"limit": "null"}, {"limit": ["1", "1"]},
    ):  # fmt: skip
        for path in ("/v1/commands", COMMANDS):
            answer = await client.get(path, params=query)
            assert answer.status_code == 400, query
            error = error_of(answer, 400, "invalid_request")
            assert error["details"]["field"] == next(iter(query)), (query, error)


async def test_a_wrong_host_header_is_the_callers_fault(broker: Broker) -> None:
    client = await broker.someone()
    error_of(await client.get("/healthz", headers={"Host": "a b/c"}), 400, "invalid_request")


async def test_an_unexpected_failure_is_logged_and_its_answer_has_no_details(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await broker.someone()

    async def fail(work: Callable[[Sqlite], object]) -> object:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(broker.core.storage, "read", fail)
    with structlog.testing.capture_logs() as logs:
        answer = await client.get("/v1/commands")

    error_of(answer, 500, "internal")
    assert "42" not in answer.text
    assert [entry["event"] for entry in logs] == ["http.failed"]


@pytest.mark.parametrize("failure", [Full("disk full"), Broken("input/output error")])
async def test_failed_disk_reads_are_answered_unavailable(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    client = await broker.someone()

    async def fail(work: Callable[[Sqlite], object]) -> object:
        raise failure

    monkeypatch.setattr(broker.core.storage, "read", fail)
    answer = await client.get("/v1/commands")

    error_of(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert str(failure) not in answer.text


async def test_with_a_full_disk_writes_are_unavailable_and_reads_work(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await broker.someone()
    await register(client)
    full = asyncio.Event()

    async def refuse(batch: Batch) -> Placed:
        full.set()
        raise Full("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(broker.core.storage, "append", refuse)
        first = await client.post(COMMANDS, json={"type": "blink"})
        assert full.is_set()
        second = await client.post(COMMANDS, json={"type": "blink"})
        third = await client.patch("/v1/devices/lamp-1", json={"name": "Lamp"})
        reads = await client.get("/v1/commands")

    for answer in (first, second, third):
        error_of(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "1"
    assert (reads.status_code, reads.json()["data"]) == (200, [])
    async with asyncio.timeout(120):
        await broker.core.writer.opened()
    assert (await client.post(COMMANDS, json={"type": "blink"})).status_code == 201


REFUSED: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/devices", {"hardware_id": "lamp-1", "type": "generic"}, 409),
    ("DELETE", "/v1/devices/lamp-1", None, 409),
    ("POST", COMMANDS, {"type": "blink"}, 429),
    ("POST", COMMANDS, {"type": "blink", "idempotency_key": "k"}, 429),
    ("POST", "/v1/commands/{}/retry", None, 409),
    ("POST", "/v1/commands/{}/abandon", None, 409),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), REFUSED)
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
async def test_a_refusal_waits_until_its_decision_is_durable(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    body: Any,
    status: int,
    lost: bool,
) -> None:
    async with running(tmp_path / "data", Limits(queue_per_device=1)) as broker:
        client, live = await broker.someone(), broker.core.live
        await register(client)
        storage, gate = broker.core.storage, asyncio.Event()
        append = storage.append

        async def held(batch: Batch) -> Placed:
            await gate.wait()
            if lost:
                monkeypatch.undo()
                raise Full("disk full")
            return await append(batch)

        monkeypatch.setattr(storage, "append", held)
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            earlier = group.create_task(client.post(COMMANDS, json={"type": "blink"}))
            while not live.members:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            command_id = next(iter(live.members))
            request = client.request(method, path.format(command_id), json=body)
            answer = group.create_task(request)
            for _ in range(20):
                await storage.read(
                    plain(lambda sql: None)
                )  # gives the database's thread and the loop time to run
            assert not answer.done()
            gate.set()
        assert earlier.result().status_code == (503 if lost else 201)
        assert answer.result().status_code == (503 if lost else status), answer.result().text
