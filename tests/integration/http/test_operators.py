"""What operators ask of the broker itself: keys, figures, verifying the log, and the files of the console."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.http.console.pages import STATIC
from broker.seams import Sqlite
from projections import figures
from tests.integration.http.support import Broker, error_of, register, running
from tests.reading import tamper

FIRST_VIEW_BYTES = 60_000
WITHIN_SEC = 120


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data") as broker:
        yield broker


async def get(client: httpx2.AsyncClient, path: str) -> dict[str, Any]:
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def send(client: httpx2.AsyncClient, device: str = "lamp-1", **fields: Any) -> str:
    answer = await client.post(f"/v1/devices/{device}/commands", json={"type": "blink"} | fields)
    assert answer.status_code == 201, answer.text
    made: str = answer.json()["id"]
    return made


async def becomes(client: httpx2.AsyncClient, command_id: str, state: str) -> None:
    async with asyncio.timeout(WITHIN_SEC):
        while (await get(client, f"/v1/commands/{command_id}"))["state"] != state:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# --- keys ------------------------------------------------------------------------------------------


async def test_an_admin_makes_lists_and_revokes_keys(broker: Broker) -> None:
    admin = await broker.someone("ops", ("admin",))

    made = await admin.post("/v1/keys", json={"project": "acme", "scopes": ["devices:read"], "name": "night"})

    assert made.status_code == 201
    key = made.json()
    client = broker.client(key["key"])
    assert (await get(client, "/v1/system"))["caller"] == {
        "key_id": key["id"],
        "project": "acme",
        "scopes": ["devices:read"],
    }
    listed = await get(admin, "/v1/keys")
    assert {each["id"]: each["name"] for each in listed["data"]}[key["id"]] == "night"
    assert len(listed["data"]) == 2
    assert key["key"] not in str(listed)
    revoked = (await admin.delete(f"/v1/keys/{key['id']}")).json()
    assert revoked["revoked_at"] is not None
    error_of(await client.get("/v1/devices"), 401, "unauthorized")
    assert (await admin.delete(f"/v1/keys/{key['id']}")).json() == revoked
    error_of(await admin.delete("/v1/keys/key_none"), 404, "not_found")
    long = {"project": "acme", "scopes": ["admin"], "name": "x" * 201}
    assert (
        error_of(await admin.post("/v1/keys", json=long), 400, "invalid_request")["details"]["field"]
        == "name"
    )


async def test_only_admins_reach_keys_and_the_verification(broker: Broker) -> None:
    client = await broker.someone()
    for method, path in (
        ("GET", "/v1/keys"),
        ("POST", "/v1/keys"),
        ("DELETE", "/v1/keys/key_x"),
        ("POST", "/v1/system/verify"),
    ):
        error = error_of(await client.request(method, path), 403, "forbidden")
        assert error["details"] == {"scope": "admin"}


# --- figures ---------------------------------------------------------------------------------------


async def test_figures_count_states_and_measure_the_device(broker: Broker) -> None:
    client, neighbour = await broker.someone(), await broker.someone("other")
    admin = await broker.someone("ops", ("admin",))
    await register(client)
    await register(client, "lamp-2")
    await register(neighbour, "lamp-3")
    broker.online("lamp-1")
    done = await send(client)
    await becomes(client, done, "published")
    broker.says("lamp-1", json.dumps({"id": done, "status": "acknowledged"}).encode())
    broker.says("lamp-1", json.dumps({"id": done, "status": "executed"}).encode())
    await becomes(client, done, "executed")
    wrong = await send(client)
    await becomes(client, wrong, "published")
    broker.says("lamp-1", json.dumps({"id": wrong, "status": "failed", "error": "jammed"}).encode())
    await becomes(client, wrong, "failed")
    cancelled = await send(client, "lamp-2")
    await client.delete(f"/v1/devices/lamp-2/commands/{cancelled}")
    await send(client, "lamp-2")
    await send(neighbour, "lamp-3")

    seen, all_projects = await get(client, "/v1/stats?window=60"), await get(admin, "/v1/stats?window=60")

    states = {name: count for name, count in seen["states"].items() if count}
    assert states == {"executed": 1, "failed": 1, "cancelled": 1, "pending": 1}
    assert all_projects["states"]["pending"] == 2
    assert len(seen["volume"]) == 60
    assert sum(piece["created"] for piece in seen["volume"]) == 4
    assert sum(piece["created"] for piece in all_projects["volume"]) == 5
    assert sum(piece["failed"] for piece in seen["volume"]) == 1
    assert seen["commands_per_minute"] == 4
    assert 0 <= seen["acknowledge"]["p50_ms"] <= seen["execute"]["p95_ms"] < WITHIN_SEC * 1_000
    empty = await get(await broker.someone("nobody"), "/v1/stats")
    assert (sum(empty["states"].values()), empty["execute"]["p50_ms"], empty["window_sec"]) == (0, None, 300)
    for window in ("9", "86401", "x"):
        error_of(await client.get(f"/v1/stats?window={window}"), 400, "invalid_request")


async def test_figures_of_too_much_are_of_a_shorter_time(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await broker.someone()
    await register(client)
    for _ in range(5):
        command = await send(client)
        await client.delete(f"/v1/devices/lamp-1/commands/{command}")
    whole = await get(client, "/v1/stats?window=60")
    monkeypatch.setattr(figures, "MOST_CLOSED", 3)

    part = await get(client, "/v1/stats?window=60")

    assert (whole["states"]["cancelled"], part["states"]["cancelled"]) == (5, 3)
    assert part["since"] > whole["since"]
    assert part["window_sec"] < whole["window_sec"]


# --- verifying -------------------------------------------------------------------------------------


async def verified(client: httpx2.AsyncClient) -> dict[str, Any]:
    answer = await client.post("/v1/system/verify")
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    async with asyncio.timeout(WITHIN_SEC):
        while (found := (await get(client, "/v1/system"))["verify"])["state"] == "running":  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    report: dict[str, Any] = found
    return report


async def test_a_running_broker_verifies_its_log_and_names_a_changed_row(broker: Broker) -> None:
    client, admin = await broker.someone(), await broker.someone("ops", ("admin",))
    await register(client)
    command = await send(client)
    assert (await get(admin, "/v1/system"))["verify"] is None

    good = await verified(admin)

    assert (good["state"], good["fault"]) == ("good", None)
    assert good["rows"] == (await get(client, "/v1/system"))["position"]
    assert good["started_at"] <= good["finished_at"]

    def change(sql: Sqlite) -> object:
        return sql.execute("UPDATE events SET actor = 'key:other' WHERE stream = ?", (command,))

    await tamper(broker.core.storage, change)
    bad = await verified(admin)
    assert bad["state"] == "bad"
    assert "does not follow" in bad["fault"]
    assert bad["rows"] < bad["of"]
    mine = (await get(client, "/v1/system"))["verify"]
    assert (mine["state"], mine["fault"]) == ("bad", None)


async def test_the_system_says_how_the_log_and_its_limits_are(broker: Broker) -> None:
    client = await broker.someone()
    await register(client)
    for _ in range(3):
        await send(client)

    seen = await get(client, "/v1/system")

    assert seen["log"]["bytes"] > 0
    assert seen["log"]["first_at"] <= seen["clock"]["now"]
    assert 0 <= seen["log"]["append_p50_ms"] <= seen["log"]["append_p95_ms"]
    assert {each["name"]: each["used"] for each in seen["limits"]}["queue of lamp-1"] == 3
    assert [each["lag"] for each in seen["subscribers"]] == [0, 0]


# --- the console's files -----------------------------------------------------------------------------


async def test_the_root_leads_to_the_console_and_every_address_of_it_is_its_page(broker: Broker) -> None:
    client = broker.client()
    root = await client.get("/")
    assert (root.status_code, root.headers["location"]) == (307, "/console")
    page = await client.get("/console")
    for path in ("/console/commands/cmd_1", "/console/devices/lamp-1", "/console/system?at=3"):
        assert (await client.get(path)).text == page.text
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "script-src 'self';" in policy
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=", page.text)


async def test_files_are_compressed_and_not_sent_twice(broker: Broker) -> None:
    client = broker.client()
    path = "/console/assets/now.mjs"
    packed = await client.get(path, headers={"Accept-Encoding": "gzip"})
    plain = await client.get(path, headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content == (STATIC / "now.mjs").read_bytes()
    assert plain.headers["content-type"].startswith("text/javascript")
    again = await client.get(path, headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    large = await client.get(
        "/console/assets/vendor/swagger-ui/style.css", headers={"Accept-Encoding": "identity"}
    )
    assert b".swagger-ui" in large.content


@pytest.mark.parametrize(
    "path", ["nothing.mjs", "../pages.py", "%2e%2e/pages.py", "vendor", "vendor/swagger-ui/style.css.gz", ""]
)
async def test_what_is_no_file_of_the_console_is_not_found(broker: Broker, path: str) -> None:
    answer = await broker.client().get(f"/console/assets/{path}")
    assert answer.status_code == 404 or "<!doctype html>" in answer.text


async def test_the_first_view_is_small(broker: Broker) -> None:
    """Everything the page loads before anything is asked for: itself, its style, and all its modules."""
    client = broker.client()
    page = (await client.get("/console")).text
    wanted = {"/console", *re.findall(r'(?:src|href)="(/[^"]+)"', page)}
    seen: set[str] = set()
    size = 0
    while wanted - seen:
        path = (wanted - seen).pop()
        seen.add(path)
        content = (await client.get(path)).content
        size += len(gzip.compress(content, 9, mtime=0))
        folder = path.rpartition("/")[0]
        for name in re.findall(r'^(?:import|export)[^;]*?"(\.{0,1}/[^"]+)";', content.decode(), re.MULTILINE):
            wanted.add(name if name.startswith("/") else f"{folder}/{name.removeprefix('./')}")
    assert "/console/assets/parts.mjs" in seen
    assert size < FIRST_VIEW_BYTES


def test_every_vendored_file_is_listed_with_version_and_licence() -> None:
    notice = (STATIC / "NOTICE").read_text()
    vendored = Path(str(STATIC / "vendor"))
    for path in vendored.rglob("*"):
        if path.is_file():
            assert path.name in notice, path
    for path in vendored.glob("*.mjs"):
        assert not re.search(r'(?:from|import) ?"[^./]', path.read_text()), path
