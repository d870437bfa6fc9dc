"""The types of the rows of a batch on PostgreSQL, which databases keep from release to release."""

from __future__ import annotations

from broker.log.postgresql.tables import ROWS

# Each type that a release made. Entries are added, and none is ever changed: see `tables.ROWS`.
MADE = {
    "new_event": "stream text, version bigint, type text, schema bigint, decided_at bigint, project text, "
    "device_id text, actor text, data bytea, salt bytea",
    "newest_command": "id text, over bigint, first bigint, last bigint, project text, device_id text, "
    "type text, state text, version bigint, closed_at bigint, later bytea",
    "newest_device": "id text, over bigint, first bigint, last bigint, project text, hardware_id text, "
    "deleted boolean, version bigint, online bigint, body bytea",
}


def test_a_type_with_other_columns_has_another_name() -> None:
    assert {name: " ".join(columns.split()) for name, columns in ROWS.items()}.items() <= MADE.items()
