"""What a log costs as it grows: processor time of a life, time of a start, and bytes per command.

    python -m scripts.bench.growth --commands 10000 100000 1000000

Each log is filled directly with closed commands, four events each. The broker's own functions write the first
100,000; more are copies of these with other ids and times, whose hashes do not follow from each other. Then a
broker serves each log, and they make rounds of lives in turn, so that the load of the machine is the same for
all. The ratios are those to the first log in the same round. It only prints figures.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import statistics
import tempfile
import time
from contextlib import AsyncExitStack, closing
from pathlib import Path

import uvloop

from broker.engine.ids import new_id
from broker.world import DATABASE, SystemEntropy
from scripts.bench import processes
from scripts.bench.life import living
from scripts.bench.travel import SINCE, TOGETHER, fill

DEVICES = 1_000  # of the commands in the log
ONLINE, CONNECTIONS = 100, 4  # those of the lives
BLOCK = 100_000  # commands
# Milliseconds from a block to the next. All ids of a block begin with the same 10 characters: `cmd_`, and the
# upper 28 bits of their time. A copy has others.
STEP = 1 << 20
COPIES = (
    """INSERT INTO events (position, stream, version, type, schema, recorded_at, decided_at, project,
            device_id, actor, data, salt, digest, hash)
        SELECT position + :further, :name || substr(stream, 11), version, type, schema, recorded_at + :later,
            decided_at + :later, project, device_id, actor, data, salt, digest, hash
        FROM block.events WHERE position BETWEEN :first AND :last ORDER BY position""",
    """INSERT INTO commands (position, project, device_id, type, state, version, closed_at, closed_position,
            later)
        SELECT position + :further, project, device_id, type, state, version, closed_at + :later,
            closed_position + :further, later
        FROM block.commands WHERE position BETWEEN :first AND :last ORDER BY position""",
)

Figures = dict[int, list[float]]  # number of commands in the log -> one figure a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commands", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--lives", type=int, default=2_000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="directory for the logs; not a file system in memory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ordain-growth-", dir=given.dir) as home:
        directories = {count: Path(home) / str(count) for count in given.commands}
        for count, directory in directories.items():
            directory.mkdir()
            grow(directory / DATABASE, count)
            size = (directory / DATABASE).stat().st_size
            print(f"{count:>10,} commands {size / 1e6:8.1f} MB {size / count:8.0f} bytes each", flush=True)
        for name, size in shares(directory / DATABASE):
            print(f"{name:>30} {size / count:8.0f} bytes a command", flush=True)
        for what, figures in uvloop.run(starts(directories, given.rounds)).items():
            show(what, figures)
        show("broker CPU of a life, µs", uvloop.run(lives(directories, given.rounds, given.lives)))


def grow(path: Path, commands: int) -> None:
    """Fills a log with this many closed commands."""
    if commands <= BLOCK:
        fill(path, commands, DEVICES)
        return
    block = path.with_name("block.db")
    fill(block, BLOCK, DEVICES)
    shutil.copy(block, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000"):
            sql.execute(f"PRAGMA {pragma}")
        sql.execute("ATTACH ? AS block", (str(block),))
        (first,) = sql.execute("SELECT min(position) FROM commands").fetchone()
        for number in range(1, -(-commands // BLOCK)):
            count = min(BLOCK, commands - number * BLOCK) // TOGETHER * TOGETHER  # whole lives
            values = {
                "name": new_id("cmd", SINCE + number * STEP, SystemEntropy())[:10],
                "further": number * BLOCK * 4,
                "later": number * STEP,
                "first": first,
                "last": first + count * 4 - 1,
            }
            sql.execute("BEGIN")
            for copy in COPIES:
                sql.execute(copy, values)
            sql.execute("COMMIT")
    block.unlink()


def shares(path: Path) -> list[tuple[str, int]]:
    """The tables and indexes that take most of a log, and their bytes."""
    with closing(sqlite3.connect(path)) as sql:
        try:
            return sql.execute(
                "SELECT name, sum(pgsize) FROM dbstat GROUP BY name ORDER BY 2 DESC LIMIT 6"
            ).fetchall()
        except sqlite3.OperationalError:
            return []  # this SQLite was built without dbstat


async def starts(directories: dict[int, Path], rounds: int) -> dict[str, Figures]:
    """Of a broker on each log until it is ready."""
    took: Figures = {count: [] for count in directories}
    spent: Figures = {count: [] for count in directories}
    for _ in range(rounds):
        for count, directory in directories.items():
            since = time.perf_counter()
            async with processes.broker(directory, processes.unused_port(), None, own=True) as (_, pid):
                took[count].append(time.perf_counter() - since)
                spent[count].append(processes.cpu_sec(pid))
    return {"start, s": took, "start, CPU s": spent}


async def lives(directories: dict[int, Path], rounds: int, count: int) -> Figures:
    figures: Figures = {commands: [] for commands in directories}
    async with AsyncExitStack() as stack:
        serving = {
            commands: await stack.enter_async_context(living(directory, count, ONLINE, CONNECTIONS))
            for commands, directory in directories.items()
        }
        for number in range(rounds + 1):
            for commands, one_round in serving.items():
                found = await one_round()
                if number:  # round 0 is the warm-up
                    figures[commands].append(found["broker CPU µs per life"])
    return figures


def show(what: str, figures: Figures) -> None:
    base = next(iter(figures.values()))
    for commands, values in figures.items():
        ratio = statistics.median(value / first for value, first in zip(values, base, strict=True))
        each = " ".join(f"{value:.4g}" for value in values)
        print(
            f"{commands:>10,} commands  {what}: {statistics.median(values):.4g}  ratio {ratio:.2f}  ({each})"
        )


if __name__ == "__main__":
    main()
