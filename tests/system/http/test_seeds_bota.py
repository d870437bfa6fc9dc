"""The examples of Bota's pages, against a running broker: create, list, cancel."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.system.http.seeds_support import curl, unlike
from tests.system.support import Broker

BASE, KEY, DEVICE, COMMAND = "https://api.bota.dev", "sk_live_...", "dev_abc123", "cmd_xyz789"
LIST = """curl "https://api.bota.dev/v1/devices/dev_abc123/commands" \\
  -H "Authorization: Bearer sk_live_..."
"""
CANCEL = """curl -X DELETE https://api.bota.dev/v1/devices/dev_abc123/commands/cmd_xyz789 \\
  -H "Authorization: Bearer sk_live_..."
"""
CANCELLED = json.loads("""{
  "id": "cmd_xyz789",
  "device_id": "dev_abc123",
  "type": "start_recording",
  "status": "cancelled",
  "params": {
    "max_duration_sec": 3600,
    "upload_immediately": true
  },
  "grant_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9...",
  "result": null,
  "error": null,
  "expires_at": "2025-01-20T11:00:00Z",
  "delivered_at": null,
  "executed_at": null,
  "created_at": "2025-01-20T10:55:00Z"
}""")
LISTED = json.loads("""{
  "data": [
    {
      "id": "cmd_xyz789",
      "device_id": "dev_abc123",
      "type": "start_recording",
      "status": "executed",
      "params": {
        "max_duration_sec": 3600,
        "upload_immediately": true
      },
      "grant_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9...",
      "result": {
        "recording_id": "rec_def456",
        "started_at": "2025-01-20T10:55:30Z"
      },
      "error": null,
      "expires_at": "2025-01-20T11:00:00Z",
      "delivered_at": "2025-01-20T10:55:15Z",
      "executed_at": "2025-01-20T10:55:30Z",
      "created_at": "2025-01-20T10:55:00Z"
    },
    {
      "id": "cmd_abc123",
      "device_id": "dev_abc123",
      "type": "stop_recording",
      "status": "pending",
      "params": {},
      "grant_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9...",
      "result": null,
      "error": null,
      "expires_at": "2025-01-20T12:00:00Z",
      "delivered_at": null,
      "executed_at": null,
      "created_at": "2025-01-20T11:55:00Z"
    }
  ],
  "has_more": false,
  "next_cursor": null
}""")
# The page on creating shows no answer: a create answers with the command in status pending.
CREATED = CANCELLED | {"status": "pending"}
EXACT = ("device_id", "type", "status", "params", "result", "error")


@pytest.fixture
def token(broker: Broker) -> str:
    """The token of a recorder with the name used on the pages."""
    body = {"id": DEVICE, "hardware_id": "ABC123", "type": "recorder"}
    answer = broker.http("POST", "/v1/devices", body)
    assert answer.status_code == 201, answer.text
    issued: str = answer.json()["device_token"]
    return issued


def asked(broker: Broker, example: str, **more: str) -> tuple[int, Any]:
    return curl(example, **{BASE: broker.url, KEY: broker.key} | more)


def exactly(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Asserts names, order, types and null as shown, and equality of the values that do not depend on time or
    chance."""
    assert unlike(expected, found) == []
    assert {name: found[name] for name in EXACT} == {name: expected[name] for name in EXACT}


