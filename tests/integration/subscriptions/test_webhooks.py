"""Webhooks over real HTTP: signed, in order per device, at least once, and independent of each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from broker.domain.cloudevents import Entry
from broker.settings import Limits
from broker.subscriptions.outbound import HttpOutbound
from broker.subscriptions.webhook_worker import PARALLEL, Endpoint
from tests.integration.core_support import ME, until
from tests.integration.http.support import Broker, error_of, register, running
from tests.integration.subscriptions.receiver import Got, Receiver, receiving

WITHIN_SEC = 120
HERE = ("127.0.0.0/8",)


@asynccontextmanager
async def at_work(directory: Path, limits: Limits | None = None) -> AsyncIterator[Broker]:
    outbound = HttpOutbound(HERE)
    try:
        async with running(directory, limits, outbound=outbound) as broker:
            yield broker
    finally:
        await outbound.aclose()


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with at_work(tmp_path / "data") as broker:
        yield broker


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


async def hook(client: httpx2.AsyncClient, receiver: Receiver, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/webhooks", json={"url": receiver.url} | fields)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def create(client: httpx2.AsyncClient, device: str = "lamp-1", type: str = "blink") -> str:
    answer = await client.post(f"/v1/devices/{device}/commands", json={"type": type})
    assert answer.status_code == 201, answer.text
    command_id: str = answer.json()["id"]
    return command_id


async def read(client: httpx2.AsyncClient, made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/webhooks/{made['id']}")).json()
    return found


async def becomes(
    client: httpx2.AsyncClient, made: dict[str, Any], fact: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Waits until the endpoint fulfils the condition and returns it."""
    async with asyncio.timeout(WITHIN_SEC):
        while not fact(found := await read(client, made)):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return found


async def settled(client: httpx2.AsyncClient, made: dict[str, Any]) -> dict[str, Any]:
    """Waits until the endpoint has nothing left to deliver."""
    return await becomes(client, made, lambda found: found["lag"] == 0)


async def failing(client: httpx2.AsyncClient, made: dict[str, Any]) -> dict[str, Any]:
    return await becomes(client, made, lambda found: found["failing"] is not None)


def positions(got: list[Got], device: str | None = None) -> list[int]:
    return [each.position for each in got if device in (None, each.event["data"]["hardware_id"])]


# --- what arrives ----------------------------------------------------------------------------------


