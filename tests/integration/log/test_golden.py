"""The logs of every release so far: today's code reads them, verifies them, and folds them to the same
states.

The files in `tests/golden/` are logs that each release wrote. They must never change; `write.py` there
creates the log of a new release.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest

from broker.domain.events import TYPES
from broker.domain.lifecycle import State
from broker.engine.live import Live
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.log.lines import as_line, as_row
from projections import follower
from tests.golden.write import HERE, folded, main
from tests.integration.core_support import ManualClock, SeededEntropy
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import SimLoop, run

RELEASES = sorted(path.stem for path in HERE.glob("*.jsonl"))


def lines(release: str) -> list[bytes]:
    return (HERE / f"{release}.jsonl").read_bytes().splitlines()


def states(release: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((HERE / f"{release}.states.json").read_bytes())
    return found


def row_of(line: bytes) -> Row:
    """A row of a golden log; those of the first releases have format 1."""
    return as_row(line, 2 if b'"decided_at"' in line else 1)


def put(sql: Any, release: str) -> None:
    log.create(sql, "log_golden", "00")
    follower.create(sql)
    sql.execute("SAVEPOINT lines")  # on a disk, a commit of each line would take seconds
    for line in lines(release):
        sql.execute(log.INSERT, row_of(line))
    sql.execute("RELEASE lines")


@pytest.fixture(params=RELEASES)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[str, sqlite3.Connection]]:
    with closing(sqlite3.connect(":memory:")) as sql:
        put(sql, request.param)
        yield request.param, sql


def without_defaults(kept: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Only the fields that the release knew: later releases may have added fields to the states."""
    return {key: {name: now[key].get(name) for name in fields} for key, fields in kept.items()}


def test_the_log_of_a_release_verifies_and_encodes_back_to_the_same_bytes(
    golden: tuple[str, sqlite3.Connection],
) -> None:
    release, sql = golden
    verified = read_now(sql, log.verify)

    assert (verified.fault, verified.rows) == (None, len(lines(release)))
    for row, line in zip(read_now(sql, log.all_rows), lines(release), strict=True):
        kept, now = msgspec.json.decode(line), msgspec.json.decode(as_line(row))
        assert now == {"decided_at": None} | kept


def test_every_event_of_a_release_decodes_and_folds_to_the_same_states(
    golden: tuple[str, sqlite3.Connection],
) -> None:
    release, sql = golden
    for row in read_now(sql, log.all_rows):
        assert log.recorded(row).type == row.type
    follower.rebuild(sql)

    kept, now = states(release), folded(sql)
    for part in ("commands", "devices"):
        assert kept[part].keys() == now[part].keys()
        assert without_defaults(kept[part], now[part]) == kept[part]
    assert now["open"] == kept["open"]


def test_a_broker_starts_on_the_log_of_a_release(golden: tuple[str, sqlite3.Connection]) -> None:
    release, _ = golden

    async def world(loop: SimLoop) -> None:
        storage, live = SimStorage(loop, SimDisk(loop)), Live()
        await storage.write(lambda sql: put(sql, release))
        await storage.rebuild()
        await live.load(storage, SeededEntropy(), ManualClock().wall_ms())

        open_ones = [name for name, member in live.members.items() if not member.state.closed]
        assert len(open_ones) == len(states(release)["open"])
        await storage.close()

    run(world)


def test_the_golden_log_of_the_first_release_has_every_event_and_every_state() -> None:
    rows = [row_of(line) for line in lines("0.1.0")]
    found = {state["state"] for state in states("0.1.0")["commands"].values()}

    assert RELEASES[0] == "0.1.0"
    assert {row.type for row in rows} <= set(TYPES)
    assert len({row.type for row in rows}) == 19
    assert found == {state.value for state in State} - {"none"}


def test_a_golden_log_is_never_overwritten() -> None:
    before = {path: path.read_bytes() for path in HERE.glob("*.json*")}

    with pytest.raises(FileExistsError):
        main("0.1.0")
    assert {path: path.read_bytes() for path in HERE.glob("*.json*")} == before