def test_a_command_is_created_as_the_page_describes(broker: Broker, token: str) -> None:
    answer = broker.http("POST", f"/v1/devices/{DEVICE}/commands", {"type": "start_recording"})
    command = answer.json()

    assert answer.status_code == 201
    exactly(CREATED, command)
    given = {"max_duration_sec": 60, "upload_immediately": False, "metadata": {"room": "4"}}
    body = {"type": "start_recording", "params": given, "idempotency_key": "once", "ttl_sec": 60}
    first = broker.http("POST", f"/v1/devices/{DEVICE}/commands", body)
    again = broker.http("POST", f"/v1/devices/{DEVICE}/commands", body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["params"] == given
    assert again.json()["id"] == first.json()["id"] != command["id"]


def test_a_pending_command_is_cancelled_as_the_page_shows(broker: Broker, token: str) -> None:
    command_id = broker.create(DEVICE, "start_recording")

    for _ in range(2):
        status, command = asked(broker, CANCEL, **{COMMAND: command_id})
        assert status == 200
        exactly(CANCELLED, command)
        assert command["id"] == command_id
    # Bota has a status `delivered` before execution; here a delivered command is still pending, but its
    # cancel is refused too.
    other = broker.create(DEVICE, "stop_recording")
    broker.http("POST", f"/v1/devices/{DEVICE}/commands/claim")
    status, refused = asked(broker, CANCEL, **{COMMAND: other})
    assert (status, refused["error"]["code"]) == (409, "conflict")
    status, missing = asked(broker, CANCEL)
    assert (status, missing["error"]["code"]) == (404, "not_found")


def test_commands_are_listed_as_the_page_shows_but_newest_first(broker: Broker, token: str) -> None:
    first = broker.create(DEVICE, "start_recording")
    as_device = {"Authorization": f"Bearer {token}"}
    broker.http("POST", "/v1/devices/me/heartbeat", **as_device)
    result = {"recording_id": "rec_def456", "started_at": "2025-01-20T10:55:30Z"}
    report = {"status": "executed", "result": result}
    broker.http("POST", f"/v1/devices/me/commands/{first}/result", report, **as_device)
    broker.create(DEVICE, "stop_recording")

    status, page = asked(broker, LIST)

    assert status == 200
    assert unlike(LISTED, {**page, "data": page["data"][::-1]}) == []
    for expected, found in zip(LISTED["data"], page["data"][::-1], strict=True):
        exactly(expected, found)
    for wanted in ("pending", "executed", "delivered", "failed", "expired", "cancelled"):
        quoted = 'commands"'
        status, some = asked(broker, LIST.replace(quoted, f'commands?status={wanted}&limit=1"'))
        assert status == 200
        assert [each["status"] for each in some["data"]] == [wanted] * (wanted in ("pending", "executed"))


def test_pages_are_stable_and_accept_only_their_own_cursors(broker: Broker, token: str) -> None:
    ids = [broker.create(DEVICE, "start_recording") for _ in range(5)]
    path, seen = f"/v1/devices/{DEVICE}/commands", []
    page = broker.http("GET", f"{path}?limit=2").json()
    while True:
        seen += [command["id"] for command in page["data"]]
        broker.create(DEVICE, "stop_recording")
        if not page["has_more"]:
            break
        cursor = page["next_cursor"]
        page = broker.http("GET", f"{path}?limit=2&cursor={cursor}").json()

    assert (seen, page["next_cursor"]) == (ids[::-1], None)
    turned = cursor[:-3] + ("A" if cursor[-3] != "A" else "B") + cursor[-2:]
    for wrong in (turned, "x", "", cursor + "A"):
        refused = broker.http("GET", f"{path}?limit=2&cursor={wrong}")
        assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (400, "cursor")
    for limit in (0, 101, "x"):
        refused = broker.http("GET", f"{path}?limit={limit}")
        assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (400, "limit")


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({**CANCELLED, "state": "cancelled"}, []),
        ({**CANCELLED, "result": {}}, [".result: {} where None is shown"]),
        (
            {**CANCELLED, "created_at": "yesterday"},
            [".created_at: 'yesterday' is not like '2025-01-20T10:55:00Z'"],
        ),
        ({**CANCELLED, "id": "7"}, [".id: '7' is not like 'cmd_xyz789'"]),
        ({**CANCELLED, "params": {}}, [".params: has [], not ['max_duration_sec', 'upload_immediately']"]),
    ],
)
def test_differences_from_the_example_are_found(found: Any, wrong: list[str]) -> None:
    assert unlike(CANCELLED, found) == wrong
