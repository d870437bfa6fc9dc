"""The hash chain: every changed, lost, swapped or copied row is found, and the bad row is named."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.events import (
    ERASURES,
    Acknowledged,
    Changed,
    Erased,
    Event,
    Executed,
    Offline,
    Online,
    Published,
    TokenRotated,
    device_stream,
)
from broker.log import chain, erasing
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.log.sqlite import Verified
from tests.integration.core_support import DEVICE, T, created, recorded
from tests.unit.domain.test_fleet import REGISTERED

EVENTS: list[tuple[str, Event, int]] = [
    (device_stream(DEVICE), REGISTERED, 0),
    ("cmd_1", created(), 10),
    ("cmd_2", created(params=msgspec.Raw(b'{"secret":1}')), 20),
    ("cmd_1", Published(attempt=1), 30),
    ("cmd_2", Published(attempt=1), 40),
    ("cmd_1", Acknowledged(), 50),
    ("cmd_2", Executed(result=msgspec.Raw(b'{"value":1}')), 60),
]
LAST = len(EVENTS)


def write(sql: sqlite3.Connection, entries: list[tuple[str, Event, int]]) -> None:
    head = read_now(sql, log.head)
    versions: dict[str, int] = dict(
        sql.execute("SELECT stream, max(version) FROM events GROUP BY stream").fetchall()
    )
    made = []
    for index, (stream, event, after) in enumerate(entries):
        versions[stream] = versions.get(stream, 0) + 1
        entry = recorded(event, versions[stream], T + after, stream)
        made.append(msgspec.structs.replace(entry, position=head.position + index + 1))
    salts = bytes(range(16)) * len(made)
    log.append(sql, head, made, salts)


@pytest.fixture
def sql() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection, connection:
        log.create(connection, "log_1", "00")
        write(connection, EVENTS)
        yield connection
    connection.close()


def fault(sql: sqlite3.Connection) -> str:
    return read_now(sql, log.verify).fault or "none"


def test_an_untouched_log_verifies_to_its_head(sql: sqlite3.Connection) -> None:
    assert read_now(sql, log.verify) == Verified(LAST, read_now(sql, log.head).hash, None)


OTHER: dict[str, Any] = {
    "stream": "cmd_9", "version": 9, "type": "progressed", "schema": 2, "recorded_at": T + 15,
    "decided_at": T + 15, "project": "other", "device_id": "dev_9", "actor": "key:key_9",
    "data": b'{"attempt":7}', "salt": b"x" * 16, "digest": b"d" * 32, "hash": b"h" * 32,
}  # fmt: skip


@pytest.mark.parametrize("position", range(1, LAST + 1))
@pytest.mark.parametrize("column", [name for name in Row._fields if name != "position"])
def test_a_change_of_any_column_of_any_row_is_named(
    sql: sqlite3.Connection, column: str, position: int
) -> None:
    sql.execute(f"UPDATE events SET {column} = ? WHERE position = ?", (OTHER[column], position))

    assert f"position {position} " in fault(sql)


@pytest.mark.parametrize("column", ["device_id", "data", "salt"])
def test_null_and_empty_values_have_different_hashes(sql: sqlite3.Connection, column: str) -> None:
    for nothing in (None, "" if column == "device_id" else b""):
        sql.execute("SAVEPOINT before")
        sql.execute(f"UPDATE events SET {column} = ? WHERE position = 3", (nothing,))
        assert "position 3 " in fault(sql)
        sql.execute("ROLLBACK TO before")


@pytest.mark.parametrize("position", range(1, LAST))
def test_a_lost_row_is_named(sql: sqlite3.Connection, position: int) -> None:
    sql.execute("DELETE FROM events WHERE position = ?", (position,))
    assert fault(sql) == f"position {position} is missing: the next row is {position + 1}"


@pytest.mark.parametrize("position", range(1, LAST))
def test_a_lost_row_is_found_when_later_rows_move_up(sql: sqlite3.Connection, position: int) -> None:
    sql.execute("DELETE FROM events WHERE position = ?", (position,))
    for number in range(position + 1, LAST + 1):
        sql.execute("UPDATE events SET position = ? WHERE position = ?", (number - 1, number))
    assert f"position {position} " in fault(sql)


def test_a_lost_end_is_visible_in_the_count_and_the_hash(sql: sqlite3.Connection) -> None:
    before = read_now(sql, log.verify)
    sql.execute("DELETE FROM events WHERE position = ?", (LAST,))
    after = read_now(sql, log.verify)

    assert (after.rows, after.fault) == (before.rows - 1, None)
    assert after.hash != before.hash


@pytest.mark.parametrize(
    ("one", "other"), [(a, b) for a in range(1, LAST + 1) for b in range(a + 1, LAST + 1)]
)
def test_swapped_rows_are_found_at_the_first_of_them(sql: sqlite3.Connection, one: int, other: int) -> None:
    sql.execute("UPDATE events SET position = -1 WHERE position = ?", (one,))
    sql.execute("UPDATE events SET position = ? WHERE position = ?", (one, other))
    sql.execute("UPDATE events SET position = ? WHERE position = -1", (other,))

    assert f"position {one} " in fault(sql)


@pytest.mark.parametrize("position", range(1, LAST + 1))
def test_a_copied_row_is_found(sql: sqlite3.Connection, position: int) -> None:
    row = Row(*sql.execute(f"SELECT {log.COLUMNS} FROM events WHERE position = ?", (position,)).fetchone())
    sql.execute(log.INSERT, row._replace(position=LAST + 1, version=9))

    assert f"position {LAST + 1} " in fault(sql)


def test_a_forged_row_with_a_correct_hash_is_found_by_its_time_or_version(sql: sqlite3.Connection) -> None:
    """A forger who recomputes the hashes still cannot break these two rules unnoticed."""
    for version, at, expected in (
        (4, T, f"position {LAST + 1} is older than the row before it"),
        (9, T + 60, "stream cmd_2 has 4 events up to version 9"),
    ):
        sql.execute("SAVEPOINT before")
        data, salt = b"{}", b"s" * 16
        digest = chain.digest(salt, data)
        header = (LAST + 1, "cmd_2", version, "acknowledged", 1, at, at, "acme", DEVICE, "me")
        forged = Row(*header, data, salt, digest, chain.link(read_now(sql, log.head).hash, *header, digest))
        sql.execute(log.INSERT, forged)
        assert fault(sql) == expected
        sql.execute("ROLLBACK TO before")


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 40))
def test_bytes_cannot_move_from_the_salt_to_the_data(salt: bytes, data: bytes, cut: int) -> None:
    joined = salt + data
    moved = joined[:cut], joined[cut:]

    assert (chain.digest(*moved) == chain.digest(salt, data)) == (moved == (salt, data))


# --- erasing


def erase(sql: sqlite3.Connection, stream: str) -> None:
    sql.execute("UPDATE events SET data = NULL, salt = NULL WHERE stream = ?", (stream,))


def test_erased_data_without_an_erased_event_is_named(sql: sqlite3.Connection) -> None:
    erase(sql, "cmd_2")
    assert fault(sql) == "position 3 has no data, and no erased event names it"


def test_erased_data_covered_by_an_erased_event_verifies(sql: sqlite3.Connection) -> None:
    erase(sql, "cmd_2")
    write(sql, [(ERASURES, Erased(ids=["cmd_2"], count=1), 100)])
    assert fault(sql) == "none"

    erase(sql, "cmd_1")
    assert fault(sql) == "position 2 has no data, and no erased event names it"


def test_a_cutoff_covers_only_commands_created_before_it_and_all_their_rows(sql: sqlite3.Connection) -> None:
    write(sql, [("cmd_1", Executed(), 90), (ERASURES, Erased(cutoff=T + 15, count=1), 100)])
    erase(sql, "cmd_1")
    assert fault(sql) == "none", "its later events are covered too"

    erase(sql, "cmd_2")
    assert fault(sql) == "position 3 has no data, and no erased event names it"


def test_no_erased_event_covers_a_command_that_was_still_open(sql: sqlite3.Connection) -> None:
    write(sql, [(ERASURES, Erased(ids=["cmd_1"], cutoff=T + 1_000, count=2), 100)])
    erase(sql, "cmd_2")
    assert fault(sql) == "none"

    erase(sql, "cmd_1")
    assert fault(sql) == "position 2 has no data, and no erased event names it"

    write(sql, [("cmd_1", Executed(), 110)])
    assert fault(sql) == "position 2 has no data, and no erased event names it"


def test_a_cutoff_covers_neither_devices_nor_itself(sql: sqlite3.Connection) -> None:
    write(sql, [(ERASURES, Erased(cutoff=T + 1_000, count=2), 100)])
    erase(sql, device_stream(DEVICE))
    assert fault(sql) == "position 1 has no data, and no erased event names it"


def test_only_a_named_device_event_that_a_newer_one_replaced_may_be_empty(sql: sqlite3.Connection) -> None:
    stream = device_stream(DEVICE)
    said: list[Event] = [
        Online(session="a"), Changed(attributes={"n": 1}), Changed(name="x"), TokenRotated(token_digest="t"),
        Online(session="b"), Changed(attributes={"n": 2}),
    ]  # fmt: skip
    write(sql, [(stream, event, 100) for event in said])
    first = LAST + 1
    every = [1, *range(first, first + len(said))]

    for position in every:
        sql.execute("SAVEPOINT one")
        erasing.erase_positions(sql, [position])
        assert fault(sql) == f"position {position} has no data, and no erased event names it"
        write(sql, [(ERASURES, Erased(positions=every, count=len(every)), 200)])
        # An empty change does not tell which fields it set. Only the `erased` event vouches for it.
        may_be_empty = position in (first, first + 1, first + 2)
        assert (fault(sql) == "none") is may_be_empty, said[position - first]
        sql.execute("ROLLBACK TO one")

    write(sql, [(ERASURES, Erased(positions=[LAST + 7], count=1), 200), (stream, Online(), 210)])
    write(sql, [(stream, Offline(), 220)])
    erasing.erase_positions(sql, [LAST + 8])
    assert fault(sql).startswith(f"position {LAST + 8} has no data"), "no event names a later position"


def test_an_erased_event_itself_cannot_be_erased(sql: sqlite3.Connection) -> None:
    write(sql, [(ERASURES, Erased(ids=["cmd_2", ERASURES], count=1), 100)])
    erase(sql, "cmd_2")
    erase(sql, ERASURES)
    assert fault(sql) == "position 3 has no data, and no erased event names it"


def test_remaining_data_is_checked_although_an_erased_event_names_it(sql: sqlite3.Connection) -> None:
    write(sql, [(ERASURES, Erased(ids=["cmd_2"], cutoff=T + 1_000, count=1), 100)])
    sql.execute("UPDATE events SET data = ? WHERE position = 3", (b"{}",))
    assert fault(sql) == "position 3 was changed: its data does not match its digest"
