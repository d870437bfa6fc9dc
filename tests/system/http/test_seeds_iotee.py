"""The examples of iotee's page, against a running broker: send, list, get, delete, retry, purge."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.system.conftest import NewBroker
from tests.system.http.seeds_support import curl, unlike
from tests.system.support import Broker, made

BASE, KEY, ADMIN_KEY, COMMAND = "https://api.example.com", "your-key", "your-admin-key", "x1y2z3w4"
SEND = """curl -X POST https://api.example.com/devices/ABC123/commands \\
  -H "X-API-Key: your-key" \\
  -H "Content-Type: application/json" \\
  -d '{"command": "lock"}'
"""
LIST = """curl -H "X-API-Key: your-key" https://api.example.com/devices/ABC123/commands
"""
LIST_ALL = """curl -H "X-API-Key: your-admin-key" https://api.example.com/commands
"""
GET = """curl -H "X-API-Key: your-key" https://api.example.com/commands/x1y2z3w4
"""
DELETE = """curl -X DELETE -H "X-API-Key: your-admin-key" \\
  https://api.example.com/commands/x1y2z3w4
"""
RETRY = """curl -X POST -H "X-API-Key: your-admin-key" \\
  https://api.example.com/commands/x1y2z3w4/retry
"""
PURGE = """curl -X POST https://api.example.com/commands/purge \\
  -H "X-API-Key: your-admin-key" \\
  -H "Content-Type: application/json" \\
  -d '{"older_than_days": 90}'
"""
SENT = json.loads("""{
  "command_id": "x1y2z3w4",
  "hardware_id": "ABC123",
  "device_id": "a1b2c3d4",
  "device_type": "iotee_device",
  "topic": "iotee/dev/ABC123/rls",
  "command": "lock",
  "status": "pending",
  "created_at": "2025-12-17T10:30:00.000Z"
}""")
DELETED = json.loads("""{
  "success": true,
  "deleted": "x1y2z3w4"
}""")
RETRIED = json.loads("""{
  "success": true,
  "original_command_id": "x1y2z3w4",
  "new_command": {
    "command_id": "a9b8c7d6",
    "status": "pending"
  }
}""")
PURGED = json.loads("""{
  "success": true,
  "cutoff_date": "2025-09-18T00:00:00.000Z",
  "deleted": 500
}""")
RECORD = [*SENT, "params", "published_at", "acknowledged_at", "completed_at", "error"]
PAGE = {"limit": 100, "offset": 0, "returned": 1}


class Page:
    """Sends the examples with a user's or an admin's key."""

    def __init__(self, broker: Broker, user: str, admin: str) -> None:
        self.broker = broker
        self._keys = {KEY: user, ADMIN_KEY: admin}

    def __call__(self, example: str, command_id: str = COMMAND) -> tuple[int, Any]:
        keys = {theirs: ours for theirs, ours in self._keys.items() if theirs in example}
        ids = {COMMAND: command_id} if COMMAND in example else {}
        return curl(example, **{BASE: self.broker.url} | keys | ids)

    def send(self) -> str:
        status, sent = self(SEND)
        assert status == 201
        command_id: str = sent["command_id"]
        return command_id

    def cancelled(self) -> str:
        command_id = self.send()
        self.broker.http("DELETE", f"/v1/devices/ABC123/commands/{command_id}")
        return command_id


@pytest.fixture
def page(new_broker: NewBroker) -> Page:
    """A lock with the names used on the page. Its MQTT server is unreachable, so that commands wait."""
    broker = new_broker("--mqtt-url", "mqtt://127.0.0.1:9").start()
    body = {"id": "a1b2c3d4", "hardware_id": "ABC123", "type": "iotee_device"}
    assert broker.http("POST", "/v1/devices", body).status_code == 201
    user = broker.ordain(
        "keys", "create", "--project", "default", "--scope", "devices:read", "--scope", "devices:write"
    )
    admin = broker.ordain("keys", "create", "--project", "default", "--scope", "admin")
    return Page(broker, made(user), made(admin))


def test_a_command_is_sent_as_the_page_shows(page: Page) -> None:
    status, sent = page(SEND)

    assert status == 201
    assert unlike(SENT, sent) == []
    assert list(sent) == list(SENT)
    assert sent | {"command_id": COMMAND, "created_at": SENT["created_at"]} == SENT


def test_listed_and_read_commands_have_all_fields_of_a_sent_one(page: Page) -> None:
    command_id = page.cancelled()

    for example in (LIST, LIST_ALL):
        status, listed = page(example)
        assert (status, list(listed), listed["pagination"]) == (200, ["commands", "pagination"], PAGE)
        assert [each["command_id"] for each in listed["commands"]] == [command_id]
    status, found = page(GET, command_id)
    assert (status, list(found)) == (200, RECORD)
    assert unlike(SENT, found) == []
    assert found == listed["commands"][0]
    assert (found["status"], found["params"]) == ("cancelled", {})
    status, missing = page(GET)
    assert (status, missing["error"]["code"]) == (404, "not_found")


def test_a_command_is_deleted_as_the_page_shows(page: Page) -> None:
    command_id = page.cancelled()

    status, deleted = page(DELETE, command_id)

    assert status == 200
    assert list(deleted) == list(DELETED)
    assert deleted == DELETED | {"deleted": command_id}
    assert page(GET, command_id)[0] == page(DELETE, command_id)[0] == 404
    assert page(LIST)[1]["commands"] == []


def test_a_command_is_retried_as_the_page_shows(page: Page) -> None:
    command_id = page.cancelled()

    status, retried = page(RETRY, command_id)

    assert status == 200
    assert unlike(RETRIED, retried) == []
    new = retried["new_command"]["command_id"]
    assert retried == RETRIED | {
        "original_command_id": command_id,
        "new_command": {"command_id": new, "status": "pending"},
    }
    assert new != command_id
    assert page(GET, new)[1]["command"] == "lock"


def test_old_commands_are_purged_as_the_page_shows(page: Page) -> None:
    page.cancelled()

    before = datetime.now(UTC)
    status, purged = page(PURGE)
    after = datetime.now(UTC)

    assert status == 200
    assert unlike(PURGED, purged) == []
    assert list(purged) == list(PURGED)
    days = {f"{moment - timedelta(days=90):%Y-%m-%d}T00:00:00.000Z" for moment in (before, after)}
    assert purged["cutoff_date"] in days
    assert (purged["success"], purged["deleted"]) == (True, 0)
    assert len(page(LIST)[1]["commands"]) == 1


def test_a_user_is_refused_admin_operations(page: Page) -> None:
    command_id = page.cancelled()

    for example in (LIST_ALL, DELETE, RETRY, PURGE):
        status, refused = page(example.replace(ADMIN_KEY, KEY), command_id)
        assert (status, refused["error"]["code"]) == (403, "forbidden")
    assert page(GET, command_id)[0] == 200
