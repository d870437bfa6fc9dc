"""A projection in one file: it reads the whole history, continues with new events, and cannot disturb
others."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from broker.operations.own_projection import OwnProjection, Wrong, caught_up
from broker.world import open_for_reading
from tests.integration.core_support import Bench, running

EXAMPLE = Path(__file__).parents[3] / "docs" / "projections" / "time_to_acknowledge.py"
GOOD = """
TABLES = "CREATE TABLE seen (position INTEGER)"
COLUMNS = ("events",)
def apply(sql, event): sql.execute("INSERT INTO seen VALUES (?)", (event.position,))
def rows(sql): return sql.execute("SELECT count(*) FROM seen")
"""


@contextmanager
def reading(directory: Path) -> Iterator[sqlite3.Connection]:
    with closing(open_for_reading(directory)) as source:
        yield source


async def lives(bench: Bench, count: int) -> list[int]:
    """Creates commands that are acknowledged one after the other; returns how long each took, in ms."""
    took = []
    for _ in range(count):
        command = await bench.order()
        await bench.becomes(command.id, "published")
        bench.answers(command.id, "acknowledged")
        state = await bench.becomes(command.id, "acknowledged")
        took.append((state.acknowledged_at or 0) - (state.published_at or 0))
        bench.answers(command.id)
        await bench.becomes(command.id, "executed")
    return took


async def test_the_example_shows_the_95th_percentile_of_all_history_and_continues(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as bench:
        await bench.device()
        took = await lives(bench, 20)
        with reading(tmp_path / "data") as source:
            example = OwnProjection(EXAMPLE)
            assert caught_up(example, source, tmp_path / "own.db") == [("generic", 20, sorted(took)[18])]
            took += await lives(bench, 1)
            assert caught_up(example, source, tmp_path / "own.db") == [("generic", 21, sorted(took)[19])]


async def test_a_failing_projection_stops_at_its_checkpoint_and_names_the_position(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        GOOD.replace("def apply(sql, event): ", "def apply(sql, event):\n 1 // (event.position - 2)\n ")
    )
    async with running(tmp_path / "data") as bench:
        await bench.device()
        with reading(tmp_path / "data") as source:
            with pytest.raises(Wrong, match=r"bad\.py: apply, position 2: ZeroDivisionError"):
                caught_up(OwnProjection(file), source, tmp_path / "own.db")
            file.write_text(GOOD)
            head = bench.core.feed.head
            assert caught_up(OwnProjection(file), source, tmp_path / "own.db") == [(head,)]


async def test_a_projections_database_belongs_to_one_log(tmp_path: Path) -> None:
    file = tmp_path / "good.py"
    file.write_text(GOOD)
    for name in ("one", "two"):
        async with running(tmp_path / name, seed=len(name) + ord(name[0])) as bench:
            await bench.device()
    with reading(tmp_path / "one") as source:
        caught_up(OwnProjection(file), source, tmp_path / "own.db")
    with reading(tmp_path / "two") as source, pytest.raises(Wrong, match="made from another log"):
        caught_up(OwnProjection(file), source, tmp_path / "own.db")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 +", "SyntaxError"),
        ("TABLES = ''", "must define apply, COLUMNS, rows"),
        ("import nothing_there", "Module"),
    ],
)
def test_an_invalid_projection_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "none.py"
    file.write_text(text)
    with pytest.raises(Wrong, match=f"none.py: .*{says}"):
        OwnProjection(file)
