"""Histories that were forged without breaking a hash: `verify` refuses them, and readers do not show them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.seams import Broken, UnknownFormat
from broker.world import DATABASE
from tests.integration.core_support import running

FORGED = (
    "INSERT INTO events SELECT {position}, stream, 99, 'executed', schema, recorded_at, project, device_id, "
    "actor, data, salt, digest, hash, decided_at FROM events WHERE type = 'created'"
)
REPLACED = (
    "ALTER TABLE events RENAME TO kept; CREATE VIEW events AS SELECT * FROM kept WHERE type != 'created'"
)
HIDDEN = """
    PRAGMA writable_schema = ON;
    UPDATE sqlite_master SET sql = replace(sql, '(stream, version)', '(stream, version) WHERE version < 2')
    WHERE name = 'events_stream';
"""


def without_an_entry(sql: sqlite3.Connection) -> None:
    """Rebuilds the index of the streams with a condition, then takes the condition out of the schema."""
    sql.executescript("DROP INDEX events_stream")
    sql.executescript("CREATE UNIQUE INDEX events_stream ON events (stream, version) WHERE version < 2")
    sql.executescript(
        "PRAGMA writable_schema = ON;"
        "UPDATE sqlite_master SET sql = replace(sql, ' WHERE version < 2', '') WHERE name = 'events_stream';"
    )


@pytest.mark.parametrize(
    ("forge", "fault"),
    [
        (lambda sql: sql.executescript(FORGED.format(position=0)), "a row at position 0"),
        (lambda sql: sql.executescript(FORGED.format(position=-7)), "a row at position -7"),
        (lambda sql: sql.executescript(REPLACED), "a view named 'events'"),
        (without_an_entry, "the file is damaged"),
        (lambda sql: sql.executescript(HIDDEN), "events_stream is not as this release creates it"),
        (lambda sql: sql.executescript("DROP INDEX events_devices"), "events_devices is missing"),
        (
            lambda sql: sql.executescript("CREATE INDEX mine ON events (type) WHERE type = 'a'"),
            "an index named 'mine'",
        ),
        (
            lambda sql: sql.executescript(
                "CREATE TRIGGER t AFTER INSERT ON commands BEGIN DELETE FROM devices; END"
            ),
            "a trigger named 't'",
        ),
    ],
    ids=["zero", "negative", "view", "missing entry", "index", "no index", "one more index", "trigger"],
)
async def test_a_forged_file_does_not_verify_and_is_not_served(
    tmp_path: Path, forge: Callable[[sqlite3.Connection], object], fault: str
) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        command = await bench.order()
        await bench.writer.barrier()
    sql = sqlite3.connect(tmp_path / DATABASE)
    assert read_now(sql, log.verify).fault is None
    forge(sql)
    sql.commit()
    sql.close()

    sql = sqlite3.connect(tmp_path / DATABASE)
    found = read_now(sql, log.verify).fault
    assert found is not None
    assert fault in found
    if "position" in fault:
        assert all(row.position > 0 for row in read_now(sql, log.stream, command.id))
    sql.close()
    if fault not in ("the file is damaged", "events_devices is missing"):
        with pytest.raises((UnknownFormat, Broken), match=r"not a log that Ordain wrote|views may not"):
            async with running(tmp_path):
                pass