async def test_every_event_arrives_signed_as_a_cloud_event_in_order(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    made = await hook(client, receiver)
    device = await register(client)
    command_id = await create(client)
    broker.online("lamp-1")

    got = await receiver.count(4)

    assert [each.event["type"] for each in got] == [
        "ordain.device.registered.v1",
        "ordain.command.created.v1",
        "ordain.device.online.v1",
        "ordain.command.published.v1",
    ]
    for each in got:
        event = Webhook(made["secret"]).verify(each.body, each.headers)
        assert each.headers["content-type"] == "application/cloudevents+json"
        assert each.headers["webhook-id"] == f"{broker.core.log_id}_{event['id']}"
        assert event["source"] == f"/ordain/{broker.core.log_id}"
        assert event["data"]["device_id"] == device["id"]
    assert got[1].event["subject"] == command_id
    assert positions(got) == sorted(positions(got))


async def test_a_secret_is_shown_once_and_differs_per_webhook(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    first, second = await hook(client, receiver), await hook(client, receiver)

    assert first["secret"].startswith("whsec_")
    assert first["secret"] != second["secret"]
    for path in ("", f"/{first['id']}"):
        answer = await client.get(f"/v1/webhooks{path}")
        assert "whsec_" not in answer.text
    assert "whsec_" not in (await client.delete(f"/v1/webhooks/{first['id']}")).text


async def test_an_endpoint_gets_the_selected_events_of_its_own_project(broker: Broker) -> None:
    owner, stranger = await broker.someone(), await broker.someone("other")
    async with receiving() as by_type, receiving() as by_device, receiving() as theirs:
        lamp = await register(owner)
        await register(owner, "lamp-2")
        await hook(owner, by_type, events=["created", "cancelled"], type="blink")
        await hook(owner, by_device, device="lamp-2")
        await hook(stranger, theirs)
        ids = [await create(owner), await create(owner, "lamp-2"), await create(owner, type="shine")]
        await owner.delete(f"/v1/devices/lamp-1/commands/{ids[0]}")
        await register(stranger, "door")
        await theirs.count(1)
        await by_type.count(3)
        await by_device.count(1)

    found = [(each.event["subject"], each.event["type"].split(".")[2]) for each in by_type.got]
    assert sorted(found) == sorted(
        [(ids[0], "created"), (ids[1], "created"), (ids[0], "cancelled")], key=lambda each: each
    )
    assert [each.event["subject"] for each in by_device.got] == [ids[1]]
    assert [each.event["project"] for each in theirs.got] == ["other"]
    assert lamp["id"] not in str(by_device.got)


async def test_events_erased_before_delivery_are_sent_without_their_data(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    await register(client)
    await hook(client, receiver, events=["created"])
    receiver.gate.clear()
    await create(client, type="shine")
    await receiver.count(1)
    secret = await create(client, type="s3cret")

    await broker.core.erasures.delete(ME, secret)
    receiver.gate.set()
    got = await receiver.count(2)

    assert got[1].event["erased"] is True
    assert got[1].event["subject"] == secret
    assert b"s3cret" not in got[1].body


async def test_a_new_event_is_sent_without_another_read_of_the_log(
    broker: Broker, receiver: Receiver
) -> None:
    client, sender, read = await broker.someone(), broker.core.webhooks.sender, list[int]()
    entry = sender.entry

    async def reading(endpoint: Endpoint, position: int) -> Entry | None:
        read.append(position)
        return await entry(endpoint, position)

    sender.entry = reading  # type: ignore[method-assign]
    made = await hook(client, receiver)
    await register(client)
    await create(client)
    await settled(client, made)

    assert len(receiver.got) == 2
    assert read == []


# --- order and independence ------------------------------------------------------------------------


async def test_devices_are_served_in_parallel_and_each_in_order(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    names = [f"lamp-{number}" for number in range(PARALLEL + 4)]
    for name in names:
        await register(client, name)
    await hook(client, receiver)
    receiver.gate.clear()
    for _ in range(3):
        for name in names:
            await create(client, name)
    got = await receiver.count(PARALLEL)
    assert receiver.waiting == PARALLEL
    assert len({each.event["subject"] for each in got}) == PARALLEL

    receiver.gate.set()
    await receiver.count(3 * len(names))

    for name in names:
        mine = positions(receiver.got, name)
        assert mine == sorted(set(mine))
        assert len(mine) == 3


async def test_a_devices_later_event_waits_until_its_earlier_one_is_delivered(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    await register(client)
    await register(client, "lamp-2")
    made = await hook(client, receiver)
    bad: list[int] = []

    def reply(got: Got) -> tuple[int, dict[str, str]]:
        if not bad:
            bad.append(got.position)
        return (500, {}) if got.position in bad and len(positions(receiver.got, "lamp-2")) < 2 else (204, {})

    receiver.reply = reply
    for name in ("lamp-1", "lamp-1", "lamp-2", "lamp-2"):
        await create(client, name)
    await receiver.until(lambda: len(positions(receiver.got, "lamp-2")) == 2)
    assert set(positions(receiver.got, "lamp-1")) == set(bad)
    assert (await read(client, made))["cursor"] == bad[0]

    await client.post(f"/v1/webhooks/{made['id']}/resume")
    await receiver.until(lambda: len(set(positions(receiver.got, "lamp-1"))) == 2)

    mine = positions(receiver.got, "lamp-1")
    assert mine == sorted(mine)
    assert (await settled(client, made))["state"] == "active"


async def test_a_dead_endpoint_does_not_delay_another(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    async with receiving() as dead:
        dead.gate.clear()
        await hook(client, dead)
        await hook(client, receiver)
        for number in range(40):
            await register(client, f"lamp-{number}")
        got = await receiver.count(40)
        assert dead.waiting > 0
        assert len(set(positions(got))) == 40
        dead.gate.set()


async def test_a_restarted_broker_continues_its_deliveries(tmp_path: Path, receiver: Receiver) -> None:
    async with at_work(tmp_path / "data") as broker:
        client = await broker.someone()
        made = await hook(client, receiver)
        await register(client, "lamp-1")
        await register(client, "lamp-2")
        await receiver.count(2)
        await settled(client, made)
        receiver.reply = lambda got: (500 if got.event["data"]["hardware_id"] == "lamp-1" else 204, {})
        await create(client, "lamp-1")
        await create(client, "lamp-2")
        await failing(client, made)
        deliveries = f"/v1/webhooks/{made['id']}/deliveries?outcome=delivered"
        async with asyncio.timeout(WITHIN_SEC):
            while len((await client.get(deliveries)).json()["data"]) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    before = len(receiver.got)
    receiver.reply = lambda _: (204, {})
    async with at_work(tmp_path / "data") as broker:
        key = await broker.someone()
        found = (await key.get(f"/v1/webhooks/{made['id']}")).json()
        assert found["failing"] is not None or len(receiver.got) > before
        again = await create(key, "lamp-2")
        got = (await receiver.count(before + 2))[before:]
        await settled(key, made)

    subjects = {each.event["subject"] for each in got}
    assert again in subjects
    assert positions(got, "lamp-1") != []
    assert len(positions(got, "lamp-2")) == 1, "events delivered ahead of the cursor are not sent again"
    for each in got:
        Webhook(made["secret"]).verify(each.body, each.headers)


async def test_a_paused_webhook_gets_nothing_and_later_misses_nothing(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    await register(client)
    made = await hook(client, receiver)
    path = f"/v1/webhooks/{made['id']}"

    paused = (await client.patch(path, json={"enabled": False})).json()
    assert paused["state"] == "paused"
    assert paused["reason"].startswith("key:key_")
    ids = [await create(client) for _ in range(3)]
    assert (await read(client, made))["lag"] >= 3
    assert receiver.got == []
    assert (await client.patch(path, json={"enabled": True})).json()["state"] == "active"
    got = await receiver.count(3)

    assert [each.event["subject"] for each in got] == ids


# --- operations of the owner -----------------------------------------------------------------------


async def test_after_a_rotation_both_secrets_verify_and_without_overlap_only_the_new_one(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    first = await hook(client, receiver)
    path = f"/v1/webhooks/{first['id']}/rotate"
    second = (await client.post(path)).json()
    assert second["old_secrets_until"] is not None
    await register(client)
    (both,) = await receiver.count(1)
    third = (await client.post(path, json={"overlap_sec": 0})).json()
    await register(client, "lamp-2")
    alone = (await receiver.count(2))[1]

    for made in (first, second):
        Webhook(made["secret"]).verify(both.body, both.headers)
    Webhook(third["secret"]).verify(alone.body, alone.headers)
    for made in (first, second):
        with pytest.raises(WebhookVerificationError):
            Webhook(made["secret"]).verify(alone.body, alone.headers)
    assert third["old_secrets_until"] is None


async def test_410_disables_an_endpoint_and_its_reason_says_so(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    made = await hook(client, receiver)
    receiver.reply = lambda _: (410, {})
    await register(client)
    found = await becomes(client, made, lambda found: found["state"] != "active")

    assert found["state"] == "gone"
    assert "410 Gone" in found["reason"]
    error = error_of(await client.post(f"/v1/webhooks/{made['id']}/resume"), 409, "conflict")
    assert "410 Gone" in error["message"]
    assert "ordain_webhooks_stopped 1.0" in (await client.get("/metrics")).text


async def test_attempts_are_listed_newest_first_with_their_outcome(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    made = await hook(client, receiver)
    path = f"/v1/webhooks/{made['id']}/deliveries"
    await register(client)
    await receiver.count(1)
    await settled(client, made)
    receiver.reply = lambda _: (500, {})
    await create(client)
    await failing(client, made)

    page = (await client.get(path, params={"limit": 1})).json()
    (newest,) = page["data"]
    assert (newest["outcome"], newest["status"], newest["attempt"], newest["type"]) == (
        "failed", 500, 1, "created",
    )  # fmt: skip
    assert page["has_more"] is True
    rest = (await client.get(path, params={"cursor": page["next_cursor"]})).json()
    assert [each["outcome"] for each in rest["data"]] == ["delivered"]
    failed = (await client.get(path, params={"outcome": "failed"})).json()["data"]
    assert {each["position"] for each in failed} == {newest["position"]}
    metrics = (await client.get("/metrics")).text
    assert 'ordain_webhook_deliveries_total{outcome="delivered"} 1.0' in metrics
    assert 'ordain_webhook_deliveries_total{outcome="refused"}' in metrics
    assert 'ordain_subscriber_lag_events{kind="webhook"} 1.0' in metrics


async def test_a_test_event_is_signed_and_changes_nothing(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    made = await hook(client, receiver, events=["failed"])
    path = f"/v1/webhooks/{made['id']}"
    await client.patch(path, json={"enabled": False})
    before, head = (await client.get(path)).json(), broker.core.feed.head

    tested = (await client.post(f"{path}/test")).json()

    [got] = receiver.got
    event = Webhook(made["secret"]).verify(got.body, got.headers)
    assert (event["type"], event["subject"]) == ("ordain.webhook.test.v1", made["id"])
    assert event["id"] == got.headers["webhook-id"]
    assert set(tested) == {"outcome", "at", "duration_ms", "status", "error"}
    assert (tested["outcome"], tested["status"], tested["error"]) == ("delivered", 204, None)
    assert ((await client.get(path)).json(), broker.core.feed.head) == (before, head)
    assert (await client.get(f"{path}/deliveries")).json()["data"] == []
    error_of(await (await broker.someone("other")).post(f"{path}/test"), 404, "not_found")


async def test_one_event_is_resent_and_a_range_is_redriven_from_a_position(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    await register(client)
    old = broker.core.feed.head
    made = await hook(client, receiver)
    path = f"/v1/webhooks/{made['id']}"
    await create(client)
    await create(client)
    got = list(await receiver.count(2))
    await settled(client, made)

    again = (await client.post(f"{path}/deliveries/{got[0].position}/resend")).json()
    assert (again["status"], again["attempt"], again["outcome"]) == (204, None, "delivered")
    assert receiver.got[2].headers["webhook-id"] == got[0].headers["webhook-id"]
    before = (await client.post(f"{path}/deliveries/{old}/resend")).json()
    assert (before["type"], receiver.got[3].position) == ("registered", old)
    found = (await client.post(f"{path}/redrive", json={"from": got[1].position})).json()
    assert found["cursor"] == got[1].position
    last = (await receiver.count(5))[4]
    assert (last.body, last.headers["webhook-id"]) == (got[1].body, got[1].headers["webhook-id"])
    await settled(client, made)

    log_id, other = broker.core.log_id, "log_" + "0" * 26
    full = await client.post(f"{path}/deliveries/{log_id}:{old}/resend")
    assert full.json()["position"] == old
    last_sent = got[1].position
    again = (await client.post(f"{path}/redrive", json={"from": f"{log_id}:{last_sent}"})).json()
    assert again["cursor"] == last_sent
    await settled(client, made)
    error_of(await client.post(f"{path}/redrive", json={"from": f"{other}:{old}"}), 410, "gone")
    error_of(await client.post(f"{path}/deliveries/{other}:{old}/resend"), 410, "gone")
    head = broker.core.feed.head  # each re-drive is an event of its own
    for wrong in (0, -1, head + 2, 2**60, "0", "x", f"{log_id}:{head + 2}"):
        error = error_of(await client.post(f"{path}/redrive", json={"from": wrong}), 400, "invalid_request")
        assert error["details"]["field"] == "from"
    for position in (0, head + 1, 2**60):
        error_of(await client.post(f"{path}/deliveries/{position}/resend"), 404, "not_found")
    assert len(receiver.got) == 7


async def test_an_event_still_waiting_for_delivery_cannot_be_resent(
    broker: Broker, receiver: Receiver
) -> None:
    client = await broker.someone()
    await register(client)
    made = await hook(client, receiver)
    path = f"/v1/webhooks/{made['id']}"
    receiver.gate.clear()
    await create(client)
    (got,) = await receiver.count(1)
    error_of(await client.post(f"{path}/deliveries/{got.position}/resend"), 409, "conflict")
    await client.patch(path, json={"enabled": False})
    error_of(await client.post(f"{path}/deliveries/{got.position}/resend"), 409, "conflict")
    receiver.gate.set()


async def test_a_changed_url_gets_the_events_not_delivered_yet(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    await register(client)
    made = await hook(client, receiver, name="old")
    receiver.reply = lambda _: (500, {})
    ids = [await create(client) for _ in range(2)]
    await receiver.count(1)
    async with receiving() as other:
        changed = await client.patch(
            f"/v1/webhooks/{made['id']}", json={"url": other.url, "name": None, "events": ["created"]}
        )
        found = changed.json()
        assert (found["url"], found["name"], found["events"]) == (other.url, None, ["created"])
        await client.post(f"/v1/webhooks/{made['id']}/resume")
        got = await other.count(2)
        assert [each.event["subject"] for each in got] == ids


async def test_more_event_types_apply_from_the_cursor_on(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    await register(client)
    made = await hook(client, receiver, events=["created"])
    receiver.reply = lambda _: (500, {})
    command_id = await create(client)
    await client.delete(f"/v1/devices/lamp-1/commands/{command_id}")
    await failing(client, made)
    (known,) = broker.core.webhooks.all(ME)
    await until(lambda: known.progress.reached >= broker.core.feed.head)

    receiver.reply = lambda _: (200, {})
    receiver.got.clear()
    await client.patch(f"/v1/webhooks/{made['id']}", json={"events": ["created", "cancelled"]})

    got = await receiver.count(2)
    assert [each.event["type"].split(".")[2] for each in got] == ["created", "cancelled"]


async def test_a_deleted_webhook_is_not_found_and_gets_nothing(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    made = await hook(client, receiver)
    assert (await client.delete(f"/v1/webhooks/{made['id']}")).status_code == 200
    await register(client)
    async with receiving() as other:
        await hook(client, other)
        await register(client, "lamp-2")
        await other.count(1)

    assert receiver.got == []
    error_of(await client.get(f"/v1/webhooks/{made['id']}"), 404, "not_found")
    error_of(await client.delete(f"/v1/webhooks/{made['id']}"), 404, "not_found")


# --- refusals --------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"url": None}, "url"),
    ({"url": ""}, "url"),
    ({"url": "hooks.example"}, "url"),
    ({"url": "ftp://hooks.example"}, "url"),
    ({"url": "http://93.184.215.14/"}, "url"),
    ({"url": "https://10.0.0.1/"}, "url"),
    ({"url": "https://169.254.169.254/latest/meta-data/"}, "url"),
    ({"url": "https://[fd00:ec2::254]/"}, "url"),
    ({"url": "https://u:p@hooks.example/"}, "url"),
    ({"url": "https://nobody.invalid/"}, "url"),
    ({"events": ["exploded"]}, "events"),
    ({"events": "created"}, "events"),
    ({"device": "nobody"}, "device"),
    ({"type": "../up"}, "type"),
    ({"name": "x" * 201}, "name"),
    ({"project": "other"}, "project"),
    ({"secret": "whsec_mine"}, "secret"),
]


async def test_a_wrong_field_is_named_on_creation_and_on_change(broker: Broker, receiver: Receiver) -> None:
    client = await broker.someone()
    made = await hook(client, receiver)
    for wrong, field in WRONG:
        for method, path in (("POST", "/v1/webhooks"), ("PATCH", f"/v1/webhooks/{made['id']}")):
            body = ({"url": receiver.url} if method == "POST" else {}) | wrong
            error = error_of(await client.request(method, path, json=body), 400, "invalid_request")
            assert error["details"]["field"].partition("[")[0] == field, (wrong, error)
            assert error["details"]["reason"]
            assert "u:p" not in error["message"]
    without = await client.post("/v1/webhooks", json={})
    assert error_of(without, 400, "invalid_request")["details"]["field"] == "url"
    for wrong in ({"overlap_sec": -1}, {"overlap_sec": "1"}):
        error_of(await client.post(f"/v1/webhooks/{made['id']}/rotate", json=wrong), 400, "invalid_request")
    assert [each["id"] for each in (await client.get("/v1/webhooks")).json()["data"]] == [made["id"]]


async def test_webhooks_need_both_scopes_and_belong_to_one_project(
    broker: Broker, receiver: Receiver
) -> None:
    owner, stranger = await broker.someone(), await broker.someone("other")
    made = await hook(owner, receiver)
    for scopes in (("devices:read", "devices:write"), ("devices:read", "events:read")):
        half = await broker.someone(scopes=scopes)
        for method, path in (("GET", ""), ("POST", ""), ("DELETE", f"/{made['id']}")):
            error_of(
                await half.request(method, f"/v1/webhooks{path}", json={"url": receiver.url}),
                403,
                "forbidden",
            )
    path = f"/v1/webhooks/{made['id']}"
    for method, more, body in (
        ("GET", "", None),
        ("PATCH", "", {"name": "x"}),
        ("PATCH", "", {"url": receiver.url}),
        ("DELETE", "", None),
        ("POST", "/rotate", None),
        ("POST", "/resume", None),
        ("POST", "/redrive", {"from": 1}),
        ("GET", "/deliveries", None),
        ("POST", "/deliveries/1/resend", None),
    ):
        theirs = await stranger.request(method, path + more, json=body)
        nobody = await stranger.request(method, "/v1/webhooks/whk_none" + more, json=body)
        error_of(theirs, 404, "not_found")
        assert theirs.text.replace(made["id"], "whk_none") == nobody.text
    assert (await stranger.get("/v1/webhooks")).json()["data"] == []
    admin = await broker.someone("ops", ("admin",))
    assert [each["id"] for each in (await admin.get("/v1/webhooks")).json()["data"]] == [made["id"]]
    made = await hook(admin, receiver, project="acme")
    assert made["project"] == "acme"


async def test_the_number_of_webhooks_per_project_is_limited(tmp_path: Path, receiver: Receiver) -> None:
    async with at_work(tmp_path / "data", Limits(webhooks_per_project=2)) as broker:
        client, other = await broker.someone(), await broker.someone("other")
        made = [(await hook(client, receiver))["id"] for _ in range(2)]
        error = error_of(await client.post("/v1/webhooks", json={"url": receiver.url}), 409, "conflict")
        assert "2 webhooks" in error["message"]
        await hook(other, receiver)
        page = (await client.get("/v1/webhooks", params={"limit": 1})).json()
        rest = (await client.get("/v1/webhooks", params={"cursor": page["next_cursor"]})).json()

    # Two that were made in the same millisecond are in any order.
    assert [each["id"] for each in page["data"] + rest["data"]] == sorted(made, reverse=True)
