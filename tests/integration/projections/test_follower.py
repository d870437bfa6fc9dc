"""Projections compared with the log: a rebuilt one is the same, and each changed row is named."""

from __future__ import annotations

import runpy
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from broker.log import sqlite as log
from broker.log.driven import Driven, read_now
from projections import commands, follower
from tests.integration.log.test_golden import RELEASES, put


@pytest.fixture(params=RELEASES)
def kept(request: pytest.FixtureRequest) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as sql:
        put(sql, request.param)
        follower.renew(sql)
        yield sql


def verified(kept: sqlite3.Connection) -> str | None:
    return read_now(kept, follower.fault, lambda _: None)


@pytest.mark.parametrize("page", [1, 7, 5_000])
def test_projections_rebuilt_in_another_database_are_the_same(
    kept: sqlite3.Connection, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "PAGE", page)
    seen: list[int] = []
    with closing(sqlite3.connect("")) as made:
        read_now(kept, follower.replay, made, seen.append)

        assert read_now(kept, follower.difference, Driven(made)) is None
        assert read_now(made, follower.dump) == read_now(kept, follower.dump)
    assert seen[-1] == read_now(kept, log.head).position
    assert verified(kept) is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            "UPDATE commands SET state = 'executed' WHERE position = 47",
            "commands, the row of position 47: state",
        ),
        (
            "UPDATE commands SET later = x'90' WHERE position = 8",
            "commands, the row of position 8: later",
        ),
        ("DELETE FROM commands WHERE position = 8", "commands, the row of position 8 is missing"),
        ("UPDATE commands SET position = 9 WHERE position = 8", "commands, the row of position 8 is missing"),
        ("DELETE FROM commands WHERE position > 8", "commands, the row of position 13 is missing"),
        ("DELETE FROM names WHERE name = 'lamp-1'", "names, the row of name 'lamp-1' is missing"),
        ("UPDATE devices SET deleted = 1", "devices, the row of id"),
        ("DELETE FROM definitions", "definitions, the row of digest"),
    ],
)
def test_the_first_row_that_does_not_follow_from_the_log_is_named(
    kept: sqlite3.Connection, change: str, found: str
) -> None:
    assert verified(kept) is None
    kept.execute(change)

    assert found in (verified(kept) or "")


def test_an_added_row_is_named_and_not_the_row_after_it(kept: sqlite3.Connection) -> None:
    kept.execute(
        "INSERT INTO commands SELECT 9, project, device_id, type, state, version, closed_at, "
        "closed_position, later FROM commands WHERE position = 8"
    )

    assert verified(kept) == "commands, the row of position 9 does not follow from the log"


def test_a_row_too_many_whose_event_was_changed_as_well_is_found(kept: sqlite3.Connection) -> None:
    kept.execute(
        "UPDATE events SET type = 'created', data = (SELECT data FROM events WHERE position = 8) "
        "WHERE position = (SELECT min(position) FROM events WHERE stream NOT LIKE 'cmd%')"
    )
    kept.execute(
        "INSERT INTO commands SELECT e.position, c.project, c.device_id, c.type, c.state, c.version, "
        "c.closed_at, c.closed_position, c.later FROM commands c, events e WHERE c.position = 8 "
        "AND e.type = 'created' AND e.stream NOT LIKE 'cmd%'"
    )
    count = kept.execute("SELECT count(*) FROM commands").fetchone()[0]

    found = f"commands has {count} rows, and the log has {count - 1} commands; see ordain log verify"
    assert verified(kept) == found


def test_projections_are_rebuilt_when_what_a_row_holds_by_place_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`runpy` makes the digest again, as the next release does."""
    assert runpy.run_path(follower.__file__)["SHAPE"] == follower.SHAPE
    moved = msgspec.defstruct("Later", [*reversed(commands.Later.__struct_fields__)])
    monkeypatch.setattr(commands, "Later", moved)

    assert runpy.run_path(follower.__file__)["SHAPE"] != follower.SHAPE


def test_projections_of_another_schema_are_rebuilt(kept: sqlite3.Connection) -> None:
    before = read_now(kept, follower.dump)
    kept.execute("UPDATE meta SET value = 'older' WHERE key = 'projections'")
    kept.execute("DROP INDEX commands_open")
    kept.execute("CREATE TABLE lanes (device_id TEXT NOT NULL)")  # as an earlier release had one
    kept.execute("DELETE FROM commands")

    follower.prepare(kept)

    assert read_now(kept, follower.dump) == before
    assert read_now(kept, follower.is_current)
    assert kept.execute(
        "SELECT name FROM sqlite_master WHERE name IN ('commands_open', 'lanes')"
    ).fetchall() == [("commands_open",)]
    kept.execute("DELETE FROM commands")
    follower.prepare(kept)
    assert read_now(kept, follower.dump) != before  # the schema is current, so nothing was rebuilt
