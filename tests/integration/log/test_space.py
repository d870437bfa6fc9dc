"""Compacting frees space, changes no readable data, and is refused where it could do harm."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.opening import snapshot, space
from broker.operations import transfer
from broker.seams import Broken, Full
from broker.settings import Settings
from broker.world import DATABASE, InUse, SqliteStorage, compact, open_for_reading
from projections import follower
from tests.integration.log.test_golden import put

KIB = 1_024


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with the log of a release and half a megabyte of free pages."""
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as sql:
        sql.execute("PRAGMA journal_mode = WAL")
        put(sql, "0.1.0")
        follower.renew(sql)
        sql.execute("INSERT INTO meta VALUES ('x', ?)", ("x" * 512 * KIB,))
        sql.execute("DELETE FROM meta WHERE key = 'x'")
    return tmp_path


def everything(data: Path) -> object:
    with closing(snapshot(Settings(data=str(data)))) as sql:
        return list(read_now(sql, log.all_rows)), read_now(sql, follower.dump), read_now(sql, log.verify)


def test_compacting_makes_the_file_smaller_and_keeps_every_row(data: Path) -> None:
    before = everything(data)

    sizes = compact(data)

    assert sizes[0] - sizes[1] > 400 * KIB
    assert (data / DATABASE).stat().st_size == sizes[1]
    assert everything(data) == before
    with closing(snapshot(Settings(data=str(data)))) as sql:
        assert space(Settings(data=str(data)), sql)["free_bytes_in_the_file"] == 0


async def test_compacting_is_refused_while_a_broker_serves(data: Path) -> None:
    storage = await SqliteStorage.open(data)
    size = (data / DATABASE).stat().st_size
    try:
        with pytest.raises(InUse, match="another broker"):
            compact(data)
    finally:
        await storage.close()
    assert (data / DATABASE).stat().st_size == size


def test_compacting_is_refused_while_another_process_reads(data: Path) -> None:
    before = everything(data)
    with closing(snapshot(Settings(data=str(data)))) as reader:
        read_now(reader, log.head)
        with pytest.raises(InUse, match="another process reads"):
            compact(data)
        assert read_now(reader, log.verify).fault is None
    assert everything(data) == before
    compact(data)
    assert everything(data) == before


def test_compacting_is_refused_without_room_for_the_copy(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=10_000))
    before = (data / DATABASE).stat().st_size

    with pytest.raises(Full, match="there are 10,000"):
        compact(data)
    assert (data / DATABASE).stat().st_size == before


def test_compacting_creates_no_log(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="there is no log"):
        compact(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_stats_count_rows_and_bytes(data: Path) -> None:
    with closing(snapshot(Settings(data=str(data)))) as sql:
        found = transfer.stats(sql) | space(Settings(data=str(data)), sql)
        rows = list(read_now(sql, log.all_rows))
    assert found["events"] == sum(found["by_type"].values()) == sum(found["by_project"].values()) == len(rows)
    assert found["streams"] == len({row.stream for row in rows})
    assert found["by_type"]["created"] == sum(row.type == "created" for row in rows)
    assert found["erased"] == 0
    assert found["free_bytes_in_the_file"] > 400 * KIB
    assert found["first_recorded_at"] < found["last_recorded_at"]


def test_a_file_that_a_refused_start_left_empty_holds_no_log_yet(tmp_path: Path) -> None:
    (tmp_path / DATABASE).touch()
    with pytest.raises(Broken, match="it holds no log yet; a broker makes one"):
        open_for_reading(tmp_path)
