"""Past states compared with the projections of a log that ends at that position."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from broker.domain.events import (
    SYSTEM,
    Changed,
    Deleted,
    Event,
    Offline,
    Online,
    Recorded,
    Started,
    TokenRotated,
)
from broker.domain.lifecycle import CommandState, State
from broker.log import sqlite as log
from broker.log.driven import read_now
from projections import commands, devices, follower, lanes, past
from projections.commands import Filter
from tests.integration.log.test_golden import RELEASES, put

ALL = 1_000
FILTERS = [
    Filter(),
    Filter(states=(State.PENDING, State.PUBLISHED)),
    Filter(states=(State.TIMED_OUT,)),
    Filter(states=(State.EXECUTED,), type="open"),
    Filter(type="open"),
]


@pytest.fixture(scope="module", params=RELEASES)
def whole(request: pytest.FixtureRequest) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as sql:
        put(sql, request.param)
        come_and_go(sql)
        follower.rebuild(sql)
        yield sql


def come_and_go(sql: sqlite3.Connection) -> None:
    """Adds events that the release's log lacks: a broker start, changes of a device, and its deletion."""
    device_id = sql.execute(
        "SELECT max(device_id) FROM events WHERE type = 'registered' AND device_id NOT IN "
        "(SELECT device_id FROM events WHERE type = 'deleted')"
    ).fetchone()[0]
    name = f"device/{device_id}"
    events: list[Event] = [Online(), Started(release="2", mqtt="external"), Offline(), Changed(name="a")]
    events += [Online(), Changed(name="b"), Offline(), TokenRotated(token_digest="t"), Online(), Deleted()]
    for event in events:
        head = read_now(sql, log.head)
        stream = SYSTEM if isinstance(event, Started) else name
        version = sql.execute("SELECT max(version) FROM events WHERE stream = ?", (stream,)).fetchone()[0]
        recorded = Recorded(
            position=head.position + 1,
            stream=stream,
            version=version + 1,
            recorded_at=head.recorded_at + 10,
            decided_at=head.recorded_at + 10,
            project="" if stream == SYSTEM else "acme",
            device_id=None if stream == SYSTEM else device_id,
            actor="broker",
            event=event,
        )
        log.append(sql, head, [recorded], bytes(16))


@pytest.fixture(scope="module")
def prefixes(whole: sqlite3.Connection) -> Iterator[list[tuple[int, sqlite3.Connection]]]:
    """For every position, a database whose log ends there."""
    found = []
    rows = list(read_now(whole, log.all_rows))
    for position in range(len(rows) + 1):
        sql = sqlite3.connect(":memory:")
        log.create(sql, "log_golden", "00")
        sql.executemany(log.INSERT, rows[:position])
        follower.rebuild(sql)
        found.append((position, sql))
    yield found
    for _, sql in found:
        sql.close()


def paged(sql: sqlite3.Connection, wanted: Filter, position: int, limit: int) -> list[CommandState]:
    found, before = [], None
    while True:
        page, before = read_now(
            sql, past.commands, msgspec.structs.replace(wanted, before=before), position, limit
        )
        found += page
        if before is None:
            return found


def named(sql: sqlite3.Connection) -> list[str]:
    return [row[0] for row in sql.execute("SELECT id FROM devices ORDER BY id")]


