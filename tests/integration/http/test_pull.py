"""Delivery without MQTT, over HTTP: heartbeats, relays, leases, reports, and restarts."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from broker.domain.errors import Unavailable
from broker.seams import Full
from devices.clock import parse_rfc3339
from tests.integration.core_support import ME, until
from tests.integration.http.pull_support import RECORDER, Desk, fetched, on_desk, reported
from tests.integration.http.support import error_of

HELD = 60


# --- handing over


def test_a_heartbeat_hands_over_and_each_stage_has_its_own_time() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        pending = await desk.read(command_id)
        assert (pending["status"], pending["state"], pending["attempts"]) == ("pending", "pending", 0)
        times = ("published_at", "delivered_at", "executed_at")
        assert [pending[field] for field in times] == [None] * 3
        await asyncio.sleep(1)

        beat = (await own.post("/v1/devices/me/heartbeat", json={"battery_percent": 81})).json()

        handed = beat["commands"][0]
        assert beat == {"status": "ok", "commands": [handed]}
        assert list(handed) == list(pending)
        assert (handed["id"], handed["status"], handed["state"]) == (command_id, "pending", "published")
        assert handed["params"] == {"max_duration_sec": 3600, "upload_immediately": True}
        assert handed["grant_token"] != pending["grant_token"]
        await asyncio.sleep(1)
        delivered = (await reported(own, command_id, "me")).json()
        await asyncio.sleep(1)
        done = (
            await reported(own, command_id, "me", status="executed", result={"recording_id": "r1"})
        ).json()
        read = await desk.read(command_id)

        assert (delivered["status"], delivered["state"]) == ("delivered", "acknowledged")
        assert (done["status"], done["result"]) == ("executed", {"recording_id": "r1"})
        assert {**done, "grant_token": None} == {**read, "grant_token": None}
        moments = [parse_rfc3339(done[field]) for field in ("created_at", *times)]
        gaps = [after - before for before, after in pairwise(moments)]
        assert all(1_000 <= gap < 1_100 for gap in gaps)
        assert parse_rfc3339(done["expires_at"]) - moments[0] == 300_000
        events = (await desk.key.get(f"/v1/commands/{command_id}/events")).json()["data"]
        assert [(event["type"], event["evidence"]) for event in events] == [
            ("created", "accepted"),
            ("published", "handed_over"),
            ("acknowledged", "device_ack"),
            ("executed", "device_result"),
        ]
        assert events[1]["data"] == {"attempt": 1, "transport": "heartbeat", "counts": False}

    on_desk(story)


def test_a_relay_claims_by_post_or_get_and_its_report_records_its_key() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent()
        phone = await desk.service()

        assert await fetched(phone, "pending") == [(command_id, 1)]
        assert await fetched(phone) == [(command_id, 1)]
        answer = await phone.get(f"/v1/devices/{RECORDER}/commands/pending")
        assert answer.headers["cache-control"] == "no-store"
        assert (await reported(phone, command_id)).json()["status"] == "delivered"
        done = await reported(phone, command_id, status="failed", error="no room")
        assert done.json()["error"] == {"code": "device_error", "message": "no room"}
        rows = [row for row in await desk.rows() if row.stream == command_id]
        evidence = [event["evidence"] for event in await _events(desk, command_id)]
        actors = {row.actor for row in rows[1:]}

        assert evidence == ["accepted", "handed_over", "relay_report", "relay_report"]
        metrics = (await phone.get("/metrics")).text
        assert 'ordain_hand_overs_total{transport="relay"} 1.0' in metrics
        assert len(actors) == 1
        assert actors != {rows[0].actor}

    on_desk(story)


async def _events(desk: Desk, command_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await desk.key.get(f"/v1/commands/{command_id}/events")).json()["data"]
    return found


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_duration_sec": 0}, "params.max_duration_sec"),
        ({"max_duration_sec": 86_401}, "params.max_duration_sec"),
        ({"max_duration_sec": "60"}, "params.max_duration_sec"),
        ({"upload_immediately": 1}, "params.upload_immediately"),
        ({"metadata": []}, "params.metadata"),
        ({"volume": 3}, "params"),
        ([], "params"),
    ],
)
def test_recorder_parameters_are_bounded_and_the_wrong_field_is_named(params: Any, field: str) -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        body = {"type": "start_recording", "params": params}
        error = error_of(
            await desk.key.post(f"/v1/devices/{RECORDER}/commands", json=body), 400, "invalid_request"
        )
        assert error["details"]["field"].startswith(field)
        for seconds in (1, 86_400):
            taken = {"max_duration_sec": seconds, "metadata": {"room": 4}}
            command = await desk.read(await desk.sent(params=taken))
            assert command["params"] == {"upload_immediately": True} | taken

    on_desk(story)


def test_commands_go_one_at_a_time_and_in_order() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        first, second = await desk.sent(), await desk.sent(type="stop_recording")

        assert await fetched(own, "heartbeat", "me") == [(first, 1)]
        assert await fetched(own, "heartbeat", "me") == [(first, 1)]
        await reported(own, first, "me")
        assert await fetched(own, "heartbeat", "me") == [], "an acknowledged command is never sent again"
        await reported(own, first, "me", status="executed")
        assert await fetched(own, "heartbeat", "me") == [(second, 1)]

    on_desk(story)


def test_a_larger_window_is_filled_in_one_fetch() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered("t-1", "two")
        ids = [await desk.sent("t-1", "blink") for _ in range(3)]

        assert await fetched(desk.key, device="t-1") == [(ids[0], 1), (ids[1], 1)]

    on_desk(story)


def test_a_type_with_mqtt_only_is_given_nothing() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered("lamp-1", "generic")
        command_id = await desk.sent("lamp-1", "blink")

        assert await fetched(own, "heartbeat", "me") == []
        assert await fetched(own, "claim", "me") == []
        assert (await desk.read(command_id))["state"] == "pending"

    on_desk(story)


def test_phones_that_claim_at_once_get_the_same_attempt_and_one_event() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent()
        phones = [await desk.service() for _ in range(4)]

        claims = await asyncio.gather(*(fetched(phone) for phone in phones))

        assert claims == [[(command_id, 1)]] * 4
        assert await desk.types(command_id) == ["created", "published"]

    on_desk(story)


def test_nothing_is_handed_out_before_its_event_is_durable_or_after_an_abandon() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent()
        desk.held.gate.clear()
        claim = asyncio.create_task(fetched(desk.key))
        await until(lambda: desk.state(command_id) == "published")
        await asyncio.sleep(5)
        assert not claim.done()
        abandon = asyncio.create_task(desk.core.commands.abandon(ME, command_id))
        await until(lambda: desk.state(command_id) == "timed_out")
        desk.held.gate.set()

        assert await claim == []
        assert (await abandon).state == "timed_out"

    on_desk(story)


def test_a_command_that_runs_out_of_time_during_its_commit_is_not_handed_out() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent(ttl_sec=10)
        desk.held.gate.clear()
        claim = asyncio.create_task(fetched(desk.key))
        await until(lambda: desk.state(command_id) == "published")
        await asyncio.sleep(9.5)
        desk.held.gate.set()

        assert await claim == []
        await desk.becomes(command_id, "timed_out")

    on_desk(story)


def test_a_hand_over_whose_commit_failed_did_not_happen() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        desk.disk.capacity = sum(len(file.data) for file in desk.disk.files.values())
        answer = await own.post("/v1/devices/me/heartbeat", json={"note": "x" * 4_000})
        error_of(answer, 503, "unavailable")
        with pytest.raises((Unavailable, Full)):
            await desk.core.commands.ready()
        desk.disk.capacity = None
        await until(lambda: desk.writer.open)

        assert (await desk.read(command_id))["state"] == "pending"
        assert await fetched(own, "heartbeat", "me") == [(command_id, 1)]

    on_desk(story)


def test_a_command_without_a_signing_secret_fails_and_the_next_is_tried() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered("s-1", "small")
        first, second = await desk.sent("s-1", "blink"), await desk.sent("s-1", "blink")
        assert await fetched(desk.key, device="s-1") == [(first, 1)]
        desk.core.registry.secrets.take([])

        assert await fetched(desk.key, device="s-1") == [], (
            "it is already handed over, so its state does not change"
        )
        assert desk.state(first) == "published"
        await asyncio.sleep(HELD + 1)
        assert await fetched(desk.key, device="s-1") == []
        assert (await desk.read(first))["error"]["details"] == {"reason": "unsendable"}
        assert (await desk.read(second))["error"]["code"] == "unsendable"

    on_desk(story)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_head_request_hands_nothing_over(slash: str) -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent()

        answer = await desk.key.head(f"/v1/devices/{RECORDER}/commands/pending{slash}")

        assert answer.status_code == 405
        assert desk.state(command_id) == "pending"

    on_desk(story)


# --- leases


def test_after_a_phone_dies_another_fetch_works_when_its_lease_ends() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        assert await fetched(desk.key) == [(command_id, 1)]
        await asyncio.sleep(HELD - 1)
        assert await fetched(own, "heartbeat", "me") == []
        assert await fetched(desk.key) == [(command_id, 1)], "a second claim does not extend the lease"
        why = await desk.why(command_id)
        assert [reason["code"] for reason in why["reasons"]] == ["no_answer", "leased"]
        await asyncio.sleep(1)

        assert await fetched(own, "heartbeat", "me") == [(command_id, 2)]
        assert await fetched(desk.key) == []
        late = await reported(desk.key, command_id, status="executed", result={"by": "the first phone"})
        assert (late.status_code, late.json()["status"]) == (200, "executed")
        assert await desk.types(command_id) == ["created", "published", "published", "executed"]

    on_desk(story)


def test_leases_may_end_without_limit_and_only_expiry_ends_the_command() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered("t-1", "tag")
        command_id = await desk.sent("t-1", "blink", ttl_sec=1_000)
        attempts = []
        for _ in range(12):
            attempts += await fetched(desk.key, device="t-1")
            await asyncio.sleep(HELD + 1)

        assert attempts == [(command_id, number) for number in range(1, 13)]
        timed_out = await desk.becomes(command_id, "timed_out", 1_000)
        assert (timed_out.reason, timed_out.counted) == ("ttl", 0)
        assert timed_out.closed_at == timed_out.expires_at

    on_desk(story)


def test_a_command_may_time_out_under_a_lease_and_a_late_report_corrects_it() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id, behind = await desk.sent(ttl_sec=30), await desk.sent()
        await fetched(desk.key)

        await desk.becomes(command_id, "timed_out")
        assert await fetched(own, "heartbeat", "me") == [(behind, 1)]
        error = (await desk.read(command_id))["error"]
        late = await reported(desk.key, command_id, status="executed")

        assert (error["code"], error["details"]) == ("timeout", {"reason": "ttl"})
        assert (late.json()["status"], late.json()["error"]) == ("executed", None)
        assert (await _events(desk, command_id))[-1]["data"]["late"] is True

    on_desk(story)


def test_a_non_repeatable_command_is_handed_over_once() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered("f-1", "fuse")
        command_id = await desk.sent("f-1", "blow", ttl_sec=None)

        assert await fetched(desk.key, device="f-1") == [(command_id, 1)]
        assert await fetched(desk.key, device="f-1") == []
        timed_out = await desk.becomes(command_id, "timed_out", HELD + 1)
        assert timed_out.reason == "no_answer"
        assert await fetched(desk.key, device="f-1") == []

    on_desk(story)


def test_a_claimed_command_cannot_be_cancelled() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent()
        path = f"/v1/devices/{RECORDER}/commands/{command_id}"
        await fetched(desk.key)

        assert error_of(await desk.key.delete(path), 409, "conflict")["details"] == {"state": "published"}

    on_desk(story)


@pytest.mark.parametrize("known", [True, False])
def test_a_device_that_comes_online_during_a_lease_gets_its_command_after_the_lease(known: bool) -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        if known:
            desk.core.intake.device_online(RECORDER)
            desk.core.intake.device_offline(RECORDER)
            await asyncio.sleep(1)
        command_id = await desk.sent()
        await fetched(desk.key)
        desk.core.intake.device_online(RECORDER)
        await asyncio.sleep(1)
        desk.core.intake.device_offline(RECORDER)
        await asyncio.sleep(1)
        desk.core.intake.device_online(RECORDER)
        await asyncio.sleep(HELD - 5)
        assert (desk.wire.sent, await fetched(desk.key)) == ([], [(command_id, 1)])
        await asyncio.sleep(4)

        assert [(sent.correlation, dict(sent.user_properties)["attempt"]) for sent in desk.wire.sent] == [
            (command_id.encode(), "2")
        ]
        assert await fetched(desk.key) == [], "the open attempt is by MQTT now"
        desk.wire.up = False
        desk.core.intake.link_down("cut")
        await asyncio.sleep(8)
        assert await fetched(desk.key) == []
        await asyncio.sleep(2)
        assert await fetched(desk.key) == [(command_id, 3)], (
            "the MQTT attempt has ended without the MQTT server"
        )
        desk.wire.up = True
        desk.core.intake.link_up()
        await asyncio.sleep(HELD - 5)
        assert len(desk.wire.sent) == 1

    on_desk(story)


def test_fetching_does_not_make_a_device_present_for_mqtt() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        first = await desk.sent()
        await fetched(own, "heartbeat", "me")
        await reported(own, first, "me", status="executed")
        second = await desk.sent()
        await asyncio.sleep(30)

        assert (desk.wire.sent, desk.state(second)) == ([], "pending")
        device = (await desk.key.get(f"/v1/devices/{RECORDER}")).json()
        assert device["presence"] == "never"

    on_desk(story)


def test_a_lease_ends_without_the_mqtt_server_too() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered("t-1", "tag")
        await desk.registered("r-1", "recorder")
        desk.wire.up = False
        desk.core.intake.link_down("cut")
        pulled, both = await desk.sent("t-1", "blink", ttl_sec=100), await desk.sent("r-1", ttl_sec=100)
        assert await fetched(desk.key, device="t-1") == [(pulled, 1)]
        assert await fetched(desk.key, device="r-1") == [(both, 1)]
        await asyncio.sleep(HELD)

        assert await fetched(desk.key, "heartbeat", "t-1") == [(pulled, 2)]
        assert await fetched(desk.key, "heartbeat", "r-1") == [(both, 2)]
        await desk.becomes(pulled, "timed_out")
        assert desk.state(both) == "published", "its answer may be waiting at the MQTT server"

    on_desk(story)


def test_a_restart_keeps_leases_and_their_ends() -> None:
    seen: dict[str, Any] = {}

    async def before(desk: Desk) -> None:
        seen["own"] = await desk.registered()
        await desk.registered("f-1", "fuse")
        seen["id"] = await desk.sent()
        seen["once"] = await desk.sent("f-1", "blow")
        await fetched(desk.key)
        await fetched(desk.key, device="f-1")
        await asyncio.sleep(30)

    async def after(desk: Desk) -> None:
        own = desk.client(seen["own"].headers["authorization"].split()[1])
        assert await fetched(own, "heartbeat", "me") == []
        assert await fetched(desk.key) == [(seen["id"], 1)]
        assert await fetched(desk.key, device="f-1") == []
        await asyncio.sleep(25)
        assert await fetched(own, "heartbeat", "me") == []
        await asyncio.sleep(10)
        assert await fetched(own, "heartbeat", "me") == [(seen["id"], 2)]
        assert desk.state(seen["once"]) == "timed_out"
        assert await desk.types(seen["id"]) == ["created", "published", "published"]

    on_desk(before, after)


def test_a_lane_shut_for_answers_without_id_is_shut_for_relays_too() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered("bell-1", "bell")
        desk.core.intake.device_online("bell-1")
        await asyncio.sleep(3)
        first, second = await desk.sent("bell-1", "ring"), await desk.sent("bell-1", "ring")
        await until(lambda: len(desk.wire.sent) == 1)
        assert await fetched(desk.key, device="bell-1") == []
        desk.wire.receipt()
        desk.says(b"ok", "bell-1")
        await desk.becomes(first, "executed")
        assert await fetched(desk.key, device="bell-1") == []
        desk.core.intake.device_offline("bell-1")
        await asyncio.sleep(2)

        assert await fetched(desk.key, device="bell-1") == [(second, 1)]

    on_desk(story)


# --- reports


def test_a_repeated_report_gets_the_same_answer_and_a_different_one_is_refused() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        await fetched(own, "heartbeat", "me")
        for _ in range(2):
            assert (await reported(own, command_id, "me")).status_code == 200
        for _ in range(2):
            answer = await reported(own, command_id, "me", status="executed", result={"n": 1})
            assert (answer.status_code, answer.json()["result"]) == (200, {"n": 1})
        assert (await reported(own, command_id, "me")).json()["status"] == "executed"
        for other in ({"status": "executed", "result": {"n": 2}}, {"status": "failed"}):
            error = error_of(await reported(own, command_id, "me", **other), 409, "conflict")
            assert error["details"] == {"state": "executed"}

        assert await desk.types(command_id) == ["created", "published", "acknowledged", "executed"]
        assert await desk.unmatched() == []

    on_desk(story)


def test_a_report_on_a_command_never_handed_over_is_refused() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        error_of(await reported(own, command_id, "me", status="executed"), 409, "conflict")
        assert (await desk.read(command_id))["state"] == "pending"
        assert await desk.unmatched() == []
        await desk.core.commands.cancel(ME, command_id)

        error = error_of(await reported(own, command_id, "me", status="executed"), 409, "conflict")

        assert error["details"] == {"state": "cancelled"}
        assert (await desk.read(command_id))["state"] == "cancelled"
        kept = (await desk.key.get("/v1/unmatched")).json()["data"]
        assert [(each["reason"], each["command_id"]) for each in kept] == [("promise_broken", command_id)]
        assert (await desk.why(command_id))["reasons"][-1]["code"] == "promise_broken"

    on_desk(story)


def test_a_service_key_reports_only_on_commands_fetched_by_relay_or_heartbeat() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        desk.core.intake.device_online(RECORDER)
        command_id = await desk.sent()
        await until(lambda: len(desk.wire.sent) == 1)

        error = error_of(await reported(desk.key, command_id, status="executed"), 409, "conflict")
        done = await reported(own, command_id, "me", status="executed")

        assert "relay" in error["message"]
        assert (done.status_code, done.json()["status"]) == (200, "executed")

    on_desk(story)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"status": "done"}, 400, "status"),
        ({"status": "acknowledged"}, 400, "status"),
        ({}, 400, "status"),
        ({"status": "executed", "reslut": 1}, 400, "reslut"),
        ({"status": "failed", "error": 7}, 400, "error"),
        ({"status": "executed", "result": "x" * 65_536}, 413, ""),
        ({"status": "executed", "result": "x" * 300_000}, 413, ""),
    ],
)
def test_a_wrong_report_is_refused_and_names_its_field(body: Any, status: int, field: str) -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        await fetched(own, "heartbeat", "me")
        path = f"/v1/devices/me/commands/{command_id}/result"

        answer = await own.post(path, json=body)

        error = error_of(answer, status, {400: "invalid_request", 413: "too_large"}[status])
        assert error.get("details", {}).get("field", "") == field
        assert (await desk.read(command_id))["state"] == "published"

    on_desk(story)


def test_a_result_nested_too_deeply_is_refused_and_any_other_value_is_kept() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        await fetched(own, "heartbeat", "me")
        deep: Any = 1
        for _ in range(200):
            deep = [deep]
        error = error_of(
            await reported(own, command_id, "me", status="executed", result=deep), 400, "invalid_request"
        )
        assert error["details"]["field"] == "result"

        done = await reported(own, command_id, "me", status="executed", result=[1, None])
        assert done.json()["result"] == {"value": [1, None]}

    on_desk(story)


# --- permissions


def test_a_device_token_works_for_its_own_device_only() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        await desk.registered("rec-2")
        theirs = await desk.sent("rec-2")
        mine = await desk.sent()
        device = (await desk.key.get(f"/v1/devices/{RECORDER}")).json()

        for name in ("me", RECORDER, device["id"]):
            assert await fetched(own, "claim", name) == [(mine, 1)]
        for path in ("heartbeat", "commands/claim", f"commands/{theirs}/ack"):
            error_of(await own.post(f"/v1/devices/rec-2/{path}"), 404, "not_found")
        error_of(await own.get("/v1/devices/rec-2/commands/pending"), 404, "not_found")
        error_of(await reported(own, theirs, "me", status="executed"), 404, "not_found")
        for method, path in (
            ("GET", "/v1/devices"),
            ("GET", "/v1/devices/me"),
            ("GET", f"/v1/devices/{RECORDER}"),
            ("GET", f"/v1/devices/{RECORDER}/lane"),
            ("GET", f"/v1/devices/{RECORDER}/commands"),
            ("POST", f"/v1/devices/{RECORDER}/commands"),
            ("DELETE", f"/v1/devices/{RECORDER}/commands/{mine}"),
            ("POST", f"/v1/devices/{RECORDER}/token"),
            ("GET", "/v1/commands"),
            ("GET", f"/v1/commands/{mine}"),
            ("GET", "/v1/system"),
        ):
            error_of(await own.request(method, path), 403, "forbidden")
        assert (await desk.read(theirs))["state"] == "pending"

    on_desk(story)


def test_a_token_stops_working_when_rotated_and_when_its_device_is_deleted() -> None:
    async def story(desk: Desk) -> None:
        old = await desk.registered()
        issued = await desk.key.post(f"/v1/devices/{RECORDER}/token")
        new = desk.client(issued.json()["device_token"])
        error_of(await old.post("/v1/devices/me/heartbeat"), 401, "unauthorized")
        assert await fetched(new, "heartbeat", "me") == []

        await desk.key.delete(f"/v1/devices/{RECORDER}")

        error_of(await new.post("/v1/devices/me/heartbeat"), 401, "unauthorized")

    on_desk(story)


def test_a_forged_token_of_another_device_is_refused() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        await desk.registered("rec-2")
        token = own.headers["authorization"].split()[1]
        secret, _, _ = token.partition(".")
        for forged in (
            f"{secret}.rec-2",
            secret,
            f"{secret}.",
            f"{token}x",
            "dtok_",
            "dtok_.me",
            "dtok_\u00e9",
        ):
            sent = [(b"authorization", f"Bearer {forged}".encode("latin-1"))]
            for name in ("me", "rec-2"):
                answer = await httpx2.AsyncClient(
                    transport=httpx2.ASGITransport(desk.app),  # type: ignore[arg-type]
                    base_url="http://ordain",
                ).post(f"/v1/devices/{name}/heartbeat", headers=sent)
                error_of(answer, 401, "unauthorized")

    on_desk(story)


def test_a_token_of_an_earlier_release_names_no_device_and_works_by_the_path() -> None:
    async def story(desk: Desk) -> None:
        desk.core.registry._new_token = lambda device_id: "dtok_" + "x" * 43  # type: ignore[method-assign]
        own = await desk.registered()
        command_id = await desk.sent()

        assert await fetched(own, "heartbeat", RECORDER) == [(command_id, 1)]
        error_of(await own.post("/v1/devices/me/heartbeat"), 401, "unauthorized")

    on_desk(story)


def test_another_project_and_a_read_only_key_get_nothing() -> None:
    async def story(desk: Desk) -> None:
        await desk.registered()
        command_id = await desk.sent()
        stranger, reader = await desk.service("other"), await desk.service("acme", "devices:read")
        for path in ("heartbeat", "commands/claim", f"commands/{command_id}/ack"):
            error_of(await stranger.post(f"/v1/devices/{RECORDER}/{path}"), 404, "not_found")
            error_of(await reader.post(f"/v1/devices/{RECORDER}/{path}"), 403, "forbidden")
            error_of(await desk.key.post(f"/v1/devices/nobody/{path}"), 404, "not_found")
            error_of(await desk.key.post(f"/v1/devices/me/{path}"), 404, "not_found")
        assert await desk.types(command_id) == ["created"]

    on_desk(story)


# --- attributes


def test_heartbeat_attributes_are_kept_and_only_changes_are_recorded() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        stream = (await desk.key.get(f"/v1/devices/{RECORDER}")).json()["id"]

        async def beat(**said: Any) -> dict[str, Any]:
            assert (await own.post("/v1/devices/me/heartbeat", json=said)).status_code == 200
            found: dict[str, Any] = (await desk.key.get(f"/v1/devices/{RECORDER}")).json()["attributes"]
            return found

        assert await beat(battery_percent=80, at={"lat": 1}) == {"battery_percent": 80, "at": {"lat": 1}}
        assert await beat(battery_percent=80) == {"battery_percent": 80, "at": {"lat": 1}}
        assert await beat() == {"battery_percent": 80, "at": {"lat": 1}}
        assert await beat(battery_percent=True) == {"battery_percent": True, "at": {"lat": 1}}
        assert await desk.types(f"device/{stream}") == ["registered", "changed", "changed"]

    on_desk(story)


def test_a_too_large_heartbeat_is_refused_as_a_whole() -> None:
    async def story(desk: Desk) -> None:
        own = await desk.registered()
        command_id = await desk.sent()
        deep: Any = 1
        for _ in range(20):
            deep = {"a": deep}
        path = "/v1/devices/me/heartbeat"

        error_of(await own.post(path, json={"x": "y" * 4_096}), 413, "too_large")
        error_of(await own.post(path, json=deep), 400, "invalid_request")
        error_of(await own.post(path, json=[1]), 400, "invalid_request")
        text = {"content-type": "text/plain"}
        error_of(await own.post(path, content=b"x", headers=text), 415, "unsupported_media_type")
        assert desk.state(command_id) == "pending"

    on_desk(story)
