"""The largest input that each route allows does not hold the event loop up."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from broker.settings import Limits
from tests.integration.http.support import WRITE, register, running
from tests.largest import inputs
from tests.stretches import LONGEST_SEC, Stretches


async def longest_by_route(directory: Path) -> dict[tuple[str, str], float]:
    """The longest stretch of the loop, in seconds, by route. scripts/bench/stretches.py prints it."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    async with running(directory) as broker:
        client = await broker.someone(scopes=(*WRITE, "admin"))
        await register(client)
        command = (await client.post("/v1/devices/lamp-1/commands", json={"type": "on"})).json()
        names = dict.fromkeys(("device", "device_ident", "devices", "device_idents"), "lamp-1")
        names |= dict.fromkeys(("command_id", "command"), command["id"])
        names |= dict.fromkeys(("type", "device_type"), "generic")
        openapi = (await client.get("/openapi.json")).json()
        accepted = 0
        for method, route, path, _, body in inputs(openapi, names, Limits()):
            headers = {} if body is None else {"content-type": "application/json"}
            async with Stretches() as longest:
                answer = await client.request(method.upper(), path, content=body, headers=headers)
            assert answer.status_code < 500 or route == "/readyz", answer.text
            accepted += body is not None and len(body) > 5_000 and answer.status_code == 201
            found[method, route] = max(found[method, route], longest.cpu_sec)
        assert accepted >= 10, "the largest parameters are allowed"
    return found


async def test_no_route_holds_the_loop_up_with_the_largest_input_it_allows(tmp_path: Path) -> None:
    found = await longest_by_route(tmp_path)
    assert len(found) > 50
    assert {route: sec for route, sec in found.items() if sec >= LONGEST_SEC} == {}
