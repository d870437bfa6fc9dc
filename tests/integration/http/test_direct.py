"""A create by the direct path and by Litestar's general path: the same answers and headers.

A path that ends with a slash takes the general path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from litestar import Litestar
from litestar.types import Receive, Scope, Send

from tests.integration.http.support import READ, Broker, register, running

Headers = dict[bytes, bytes]
PATHS = ("/v1/devices/{}/commands", "/v1/devices/{}/commands/")
JSON = {b"content-type": b"application/json"}
BLINK = b'{"type":"blink"}'
# What differs between two equal requests.
OF_ONE_REQUEST = ("x-request-id", "ratelimit")
OF_ONE_COMMAND = ("id", "created_at", "expires_at", "grant_token")
CASES: dict[str, tuple[str, Headers, bytes]] = {
    "accepted": ("lamp-1", JSON, BLINK),
    "with all fields": ("lamp-1", JSON, b'{"type":"blink","params":[1],"ttl_sec":null,"collapse_key":"k"}'),
    "content type with charset": ("lamp-1", {b"content-type": b"Application/JSON; charset=utf-8"}, BLINK),
    "wrong key": ("lamp-1", JSON | {b"authorization": b"Bearer ord_wrong"}, BLINK),
    "no scheme": ("lamp-1", JSON | {b"authorization": b"ord_wrong"}, BLINK),
    "no such device": ("lamp-9", JSON, BLINK),
    "reserved name": ("me", JSON, BLINK),
    "no body": ("lamp-1", JSON, b""),
    "no content type": ("lamp-1", {}, BLINK),
    "no JSON": ("lamp-1", JSON, b"{"),
    "not UTF-8": ("lamp-1", JSON, b'{"type":"\xff"}'),
    "too deep": ("lamp-1", JSON, b'{"type":"blink","params":' + b"[" * 3_000 + b"]" * 3_000 + b"}"),
    "no type": ("lamp-1", JSON, b"{}"),
    "type of another type": ("lamp-1", JSON, b'{"type":5}'),
    "unknown field": ("lamp-1", JSON, b'{"type":"blink","colour":"red"}'),
    "wrong ttl": ("lamp-1", JSON, b'{"type":"blink","ttl_sec":0}'),
    "text for a number": ("lamp-1", JSON, b'{"type":"blink","ttl_sec":"5"}'),
    "wrong collapse key": ("lamp-1", JSON, b'{"type":"blink","collapse_key":"a b"}'),
    "wrong idempotency key": ("lamp-1", JSON, b'{"type":"blink","idempotency_key":""}'),
    "too large": ("lamp-1", JSON, b'{"type":"blink","params":"' + b"x" * 1_100_000 + b'"}'),
    "too many values": ("lamp-1", JSON, b'{"type":"blink","params":[' + b"1," * 200_000 + b"1]}"),
    "empty key": ("lamp-1", JSON | {b"idempotency-key": b""}, BLINK),
    "long key": ("lamp-1", JSON | {b"idempotency-key": b"k" * 256}, BLINK),
    "key that is not UTF-8": ("lamp-1", JSON | {b"idempotency-key": b"\xff"}, BLINK),
    "two different keys": (
        "lamp-1", JSON | {b"idempotency-key": b"a"}, b'{"type":"blink","idempotency_key":"b"}'
    ),
}  # fmt: skip


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        await register(await broker.someone())
        yield broker


async def _answers(client: httpx2.AsyncClient, case: str) -> list[Any]:
    """Of the direct path, then of the general one."""
    device, headers, content = CASES[case]
    found = []
    for path in PATHS:
        answer = await client.post(path.format(device), content=content, headers=headers)
        assert answer.headers.keys() >= {"x-request-id", "cache-control"}
        kept = {name: value for name, value in answer.headers.items() if name not in OF_ONE_REQUEST}
        body = {name: value for name, value in answer.json().items() if name not in OF_ONE_COMMAND}
        found.append((answer.status_code, kept, body))
    return found


async def test_both_paths_give_the_same_answer(broker: Broker) -> None:
    client = await broker.someone()
    for case in CASES:
        direct, general = await _answers(client, case)
        assert direct == general, case


async def test_only_a_usual_request_takes_the_direct_path(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    general, whole = [], Litestar.__call__

    async def noted(app: Litestar, scope: Scope, receive: Receive, send: Send) -> None:
        general.append(scope["path"])
        await whole(app, scope, receive, send)

    client = await broker.someone()
    monkeypatch.setattr(Litestar, "__call__", noted)
    usual = PATHS[0].format("lamp-1")

    for method, path, keys, status in (
        ("POST", usual, [], 201),
        ("POST", usual, ["a"], 201),
        ("POST", usual, ["b", "c"], 201),
        ("POST", usual + "?wait=1", [], 202),
        ("POST", usual + "?colour=red", [], 400),
        ("POST", PATHS[1].format("lamp-1"), [], 201),
        ("POST", PATHS[0].format("lamp%201"), [], 400),
        ("GET", usual, [], 200),
        ("HEAD", usual, [], 200),
    ):
        headers = [("content-type", "application/json"), *(("idempotency-key", key) for key in keys)]
        general.clear()
        answer = await client.request(method, path, content=BLINK, headers=headers)
        direct = method == "POST" and path == usual and len(keys) < 2
        assert (answer.status_code, bool(general)) == (status, not direct), (method, path, keys)


async def test_both_paths_refuse_a_key_without_the_scope(broker: Broker) -> None:
    direct, general = await _answers(await broker.someone(scopes=READ), "accepted")
    assert direct == general
    assert direct[0] == 403


@pytest.mark.parametrize("path", PATHS)
async def test_both_paths_count_the_same_route_and_refusals(broker: Broker, path: str) -> None:
    client = await broker.someone()
    for content in (BLINK, b"{}"):
        await client.post(path.format("lamp-1"), content=content, headers=JSON)
    metrics = (await client.get("/metrics")).text
    for status in (201, 400):
        counted = f'{{method="POST",route="/v1/devices/{{device}}/commands",status="{status}"}} 1.0'
        assert f"ordain_http_requests_total{counted}" in metrics
    assert 'ordain_refusals_total{code="invalid_request"} 1.0' in metrics
