"""A log of format 1 is upgraded when a broker starts on it; all other commands read it as it is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from broker.engine.ids import new_id
from broker.log import chain
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.log.lines import Header, header_line
from broker.opening import snapshot
from broker.operations import backup, transfer
from broker.seams import Broken
from broker.settings import Settings
from broker.world import DATABASE, SqliteStorage, SystemClock, SystemEntropy, open_file, open_for_reading
from projections import follower
from tests.integration.core_support import running
from tests.integration.log.test_golden import lines, row_of

RELEASE = "0.1.0"
KEPT = f"{DATABASE}.format-1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data directory with the log of the first release, as that release wrote it."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    with closing(sqlite3.connect(directory / DATABASE, isolation_level=None)) as sql:
        sql.execute("BEGIN")  # on a disk, a commit of each line would take seconds
        for statement in log.TABLES.replace(", decided_at INTEGER", "").split(";"):
            sql.execute(statement)
        log_id = new_id("log", SystemClock().wall_ms(), SystemEntropy())
        facts = [("log_id", log_id), ("cursor_key", "00" * 32), ("format", "1")]
        sql.executemany("INSERT INTO meta VALUES (?, ?)", facts)
        columns = log.COLUMNS.replace("decided_at, ", "")
        for line in lines(RELEASE):
            row = row_of(line)
            values = (*row[:6], *row[7:])
            sql.execute(f"INSERT INTO events ({columns}) VALUES ({', '.join('?' * len(values))})", values)
        sql.execute("COMMIT")
    return directory


def rows(directory: Path) -> list[Row]:
    with closing(open_for_reading(directory)) as sql:
        verified = read_now(sql, log.verify)
        assert verified.fault is None
        return read_now(sql, log.all_rows)


async def test_a_start_upgrades_the_log_and_keeps_a_copy_of_it_beside_it(old: Path) -> None:
    before = rows(old)
    storage = await SqliteStorage.open(old)
    async with running(storage) as bench:
        await bench.device("new-1")
    await storage.close()

    after = rows(old)
    assert after[: len(before)] == before  # every hash is as it was
    assert {row.decided_at for row in before} == {None}
    assert [row.decided_at for row in after[len(before) :]] == [
        row.recorded_at for row in after[len(before) :]
    ]
    with closing(open_for_reading(old)) as sql:
        assert read_now(sql, log.meta, "format") == "2"
        assert read_now(sql, follower.fault, lambda _: None) is None
    assert os.stat(old / KEPT).st_mode & 0o777 == 0o600
    with closing(open_file(old / KEPT)) as sql:
        assert read_now(sql, log.meta, "format") == "1"
        assert read_now(sql, log.all_rows) == before


def test_reading_a_log_of_format_1_does_not_change_it(old: Path, tmp_path: Path) -> None:
    bytes_before = (old / DATABASE).read_bytes()
    assert backup.take(old, tmp_path / "copy").position == len(rows(old))
    with closing(snapshot(Settings(data=str(old)))) as sql:
        transfer.export(sql, tmp_path / "log.jsonl", transfer.Only(), lambda _: None)
    assert (old / DATABASE).read_bytes() == bytes_before

    backup.restore(tmp_path / "copy", tmp_path / "restored")
    transfer.bring_in(tmp_path / "log.jsonl", tmp_path / "imported", lambda *_: None)
    assert rows(tmp_path / "restored") == rows(tmp_path / "imported") == rows(old)


def test_an_export_of_format_1_is_imported(old: Path, tmp_path: Path) -> None:
    before = rows(old)
    header = Header(version=1, log_id="log_old", position=len(before), hash=before[-1].hash)
    file = tmp_path / "old.jsonl"
    file.write_bytes(b"\n".join([header_line(header), *lines(RELEASE)]) + b"\n")

    transfer.bring_in(file, tmp_path / "imported", lambda *_: None)

    assert rows(tmp_path / "imported") == before


async def test_without_a_copy_there_is_no_upgrade(old: Path) -> None:
    (old / KEPT).mkdir()
    before = (old / DATABASE).read_bytes()

    with pytest.raises(Broken, match="must be copied"):
        await SqliteStorage.open(old)
    assert (old / DATABASE).read_bytes() == before


@pytest.fixture
def mixed(old: Path) -> Iterator[sqlite3.Connection]:
    """An upgraded log with rows of both formats, the last two of format 2."""
    sql = sqlite3.connect(old / DATABASE, isolation_level=None)
    follower.open_log(sql, "log_x", "00")
    head = read_now(sql, log.head)
    last = read_now(sql, log.all_rows)[-1]
    for version in (1, 2):
        event = log.recorded(last)
        made = type(event)(
            **{name: getattr(event, name) for name in event.__struct_fields__}
            | {"stream": "system2/x", "version": version, "decided_at": head.decided_at + 5}
        )
        head = log.append(sql, head, [made], bytes(16))
    assert read_now(sql, log.verify).fault is None
    yield sql
    sql.close()


def test_the_format_of_a_row_cannot_be_changed_unnoticed(mixed: sqlite3.Connection) -> None:
    last = read_now(mixed, log.head).position
    for position, time in ((1, 5), (last, None)):
        mixed.execute("SAVEPOINT a")
        mixed.execute("UPDATE events SET decided_at = ? WHERE position = ?", (time, position))
        assert f"position {position} " in str(read_now(mixed, log.verify).fault)
        mixed.execute("ROLLBACK TO a")


def test_a_row_of_format_1_after_one_of_format_2_is_a_fault_although_its_hash_fits(
    mixed: sqlite3.Connection,
) -> None:
    before, last = read_now(mixed, log.all_rows)[-2:]
    forged = last._replace(decided_at=None)
    forged = forged._replace(hash=chain.link(before.hash, *forged.header, forged.digest))
    mixed.execute("DELETE FROM events WHERE position = ?", (last.position,))
    mixed.execute(log.INSERT, forged)

    fault = read_now(mixed, log.verify).fault

    assert fault == f"position {last.position} has format 1 and follows a row of format 2"
