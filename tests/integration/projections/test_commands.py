"""The rows of commands: a row and the events of its command give the whole state."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing

import msgspec
import pytest

from broker.domain.events import Created, encode
from broker.domain.lifecycle import CommandState, State, evolve
from broker.log import sqlite as log
from broker.log.driven import read_now
from projections import batches, commands, follower, lanes
from tests.integration.core_support import created, recorded
from tests.integration.log.author import Author
from tests.integration.log.test_golden import RELEASES, put

CREATED = recorded(
    created(ttl_ms=60_000, retry_of="cmd_0", collapse_key="door", params=msgspec.Raw(b'{"a":1}')), 1
)
AT = CREATED.decided_at
# Every field that a later event can change has another value than after `created`.
CHANGED = {
    "state": State.TIMED_OUT,
    "version": 70_000,
    "updated_at": AT + 1,
    "closed_at": AT + 2,
    "published_at": AT,
    "handed_over_at": AT + 300,
    "delivered_at": AT + 70_000,
    "acknowledged_at": AT + 2**33,
    "reported_at": AT - 5,
    "executed_at": AT + 4,
    "attempts": 3,
    "counted": 2,
    "counting": False,
    "transport": "relay",
    "pulled": True,
    "percent": 12.5,
    "note": "at the door",
    "progress_count": 9,
    "reason": "no_answer",
    "by": "operator",
    "superseded_by": "cmd_2",
    "late": True,
    "reopened": True,
    "numbers": (4, 5),
    "signed": False,
    "seq": 0,
}
ELSEWHERE = {"result", "error"}  # in the last event


def test_a_row_and_the_created_event_have_every_field() -> None:
    first = evolve(None, CREATED)
    state = msgspec.structs.replace(first, **CHANGED)
    for field in msgspec.structs.fields(CommandState):
        if field.default is not msgspec.NODEFAULT and field.name not in ELSEWHERE:
            assert getattr(state, field.name) != field.default, f"{field.name} is missing in this test"

    row = (commands.later(state), state.state.value, state.version, state.closed_at)
    about = (CREATED.stream, AT, CREATED.project, CREATED.device_id, CREATED.actor, encode(CREATED.event))

    assert commands.opened((*row, *about)) == state


def test_the_row_the_created_event_and_the_last_one_have_every_field_between_them() -> None:
    columns = {"id", "project", "device_id", "actor", "created_at", "state", "version", "closed_at"}
    of_later, of_created = commands.Later.__struct_fields__, Created.__struct_fields__

    known = {*of_later, *of_created, *columns, *ELSEWHERE}
    assert {*CommandState.__struct_fields__} <= known
    assert {*of_later} <= {*CommandState.__struct_fields__} - {*of_created, *columns, *ELSEWHERE}


def test_open_commands_that_are_read_together_share_their_texts_and_nobody_else_keeps_them() -> None:
    device_id = "-".join(["dev", "with", "two", "commands"])
    with closing(sqlite3.connect(":memory:")) as sql:
        follower.open_log(sql, "log_1", "00" * 32)
        author = Author(term=batches.TERM)
        for each in ("cmd_1", "cmd_2"):
            author.command(each, device_id=device_id)
        batches.carry_out(sql, author.batch())
        one, two = read_now(sql, lanes.open_commands)

    for field in lanes.COMMON:
        assert getattr(one, field) is getattr(two, field)
    copy = "".join([*device_id])
    assert sys.intern(copy) is copy  # sys.intern would give the text that it has


@pytest.mark.parametrize("release", RELEASES)
def test_each_command_of_a_release_is_read_as_the_fold_of_its_events(release: str) -> None:
    with closing(sqlite3.connect(":memory:")) as sql:
        put(sql, release)
        follower.renew(sql)
        fold = follower.Fold()
        for row in read_now(sql, log.all_rows):
            if row.data is not None:
                fold.fold(log.recorded(row))

        assert fold.commands
        for command_id, state in fold.commands.items():
            assert read_now(sql, commands.get, command_id) == state
