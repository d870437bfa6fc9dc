"""Authorization: keys, scopes, projects, and the operator on the private socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from litestar.routes import HTTPRoute

from broker.engine.keys import SCOPES
from broker.http.schema.openapi import DESCRIBED
from tests.integration.http.support import READ, Broker, error_of, register, running

OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/.well-known/jwks.json"}
READS = [
    "/v1/devices", "/v1/devices/lamp-1", "/v1/devices/lamp-1/commands", "/v1/commands", "/v1/types",
]  # fmt: skip
WRITES = [
    ("POST", "/v1/devices"),
    ("PATCH", "/v1/devices/lamp-1"),
    ("POST", "/v1/devices/lamp-1/token"),
    ("POST", "/v1/devices/lamp-1/commands"),
    ("DELETE", "/v1/devices/lamp-1/commands/cmd_x"),
    ("POST", "/v1/commands/cmd_x/abandon"),
]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def test_without_a_valid_key_only_the_public_paths_answer(broker: Broker) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic c2tfbGl2ZTp4"},
        {"X-API-Key": ""},
        {"X-API-Key": "sk_live_\u00e9"},
    ):
        client = broker.client()
        for path in READS:
            sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            answer = await client.get(path, headers=sent)
            error_of(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in sorted(OPEN - {"/readyz"}):
        assert (await broker.client().get(path)).status_code == 200, path


async def test_a_key_works_in_either_header(broker: Broker) -> None:
    _, secret = await broker.core.keys.create("acme", READ, None)
    for headers in (
        {"Authorization": f"Bearer {secret}"},
        {"Authorization": f"bearer  {secret}"},
        {"X-API-Key": secret},
    ):
        assert (await broker.client().get("/v1/devices", headers=headers)).status_code == 200


async def test_a_key_is_honoured_when_the_other_header_holds_a_secret_of_a_proxy(broker: Broker) -> None:
    _, secret = await broker.core.keys.create("acme", READ, None)
    for headers in (
        {"Authorization": "Bearer eyJhbGciOi.of.the-proxy", "X-API-Key": secret},
        {"Authorization": "Basic dXNlcjpwYXNz", "X-API-Key": secret},
        {"Authorization": "Bearer ", "X-API-Key": secret},
        {"Authorization": f"Bearer {secret}", "X-API-Key": "of-the-gateway"},
    ):
        assert (await broker.client().get("/v1/devices", headers=headers)).status_code == 200, headers
    for headers in (
        {"Authorization": "Bearer sk_live_unknown", "X-API-Key": secret},  # ours, and wrong
        {"Authorization": "Bearer other", "X-API-Key": "another"},
    ):
        error_of(await broker.client().get("/v1/devices", headers=headers), 401, "unauthorized")


async def test_a_revoked_key_stops_working_at_once(broker: Broker) -> None:
    key, secret = await broker.core.keys.create("acme", READ, None)
    client = broker.client(secret)
    assert (await client.get("/v1/devices")).status_code == 200

    await broker.core.keys.revoke(key.id)

    error_of(await client.get("/v1/devices"), 401, "unauthorized")


async def test_a_key_is_limited_to_its_scopes(broker: Broker) -> None:
    await register(await broker.someone())
    reader, writer = await broker.someone(scopes=READ), await broker.someone(scopes=("devices:write",))

    for path in READS:
        assert (await reader.get(path)).status_code == 200
        error = error_of(await writer.get(path), 403, "forbidden")
        assert error["details"] == {"scope": "devices:read"}
    for method, path in WRITES:
        error = error_of(await reader.request(method, path, json={}), 403, "forbidden")
        assert error["details"] == {"scope": "devices:write"}


async def test_every_route_that_needs_a_key_names_its_scope() -> None:
    for router in DESCRIBED:
        for route in router.routes if router.path.startswith("/v1") else ():
            assert isinstance(route, HTTPRoute)
            for handler in route.route_handlers:
                if handler.include_in_schema is not False:
                    assert handler.opt["scope"] in SCOPES, handler


async def test_objects_of_another_project_look_like_missing_ones(broker: Broker) -> None:
    owner, stranger = await broker.someone(), await broker.someone("other")
    device = await register(owner)
    await register(owner, "lamp-2")
    await register(stranger, "theirs")
    command = (await owner.post("/v1/devices/lamp-1/commands", json={"type": "blink"})).json()

    def made_up(text: str) -> str:
        return text.replace(command["id"], "cmd_0").replace("lamp-1", "lamp-0").replace(device["id"], "dev_0")

    async def same(method: str, path: str, **body: object) -> None:
        """Asserts that the answer equals the answer for an unknown name, except for the name itself."""
        sent = body if method in ("POST", "PATCH") else None
        real = await stranger.request(method, path, json=sent)
        unreal = await stranger.request(method, made_up(path), json=sent)
        error_of(real, 404, "not_found")
        assert made_up(real.text) == unreal.text
        assert set(real.headers) == set(unreal.headers)

    for name in ("lamp-1", device["id"]):
        await same("GET", f"/v1/devices/{name}")
        await same("PATCH", f"/v1/devices/{name}", name="mine")
        await same("POST", f"/v1/devices/{name}/token")
        await same("GET", f"/v1/devices/{name}/commands")
        await same("POST", f"/v1/devices/{name}/commands", type="blink")
        await same("POST", f"/v1/devices/{name}/commands", type="blink", idempotency_key="k")
        await same("GET", f"/v1/devices/{name}/commands/{command['id']}")
        await same("DELETE", f"/v1/devices/{name}/commands/{command['id']}")
    await same("GET", f"/v1/devices/theirs/commands/{command['id']}")
    await same("DELETE", f"/v1/devices/theirs/commands/{command['id']}")
    await same("GET", f"/v1/commands/{command['id']}")
    await same("GET", f"/v1/commands/{command['id']}/events")
    await same("POST", f"/v1/commands/{command['id']}/abandon")
    assert (await stranger.get("/v1/commands")).json()["data"] == []
    assert (await stranger.get("/v1/commands", params={"device": "lamp-1"})).json()["data"] == []
    assert [d["hardware_id"] for d in (await stranger.get("/v1/devices")).json()["data"]] == ["theirs"]
    error_of(await owner.get(f"/v1/devices/lamp-2/commands/{command['id']}"), 404, "not_found")
    error_of(await owner.delete(f"/v1/devices/lamp-2/commands/{command['id']}"), 404, "not_found")
    assert (await owner.get(f"/v1/commands/{command['id']}")).json()["state"] == "pending"


async def test_an_admin_key_reads_and_writes_all_projects(broker: Broker) -> None:
    await register(await broker.someone())
    admin = await broker.someone("ops", ("admin",))

    own = await register(admin, "lamp-2")
    other = await register(admin, "lamp-3", project="acme")

    assert (own["project"], other["project"]) == ("ops", "acme")
    assert len((await admin.get("/v1/devices")).json()["data"]) == 3
    answer = await admin.post("/v1/devices/lamp-1/commands", json={"type": "blink"})
    assert answer.status_code == 201
    assert len((await (await broker.someone()).get("/v1/commands")).json()["data"]) == 1


# --- the private socket ------------------------------------------------------------------------------


def operator(broker: Broker) -> httpx2.AsyncClient:
    return broker.client(app=broker.private)


async def test_the_private_socket_creates_lists_and_revokes_keys(broker: Broker) -> None:
    local = operator(broker)

    made = await local.post("/local/keys", json={"project": "acme", "scopes": ["devices:read"], "name": "ci"})

    assert made.status_code == 201
    key = made.json()
    assert key["key"].startswith("sk_live_")
    assert (key["project"], key["scopes"], key["name"]) == ("acme", ["devices:read"], "ci")
    assert (await broker.client(key["key"]).get("/v1/devices")).status_code == 200
    listed = (await local.get("/local/keys")).json()["data"]
    assert [item["id"] for item in listed] == [key["id"]]
    assert key["key"] not in str(listed)
    revoked = await local.delete(f"/local/keys/{key['id']}")
    assert (revoked.status_code, revoked.json()["revoked_at"] is not None) == (200, True)
    error_of(await broker.client(key["key"]).get("/v1/devices"), 401, "unauthorized")
    error_of(await local.delete("/local/keys/key_none"), 404, "not_found")
    for wrong, field in (
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"project": "a b"}, "project"),
    ):
        answer = await local.post("/local/keys", json={"project": "acme", "scopes": ["admin"]} | wrong)
        assert error_of(answer, 400, "invalid_request")["details"]["field"] == field


async def test_on_the_private_socket_the_operator_needs_no_key(broker: Broker) -> None:
    local = operator(broker)

    device = await register(local)
    command = (await local.post("/v1/devices/lamp-1/commands", json={"type": "blink"})).json()

    assert device["project"] == "default"
    assert command["grant_token"] is not None
    assert (await register(local, "lamp-2", project="acme"))["project"] == "acme"


async def test_the_key_routes_do_not_exist_on_the_public_port(broker: Broker) -> None:
    admin = await broker.someone("ops", ("admin",))
    for client in (admin, broker.client()):
        for path in ("/local/keys", "//local/keys", "/local/keys/", "/local/keys/key_x", "/local"):
            for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS"):
                error_of(await client.request(method, path), 404, "not_found")
