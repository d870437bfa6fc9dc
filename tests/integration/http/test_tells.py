"""What a stranger could learn from how long a refusal takes: the work is the same for every name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.core_support import until
from tests.integration.http.support import Broker, register, running
from tests.integration.http.test_commands import send

ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/v1/devices/{device}", None),
    ("PATCH", "/v1/devices/{device}", {"name": "a"}),
    ("DELETE", "/v1/devices/{device}", None),
    ("POST", "/v1/devices/{device}/token", None),
    ("POST", "/v1/devices/{device}/commands", {"type": "open"}),
    ("POST", "/v1/devices/{device}/commands", {"type": "open", "idempotency_key": "k"}),
    ("POST", "/v1/devices/{device}/heartbeat", {}),
    ("POST", "/v1/devices/{device}/commands/claim", None),
    ("GET", "/v1/devices/{device}/lane", None),
    ("GET", "/v1/devices/{device}/state", None),
    ("GET", "/v1/commands/{command}", None),
    ("GET", "/v1/commands/{command}/events", None),
    ("POST", "/v1/commands/{command}/abandon", None),
]


async def work_of(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, client: httpx2.AsyncClient, **asked: Any
) -> int:
    """How many look-ups in the storage a request needs; it is refused."""
    storage, count = broker.core.storage, 0
    read = storage.read

    async def counted(work: Any) -> Any:
        nonlocal count
        count += 1
        return await read(work)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read", counted)
        answer = await client.request(**asked)
    assert answer.status_code in (401, 404), answer.text
    return count


async def test_a_foreign_name_costs_what_an_unknown_one_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as broker:
        theirs, ours = await broker.someone("other"), await broker.someone("acme")
        await register(theirs, "theirs-1")
        command = (await send(theirs, "theirs-1"))["id"]
        unknown = command[:-4] + "0000"
        for method, path, body in ROUTES:
            work = [
                await work_of(
                    broker,
                    monkeypatch,
                    ours,
                    method=method,
                    json=body,
                    url=path.format(device=device, command=id),
                )
                for device, id in (("theirs-1", command), ("nobody-1", unknown))
            ]
            assert work[0] == work[1], (method, path)


async def test_a_wrong_token_costs_the_same_for_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as broker:
        await register(await broker.someone(), "lamp-1")
        work = [
            await work_of(
                broker,
                monkeypatch,
                broker.client(f"dtok_x.{name}"),
                method="POST",
                url="/v1/devices/me/heartbeat",
            )
            for name in ("lamp-1", "nobody-1")
        ]
    assert work == [1, 1]


async def test_another_projects_command_is_unknown(tmp_path: Path) -> None:
    async with running(tmp_path) as broker:
        theirs, ours = await broker.someone("other"), await broker.someone("acme")
        await register(theirs, "theirs-1")
        await register(ours, "ours-1")
        await register(ours, "ours-2")
        foreign, own = (await send(theirs, "theirs-1"))["id"], (await send(ours, "ours-2"))["id"]
        for id in (foreign, own):
            broker.says("ours-1", b'{"id": "%s", "status": "executed"}' % id.encode())
        await until(lambda: not broker.core.intake._queue)
        await broker.core.writer.barrier()
        found = (await ours.get("/v1/unmatched")).json()["data"]
    assert [each["reason"] for each in found] == ["wrong_device", "unknown"]
