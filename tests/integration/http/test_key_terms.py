"""What limits an API key: its expiry, its own rates, and the devices that it sees and commands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.domain.cloudevents import Wanted
from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceSet
from broker.engine.keys import Keys, Terms
from broker.http.edge.auth import OPERATOR
from broker.settings import Limits
from broker.subscriptions.webhook_worker import NoWayOut
from tests.integration.core_support import ManualClock
from tests.integration.http.support import WRITE, Broker, error_of, register, running

DOORS = {"device_prefixes": ["door-"], "devices": ["gate-1"]}
FOREIGN = "/v1/devices/lamp-1"


class Silent(NoWayOut):
    """Takes every URL; nothing is delivered."""

    async def fault(self, url: str) -> str | None:
        return None


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with running(tmp_path / "data", clock=ManualClock(), outbound=Silent()) as broker:
        yield broker


async def made(broker: Broker, **terms: Any) -> dict[str, Any]:
    """A key of the project `acme`, made by an admin over HTTP."""
    admin = await broker.someone("ops", ("admin",))
    body = {"project": "acme", "scopes": WRITE} | terms
    answer = await admin.post("/v1/keys", json=body)
    assert answer.status_code == 201, answer.text
    key: dict[str, Any] = answer.json()
    return key


async def house(broker: Broker) -> tuple[httpx2.AsyncClient, httpx2.AsyncClient, dict[str, str]]:
    """The owner of door-1, gate-1 and lamp-1 and a command of each; and a client limited to the first two."""
    owner = await broker.someone()
    ids = {}
    for name in ("door-1", "gate-1", "lamp-1"):
        await register(owner, name)
        sent = await owner.post(f"/v1/devices/{name}/commands", json={"type": "blink", "ttl_sec": None})
        ids[name] = sent.json()["id"]
    return owner, broker.client((await made(broker, **DOORS))["key"]), ids


async def test_a_key_with_a_device_set_sees_only_its_devices_in_every_list(broker: Broker) -> None:
    _, limited, ids = await house(broker)

    async def read(path: str) -> Any:
        answer = await limited.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    head = broker.core.feed.head
    for past in ("", f"?as_of={head}"):
        devices = (await read(f"/v1/devices{past}"))["data"]
        assert [device["hardware_id"] for device in devices] == ["gate-1", "door-1"]
        commands = (await read(f"/v1/commands{past}"))["data"]
        assert [command["id"] for command in commands] == [ids["gate-1"], ids["door-1"]]
    assert (await read("/v1/commands?device=lamp-1"))["data"] == []
    assert {event["data"]["hardware_id"] for event in (await read("/v1/events"))["data"]} == {
        "door-1",
        "gate-1",
    }
    changes = (await read("/v1/diff"))["data"]
    assert len(changes) == 4
    assert "lamp-1" not in str(changes)
    system, stats = await read("/v1/system"), await read("/v1/stats")
    assert (system["devices"]["known"], system["open_commands"]) == (2, 2)
    assert (stats["states"]["pending"], sum(piece["created"] for piece in stats["volume"])) == (2, 2)
    body = {"name": "blink", "device_idents": ["door-1", "lamp-1"], "start": "2020-01-01"}
    history = (await limited.post("/v1/app/command/history", json=body)).json()
    assert (len(history["door-1"]), history["lamp-1"]) == (1, [])


async def test_a_foreign_device_is_not_found_as_one_that_does_not_exist(broker: Broker) -> None:
    _, limited, ids = await house(broker)
    foreign = ids["lamp-1"]
    for method, path, body in (
        ("GET", FOREIGN, None),
        ("PATCH", FOREIGN, {"name": "x"}),
        ("DELETE", FOREIGN, None),
        ("POST", f"{FOREIGN}/token", None),
        ("GET", f"{FOREIGN}/lane", None),
        ("GET", f"{FOREIGN}/commands", None),
        ("POST", f"{FOREIGN}/commands", {"type": "blink"}),
        ("POST", f"{FOREIGN}/commands", {"type": "blink", "idempotency_key": "k"}),
        ("POST", f"{FOREIGN}/heartbeat", None),
        ("POST", f"{FOREIGN}/commands/claim", None),
        ("GET", f"/v1/commands/{foreign}", None),
        ("GET", f"/v1/commands/{foreign}/events", None),
        ("GET", f"/v1/commands/{foreign}/explain", None),
        ("POST", f"/v1/commands/{foreign}/retry", None),
        ("POST", f"/v1/commands/{foreign}/abandon", None),
        ("DELETE", f"{FOREIGN}/commands/{foreign}", None),
        ("POST", "/devices/lamp-1/commands", {"command": "blink"}),
        ("GET", "/devices/lamp-1/commands", None),
        ("GET", f"/commands/{foreign}", None),
    ):
        unknown = path.replace("lamp-1", "lamp-9").replace(foreign, "cmd_none")
        answers = [await limited.request(method, each, json=body) for each in (path, unknown)]
        said = [error_of(each, 404, "not_found")["message"] for each in answers]
        assert said[0].replace("lamp-1", "lamp-9").replace(foreign, "cmd_none") == said[1], (method, path)
    sent = await limited.post("/v1/commands", json={"devices": ["door-1", "lamp-1"], "type": "blink"})
    assert sent.json()["lamp-1"]["error"]["code"] == "not_found"
    assert "command_id" in sent.json()["door-1"]
    cancelled = (await limited.post("/v1/commands/cancel", json={"all": True})).json()["cancelled"]
    assert (len(cancelled), foreign in cancelled) == (3, False)


async def test_a_key_registers_only_devices_of_its_set(broker: Broker) -> None:
    _, limited, _ = await house(broker)

    await register(limited, "door-2")

    for name in ("lamp-1", "lamp-2"):
        answer = await limited.post("/v1/devices", json={"hardware_id": name, "type": "generic"})
        error_of(answer, 403, "forbidden")


async def test_an_idempotency_key_of_a_foreign_command_is_no_conflict(broker: Broker) -> None:
    owner, limited, _ = await house(broker)
    body = {"type": "blink", "idempotency_key": "k"}
    await owner.post(f"{FOREIGN}/commands", json=body)

    first = await limited.post("/v1/devices/door-1/commands", json=body)
    again = await limited.post("/v1/devices/door-1/commands", json=body)

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]


async def test_a_webhook_of_a_limited_key_is_limited_too(broker: Broker) -> None:
    owner, limited, _ = await house(broker)
    url = {"url": "https://example.org/"}
    own = (await limited.post("/v1/webhooks", json=url)).json()["id"]
    whole = (await owner.post("/v1/webhooks", json=url)).json()["id"]

    assert [each["id"] for each in (await limited.get("/v1/webhooks")).json()["data"]] == [own]
    assert len((await owner.get("/v1/webhooks")).json()["data"]) == 2
    error_of(await limited.get(f"/v1/webhooks/{whole}"), 404, "not_found")
    webhooks, admin = broker.core.webhooks, OPERATOR
    endpoint = webhooks.seen(admin, own).endpoint
    positions = range(1, broker.core.feed.head + 1)
    seen = [await webhooks.sender.entry(endpoint, position) for position in positions]
    assert {entry.hardware_id for entry in seen if entry is not None} == {"door-1", "gate-1"}


async def test_a_stream_of_a_limited_key_gets_its_devices_only(broker: Broker) -> None:
    owner, _, _ = await house(broker)
    wanted = Wanted(project="acme", within=DeviceSet(prefixes=("door-",)))
    with broker.core.feed.subscribed(wanted, broker.core.feed.head) as subscription:
        for name in ("lamp-1", "door-1"):
            await owner.post(f"/v1/devices/{name}/commands", json={"type": "blink"})
        found = await subscription.next(5)
    assert [entry.hardware_id for entry in found or ()] == ["door-1"]


async def test_a_key_expires_and_its_streams_end(broker: Broker) -> None:
    key = await made(broker, expires_in_sec=60)
    client = broker.client(key["key"])
    ended: list[str] = []
    broker.core.keys.ended = ended.append
    assert (await client.get("/v1/devices")).status_code == 200

    assert isinstance(broker.core.writer.clock, ManualClock)
    broker.core.writer.clock.pass_ms(60_000)
    broker.core.keys.tick()
    broker.core.keys.tick()

    error_of(await client.get("/v1/devices"), 401, "unauthorized")
    assert ended == [f"key:{key['id']}"]
    admin = await broker.someone("ops", ("admin",))
    shown = (await admin.get(f"/v1/keys/{key['id']}")).json()
    assert (shown["state"], shown["last_used_at"]) == ("expired", shown["created_at"])


async def test_a_key_shows_its_terms_and_keeps_them(broker: Broker) -> None:
    terms = {"name": "night shift", "commands_per_minute": 5, "requests_per_minute": 0, **DOORS}
    key = await made(broker, **terms, expires_at="2099-01-01T00:00:00Z")
    await broker.client(key["key"]).get("/v1/devices")
    broker.core.keys.save_uses()
    await broker.core.writer.barrier()

    again = Keys(broker.core.writer)
    await again.load()

    found = again.get(key["id"])
    assert found.terms == Terms(
        expires_at=4_070_908_800_000,
        devices=DeviceSet(names=frozenset(["gate-1"]), prefixes=("door-",)),
        commands_per_minute=5,
        requests_per_minute=0,
    )
    assert again.last_used(found) == broker.core.writer.now()
    assert terms.items() <= key.items()


@pytest.mark.parametrize(
    ("terms", "field"),
    [
        ({"devices": []}, "devices"),
        ({"devices": ["a/b"]}, "devices"),
        ({"device_prefixes": [""]}, "device_prefixes"),
        ({"devices": ["a"], "scopes": ["admin"]}, "devices"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_in_sec": 0}, "expires_in_sec"),
        ({"expires_in_sec": 9, "expires_at": "2099-01-01T00:00:00Z"}, "expires_in_sec"),
        ({"commands_per_minute": -1}, "commands_per_minute"),
    ],
)
async def test_wrong_terms_are_refused_by_name(broker: Broker, terms: dict[str, Any], field: str) -> None:
    admin = await broker.someone("ops", ("admin",))
    answer = await admin.post("/v1/keys", json={"project": "acme", "scopes": ["devices:read"]} | terms)
    assert error_of(answer, 400, "invalid_request")["details"]["field"].startswith(field)


async def test_a_keys_own_rates_are_shown_and_hold(broker: Broker) -> None:
    await register(await broker.someone())
    key = await made(broker, commands_per_minute=1, requests_per_minute=3)
    client, path = broker.client(key["key"]), f"{FOREIGN}/commands"

    first = await client.post(path, json={"type": "blink"})
    second = await client.post(path, json={"type": "blink"})
    read = await client.get("/v1/devices")
    last = await client.get("/v1/devices")

    assert first.headers["ratelimit-policy"] == '"requests";q=3;w=60, "key";q=1;w=60'
    assert first.headers["ratelimit"] == '"requests";r=2;t=20, "key";r=0;t=60'
    error_of(second, 429, "rate_limit_exceeded")
    assert second.headers["retry-after"] == "60"
    assert read.headers["ratelimit"].startswith('"requests";r=0;t=60')
    error_of(last, 429, "rate_limit_exceeded")
    assert last.headers["retry-after"] == "20"


async def test_a_device_is_limited_whoever_sends(tmp_path: Path) -> None:
    limits = Limits(commands_per_minute_per_device=1, requests_per_minute_per_device=1)
    async with running(tmp_path / "data", limits, ManualClock()) as broker:
        one, other = await broker.someone(), await broker.someone()
        token = (await register(one))["device_token"]
        await register(one, "lamp-2")

        sent = await one.post(f"{FOREIGN}/commands", json={"type": "blink"})
        refused = await other.post(f"{FOREIGN}/commands", json={"type": "blink"})
        elsewhere = await other.post("/v1/devices/lamp-2/commands", json={"type": "blink"})
        beats = [await broker.client(token).post("/v1/devices/me/heartbeat") for _ in range(2)]

        assert (sent.status_code, elsewhere.status_code) == (201, 201)
        assert sent.headers["ratelimit"] == '"device";r=0;t=60'
        error_of(refused, 429, "rate_limit_exceeded")
        assert [beat.status_code for beat in beats] == [200, 429]


async def test_a_digest_with_a_pepper_needs_it_and_older_digests_stay_valid(broker: Broker) -> None:
    writer = broker.core.writer
    _, old = await broker.core.keys.create("acme", WRITE, None)
    peppered = Keys(writer, b"p" * 16)
    await peppered.load()
    key, new = await peppered.create("acme", WRITE, None)

    same, without, another = Keys(writer, b"p" * 16), Keys(writer), Keys(writer, b"q" * 16)
    for keys in (same, without, another):
        await keys.load()

    assert [keys.caller(old) is not None for keys in (same, without, another)] == [True, True, True]
    assert [keys.caller(new) is not None for keys in (same, without, another)] == [True, False, False]
    assert [keys.state(keys.get(key.id)) for keys in (same, without)] == ["active", "unusable"]
    with pytest.raises(Refusal):
        same.get("key_none")