@pytest.mark.parametrize("wanted", FILTERS)
@pytest.mark.parametrize("limit", [ALL, 2])
def test_a_past_list_of_commands_is_correct(
    whole: sqlite3.Connection,
    prefixes: list[tuple[int, sqlite3.Connection]],
    wanted: Filter,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(past, "SCANNED", ALL if limit == ALL else 7)
    monkeypatch.setattr(past, "FOLDED", ALL if limit == ALL else 2)
    seen = 0
    for position, sql in prefixes:
        for device_id in (None, *named(whole)):
            one = msgspec.structs.replace(wanted, device_id=device_id)
            then = read_now(sql, commands.newest, one, ALL)
            assert paged(whole, one, position, limit) == then, position
            seen += len(then)
    assert seen > 0


def test_past_commands_and_lanes_are_correct(
    whole: sqlite3.Connection, prefixes: list[tuple[int, sqlite3.Connection]]
) -> None:
    ids = [row[0] for row in whole.execute("SELECT stream FROM events JOIN commands USING (position)")]
    opened = 0
    for position, sql in prefixes:
        for command_id in ids:
            assert read_now(whole, past.command, command_id, position) == read_now(
                sql, commands.get, command_id
            ), position
        for device_id in named(whole):
            then = read_now(sql, lanes.open_commands, device_id)
            assert read_now(whole, past.lane, device_id, position) == then, position
            opened += len(then)
    assert opened > 0


def test_past_devices_are_correct(
    whole: sqlite3.Connection, prefixes: list[tuple[int, sqlite3.Connection]]
) -> None:
    for position, sql in prefixes:
        then = read_now(sql, devices.newest, None, None, ALL)
        found = [each.state for each in read_now(whole, past.devices, None, position, None, ALL)]
        assert found == then, position
        known = read_now(sql, devices.by_name, named(sql))
        for device_id in named(whole):
            one = read_now(whole, past.device, device_id, position)
            assert (None if one is None else one.state) == known.get(device_id), position


def test_a_diff_equals_the_difference_between_two_points(
    whole: sqlite3.Connection,
    prefixes: list[tuple[int, sqlite3.Connection]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(past, "SCANNED", 5)
    head = len(prefixes) - 1
    for start, end in [
        (0, head),
        (0, head // 2),
        (head // 3, head),
        (head // 2, head // 2 + 3),
        (head, head),
    ]:
        found: list[past.Change] = []
        after: int | None = start
        while after is not None:
            page, after = read_now(whole, past.changes, None, start, end, after, 3)
            found += page
        older, newer = prefixes[start][1], prefixes[end][1]
        touched = {row.stream for row in read_now(whole, log.all_rows, start) if row.position <= end}
        expected = {name for name in touched if name.startswith(("device/", "cmd_"))}
        streams = [
            change.after.id if isinstance(change, past.CommandChange) else f"device/{change.after.state.id}"
            for change in found
        ]
        assert len(streams) == len(set(streams))
        assert set(streams) == expected
        for change in found:
            if isinstance(change, past.CommandChange):
                assert change.before == read_now(older, commands.get, change.after.id)
                assert change.after == read_now(newer, commands.get, change.after.id)
            else:
                name = change.after.state.id
                before = None if change.before is None else change.before.state
                assert before == read_now(older, devices.by_name, [name]).get(name)
                assert change.after.state == read_now(newer, devices.by_name, [name])[name]


def test_a_time_means_the_last_event_recorded_at_or_before_it(whole: sqlite3.Connection) -> None:
    times = [row.recorded_at for row in read_now(whole, log.all_rows)]
    for at in {moment + step for moment in times for step in (-1, 0, 1)}:
        assert read_now(whole, log.place, at) == sum(recorded <= at for recorded in times)


def test_presence_from_before_a_start_of_the_broker_is_void(whole: sqlite3.Connection) -> None:
    voided = 0
    for row in read_now(whole, log.all_rows):
        if row.type == "started":
            for then in read_now(whole, past.devices, None, row.position, None, ALL):
                assert then.void == then.state.online
                voided += then.void
        if row.type == "online":
            one = read_now(whole, past.device, row.device_id or "", row.position)
            assert one is not None
            assert (one.state.online, one.void) == (True, False)
    assert voided > 0


def test_erased_commands_are_absent_from_the_past_too(whole: sqlite3.Connection) -> None:
    with closing(sqlite3.connect(":memory:")) as sql:
        whole.backup(sql)
        gone = read_now(sql, commands.newest, Filter(states=(State.EXECUTED,)), 1)[0]
        position = read_now(sql, log.stream, gone.id)[-1].position - 1
        assert read_now(sql, past.command, gone.id, position) is not None
        sql.execute("UPDATE events SET data = NULL, salt = NULL WHERE stream = ?", (gone.id,))

        assert read_now(sql, past.command, gone.id, position) is None
        assert gone.id not in {each.id for each in paged(sql, Filter(), position, ALL)}
        assert gone.id not in {each.id for each in read_now(sql, past.lane, gone.device_id, position)}

        commands.remove(sql, gone.id)
        assert read_now(sql, past.command, gone.id, read_now(sql, log.head).position) is None
        changed, _ = read_now(sql, past.changes, None, 0, read_now(sql, log.head).position, 0, ALL)
        assert gone.id not in {c.after.id for c in changed if isinstance(c, past.CommandChange)}
