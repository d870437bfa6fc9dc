"""Public paths: health, metrics, and a correct description of the API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx2
import jsonschema_rs
import pytest

from broker.control import services
from broker.http.app import _routes, create_app, warm
from broker.settings import Settings
from tests.integration.http.support import Broker, error_of, register, running


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


@pytest.fixture
async def description(broker: Broker) -> dict[str, Any]:
    answer = await broker.client().get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


async def test_healthz_is_ok_and_readyz_gives_reasons(broker: Broker) -> None:
    client = broker.client()

    assert (await client.get("/healthz")).json() == {"status": "ok"}
    answer = await client.get("/readyz")
    error = error_of(answer, 503, "unavailable")
    assert error["details"] == {"reasons": ["mqtt: not connected to the MQTT server"]}
    assert answer.headers["retry-after"] == "1"
    broker.link.up = True
    assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_a_head_request_is_answered_like_a_get(broker: Broker) -> None:
    client = await broker.someone()
    for path in ("/healthz", "/v1/devices"):
        assert (await client.head(path)).status_code == 200
    assert (await client.head("/v1/devices/nobody")).status_code == 404


async def test_answers_may_not_be_cached(broker: Broker) -> None:
    client = await broker.someone()
    for path in ("/v1/devices", "/v1/nothing", "/healthz"):
        answer = await client.get(path)
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_metrics_count_requests_by_route_and_events_by_type(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    command = (await client.post("/v1/devices/lamp-1/commands", json={"type": "blink"})).json()
    await client.get("/v1/commands/cmd_none")
    for method in ("GET", "BREW", "STEEP"):
        await client.request(method, "/nowhere/at/all")
    broker.online("lamp-1")
    while (await client.get(f"/v1/commands/{command['id']}")).json()["state"] != "published":
        pass
    broker.says("lamp-1", json.dumps({"id": command["id"], "status": "executed"}).encode())
    broker.says("lamp-1", b"[")
    while (await client.get(f"/v1/commands/{command['id']}")).json()["state"] != "executed":
        pass
    await register(client, "lamp-2")
    await client.post("/v1/devices/lamp-2/commands", json={"type": "blink"})

    answer = await client.get("/metrics")

    assert answer.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    lines = set(answer.text.splitlines())
    for line in (
        'ordain_http_requests_total{method="POST",route="/v1/devices/{device}/commands",status="201"} 2.0',
        'ordain_http_requests_total{method="GET",route="/v1/commands/{command_id}",status="404"} 1.0',
        'ordain_http_requests_total{method="-",route="-",status="404"} 3.0',
        'ordain_events_total{type="created"} 2.0',
        'ordain_events_total{type="executed"} 1.0',
        'ordain_unmatched_total{reason="malformed"} 1.0',
        'ordain_command_stage_seconds_count{stage="created_to_published"} 1.0',
        'ordain_command_stage_seconds_count{stage="published_to_result"} 1.0',
        "ordain_promise_broken_total 0.0",
        "ordain_open_commands 1.0",
        "ordain_open_lanes 1.0",
        "ordain_devices_online 1.0",
        "ordain_send_slots 100.0",
        "ordain_ready 1.0",
        'ordain_command_attempts_bucket{end="executed",le="1.0"} 1.0',
        "ordain_mqtt_link_up 1.0",
        "ordain_log_writable 1.0",
    ):
        assert line in lines, line
    assert command["id"] not in answer.text
    assert "lamp-1" not in answer.text


async def test_the_documentation_loads_nothing_from_other_hosts(broker: Broker) -> None:
    answer = await broker.client().get("/docs")

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "://" not in answer.text


async def test_every_operation_is_described_and_every_error_has_the_common_form(
    description: dict[str, Any],
) -> None:
    assert description["openapi"].startswith("3.1")
    assert description["components"]["securitySchemes"].keys() == {"bearer", "key", "ticket"}
    assert description["security"] == [{"bearer": []}, {"key": []}]
    for path, item in description["paths"].items():
        assert not path.startswith("/local")
        for method, operation in item.items():
            assert operation["summary"], (method, path)
            assert {*operation["tags"]} <= {tag["name"] for tag in description["tags"]}, (method, path)
            assert all(each["description"] for each in operation.get("parameters", [])), (method, path)
            errors = {status: found for status, found in operation["responses"].items() if status >= "400"}
            for status, found in errors.items():
                schema = found["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (method, path, status)
            if path.startswith(("/v1", "/devices", "/commands")):
                assert {"400", "401", "403", "503"} <= errors.keys()
            else:
                assert operation["security"] == [{}]
    create = description["paths"]["/v1/devices/{device}/commands"]["post"]
    assert set(create["responses"]) == {
        "200", "201", "202", "400", "401", "403", "404", "409", "410", "413", "415", "429", "503",
    }  # fmt: skip
    assert description["components"]["schemas"]["CommandBody"]["additionalProperties"] is False


async def test_answers_match_the_openapi_description(broker: Broker, description: dict[str, Any]) -> None:
    client = await broker.someone()

    async def check(method: str, path: str, where: str, **kwargs: Any) -> dict[str, Any]:
        answer = await client.request(method, where, **kwargs)
        content = description["paths"][path][method.lower()]["responses"][str(answer.status_code)]["content"]
        schema = content["application/json"]["schema"] | {"components": description["components"]}
        found: dict[str, Any] = answer.json()
        jsonschema_rs.validator_for(schema).validate(found)
        return found

    body = {"hardware_id": "lamp-1", "type": "generic"}
    await check("POST", "/v1/devices", "/v1/devices", json=body)
    await check("POST", "/v1/devices", "/v1/devices", json=body)
    await check("GET", "/v1/devices/{device}", "/v1/devices/lamp-1")
    await check("GET", "/v1/devices", "/v1/devices")
    await check("PATCH", "/v1/devices/{device}", "/v1/devices/lamp-1", json={"name": "Hall"})
    await check("POST", "/v1/devices/{device}/token", "/v1/devices/lamp-1/token")
    commands, path = "/v1/devices/lamp-1/commands", "/v1/devices/{device}/commands"
    key = {"type": "blink", "idempotency_key": "k"}
    command = await check("POST", path, commands, json=key)
    await check("POST", path, commands, json=key)
    await check("POST", path, commands, json={"type": 1})
    await check("GET", path, commands)
    one = f"/{command['id']}"
    await check("GET", path + "/{command_id}", commands + one)
    await check("POST", "/v1/commands/{command_id}/abandon", f"/v1/commands{one}/abandon")
    await check("DELETE", path + "/{command_id}", commands + one)
    await check("GET", "/v1/commands", "/v1/commands")
    await check("GET", "/v1/commands/{command_id}", f"/v1/commands{one}")
    await check("GET", "/v1/commands/{command_id}/events", f"/v1/commands{one}/events")
    await check("GET", "/v1/types", "/v1/types")
    await check("GET", "/readyz", "/readyz")
    await check("GET", "/healthz", "/healthz")
    await check("GET", "/.well-known/jwks.json", "/.well-known/jwks.json")


async def test_metrics_are_rendered_at_most_once_a_second(broker: Broker) -> None:
    metrics = services(broker.core).metrics
    first = metrics.text()
    metrics.refused("not_found")
    if metrics.now_ms() < metrics._text_at + 1_000:
        assert metrics.text() == first
    assert metrics.text(fresh=True) != first


async def test_an_app_uses_the_routes_that_warm_built(broker: Broker) -> None:
    _routes.cache_clear()
    warm()
    built = _routes.cache_info().misses
    for local in (False, True):
        create_app(services(broker.core), local=local)
    assert _routes.cache_info().misses == built


async def test_metrics_may_need_an_admin_key_or_be_off(broker: Broker) -> None:
    _, admin = await broker.core.keys.create("acme", ("admin",), None)
    _, reader = await broker.core.keys.create("acme", ("devices:read",), None)
    for mode, status in (("key", [401, 403, 200]), ("off", [404, 404, 404]), ("127.0.0.1:9100", [404] * 3)):
        parts = services(broker.core, Settings(metrics=mode))
        transport = httpx2.ASGITransport(app=cast(Any, create_app(parts)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://ordain") as client:
            keys = [{}, *({"Authorization": f"Bearer {key}"} for key in (reader, admin))]
            assert [(await client.get("/metrics", headers=each)).status_code for each in keys] == status
        operator = httpx2.ASGITransport(app=cast(Any, create_app(parts, local=True)))
        async with httpx2.AsyncClient(transport=operator, base_url="http://ordain") as client:
            assert (await client.get("/metrics")).status_code == 200
