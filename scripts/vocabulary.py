"""The names of fields, states and calls in the three HTTP APIs, for docs/reference/vocabulary.md.

The states and their words come from the tables that the HTTP responses use. The names of fields and calls are
written here; a test compares them with the Structs and routes.
"""

from __future__ import annotations

from typing import NamedTuple

from broker.domain.lifecycle import State
from broker.http.compat import iotee
from broker.http.v1 import views


class Row(NamedTuple):
    """One concept and its names in each of the three APIs: "" for none, several separated by commas."""

    what: str
    v1: str
    unversioned: str
    app: str


FIELDS = (
    Row("id of the command", "id", "command_id", "command_id"),
    Row("id of the device", "device_id", "device_id", ""),
    Row("hardware id: the device's name in topics", "hardware_id", "hardware_id", ""),
    Row("type of the device", "", "device_type", ""),
    Row("name of the command", "type", "command", "name"),
    Row("parameters", "params", "params", "data, value"),
    Row("state, in the words of these paths", "status", "status", "status"),
    Row("exact state", "state", "", ""),
    Row("MQTT topic", "", "topic", ""),
    Row("time: accepted", "created_at", "created_at", "timestamp"),
    Row("time: first handed over", "published_at", "published_at", ""),
    Row("time: first answer of the device", "delivered_at", "", ""),
    Row("time: acknowledged by the device", "", "acknowledged_at", ""),
    Row("time: executed", "executed_at", "completed_at", ""),
    Row("result", "result", "", ""),
    Row("why it failed", "error", "error", ""),
    Row("time: expires", "expires_at", "", ""),
    Row("time to live, seconds", "", "", "ttl_sec"),
    Row("key of pending commands that it replaces", "", "", "collapse_key"),
    Row("grant", "grant_token", "", ""),
    Row("number of hand-overs", "attempts", "", ""),
    Row("id of the command that it retries", "retry_of", "", ""),
)
CALLS = (
    Row(
        "send",
        "POST /v1/devices/{device}/commands",
        "POST /devices/{device}/commands",
        "POST /v1/app/command/send",
    ),
    Row("send to many", "POST /v1/commands", "", "POST /v1/app/command/send"),
    Row("read", "GET /v1/commands/{command_id}", "GET /commands/{command_id}", ""),
    Row(
        "list the commands of a device",
        "GET /v1/devices/{device}/commands",
        "GET /devices/{device}/commands",
        "POST /v1/app/command/history",
    ),
    Row("list all", "GET /v1/commands", "GET /commands", ""),
    Row("list the events of a command", "GET /v1/commands/{command_id}/events", "", ""),
    Row("explain its state", "GET /v1/commands/{command_id}/explain", "", ""),
    Row("cancel", "DELETE /v1/devices/{device}/commands/{command_id}", "", ""),
    Row("cancel many", "POST /v1/commands/cancel", "", ""),
    Row("abandon: give up waiting", "POST /v1/commands/{command_id}/abandon", "", ""),
    Row("retry", "POST /v1/commands/{command_id}/retry", "POST /commands/{command_id}/retry", ""),
    Row("erase", "", "DELETE /commands/{command_id}", ""),
    Row("erase all old commands", "", "POST /commands/purge", ""),
)


def states() -> str:
    """Every state and its word in each of the three APIs. The app uses the words of `/v1`."""
    rows = [
        Row(state.value, views.STATUS[state], iotee.STATUS[state], views.STATUS[state])
        for state in State
        if state is not State.NONE
    ]
    return _table("state", rows)


def fields() -> str:
    return _table("", FIELDS)


def calls() -> str:
    return _table("", CALLS)


def _table(corner: str, rows: tuple[Row, ...] | list[Row]) -> str:
    lines = [f"| {corner} | `/v1` | unversioned paths | app |", "|---|---|---|---|"]
    for what, *names in rows:
        cells = [", ".join(f"`{name}`" for name in text.split(", ") if name) for text in names]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
