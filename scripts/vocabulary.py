"""The vocabularies of the three HTTP surfaces side by side, for docs/reference/vocabulary.md.

The states and their words come from the tables that the HTTP responses use. The names of fields and calls are
written here; a test compares them with the Structs and routes.
"""

from __future__ import annotations

from typing import NamedTuple

from broker.domain.lifecycle import State
from broker.http.compat import iotee
from broker.http.v1 import views


class Row(NamedTuple):
    """One concept and its name on each surface; "" if it has none, several separated by commas."""

    what: str
    v1: str
    unversioned: str
    app: str


FIELDS = (
    Row("the command", "id", "command_id", "command_id"),
    Row("the device: id", "device_id", "device_id", ""),
    Row("the device: its name in topics", "hardware_id", "hardware_id", ""),
    Row("the device: its type", "", "device_type", ""),
    Row("what it is to do", "type", "command", "name"),
    Row("with what", "params", "params", "data, value"),
    Row("the word for its state", "status", "status", "status"),
    Row("its state in full", "state", "", ""),
    Row("where it is published", "", "topic", ""),
    Row("accepted at", "created_at", "created_at", "timestamp"),
    Row("first handed over at", "published_at", "published_at", ""),
    Row("the device's first answer at", "delivered_at", "", ""),
    Row("the device said that it has it at", "", "acknowledged_at", ""),
    Row("the device said that it did it at", "executed_at", "completed_at", ""),
    Row("what the device gave back", "result", "", ""),
    Row("why it failed", "error", "error", ""),
    Row("when its time runs out", "expires_at", "", ""),
    Row("how long it may wait for the device", "", "", "ttl_sec"),
    Row("which pending ones it replaces", "", "", "collapse_key"),
    Row("the grant", "grant_token", "", ""),
    Row("hand-overs so far", "attempts", "", ""),
    Row("what it was made from", "retry_of", "", ""),
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
        "list those of a device",
        "GET /v1/devices/{device}/commands",
        "GET /devices/{device}/commands",
        "POST /v1/app/command/history",
    ),
    Row("list all", "GET /v1/commands", "GET /commands", ""),
    Row("its events", "GET /v1/commands/{command_id}/events", "", ""),
    Row("why it is where it is", "GET /v1/commands/{command_id}/explain", "", ""),
    Row("cancel", "DELETE /v1/devices/{device}/commands/{command_id}", "", ""),
    Row("cancel many", "POST /v1/commands/cancel", "", ""),
    Row("give up waiting", "POST /v1/commands/{command_id}/abandon", "", ""),
    Row("send again", "POST /v1/commands/{command_id}/retry", "POST /commands/{command_id}/retry", ""),
    Row("erase", "", "DELETE /commands/{command_id}", ""),
    Row("erase all old ones", "", "POST /commands/purge", ""),
)


def states() -> str:
    """Every state and its word on each surface. The app uses the words of `/v1`."""
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
