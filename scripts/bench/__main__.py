"""`make bench`: measures this machine. It measures MQTT round trips, full command lives over HTTP, appending
to the log, one command to ten thousand devices, devices on our own MQTT server, starting, the same lives in
gmqtt alone, and reading the log again.

It prints figures and sets no limits. Absolute figures vary by a third from run to run, so compare the CPU
time per operation and the ratios. It starts real servers on this machine and stops all of them at the end.
"""

from __future__ import annotations

import argparse
import os
import platform
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from broker import __version__
from scripts.bench import append as bench_append
from scripts.bench import fanout as bench_fanout
from scripts.bench import floor_life as bench_floor
from scripts.bench import life as bench_life
from scripts.bench import listener as bench_listener
from scripts.bench import replay as bench_replay
from scripts.bench import start as bench_start
from scripts.bench.named import named
from scripts.bench.plot import plot
from scripts.bench.processes import mosquitto

Figures = dict[str, list[float]]

PARTS = ("a", "b", "c", "d", "e", "f", "g", "h")
# One command life takes about as long as 5 round trips, or as 10 appended events.
TRIPS_PER_LIFE, EVENTS_PER_LIFE = 5, 10
FSYNCS = 20


def main() -> None:
    given = _options()
    with tempfile.TemporaryDirectory(prefix="ordain-bench-", dir=given.dir) as home:
        machine = _machine(Path(home))
        print("\n".join(f"{name:12} {fact}" for name, fact in machine.items()), end="\n\n", flush=True)
        print(f"{'':44} {'median':>11} {'min':>11} {'max':>11}", flush=True)
        figures: dict[str, Figures] = {}
        for part, measure in _parts(given, Path(home)).items():
            try:
                figures[part] = uvloop.run(measure())
            except (OSError, TimeoutError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"{part}: {str(error) or 'not finished in time'}") from error
            if part == "b" and "a" in figures:
                figures["b"]["lives/s / round trips/s"] = _ratio(figures["b"], figures["a"])
            for name, values in figures[part].items():
                print(_line(part, name, values), flush=True)
    for one in named(figures):
        print(f"{one.name:24} {_number(one.value):>11} {one.unit:13} floor {_number(one.floor):>9}"
              f"   ratio {one.ratio:.3f}")  # fmt: skip
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(named(figures))) + b"\n")
    if given.report:
        report = {"machine": machine, "options": vars(given), "figures": figures}
        given.report.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n")
    if given.plot:
        given.plot.write_text(plot(figures, machine))
    if given.profile:
        print(f"\nThe broker's profile: python -m pstats {given.profile}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description="a: MQTT round trips without a broker; b: full command lives over HTTP; c: log appends; "
        "d: one command to many devices; e: devices on our own MQTT server, beside amqtt and Mosquitto; "
        "f: starting the command line and the broker; g: the lives of b in gmqtt alone, the floor; "
        "h: reading the log again.",
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, such as a,c (default: all)")
    parser.add_argument(
        "--count", type=int, default=4_000, help="command lives per round; sets all other counts"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the warm-up (default: 3)")
    parser.add_argument("--devices", type=int, default=100, help="devices (default: 100)")
    parser.add_argument(
        "--connections", type=int, default=4, help="MQTT connections of the devices (default: 4)"
    )
    parser.add_argument("--dir", type=Path, help="directory for the log; not a file system in memory")
    parser.add_argument(
        "--events", type=int, default=200_000, help="events that h reads again (default: 200,000)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="write a list of {name, value, unit, floor, ratio}",
    )
    parser.add_argument("--report", type=Path, metavar="PATH", help="write the figures of all rounds here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios as an SVG picture here")
    parser.add_argument("--profile", type=Path, metavar="PATH", help="cProfile of the broker in b; slows it")
    given = parser.parse_args()
    given.only = given.only.split(",")
    given.profile = given.profile and given.profile.absolute()  # the broker has another working directory
    if set(given.only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, separated by commas")
    if given.events < 1_000:
        parser.error("--events must be at least 1000")
    if min(given.count, given.rounds, given.devices, given.connections) < 1 or given.count < 100:
        parser.error("--count must be at least 100, the other numbers at least 1")
    return given


def _parts(given: argparse.Namespace, home: Path) -> dict[str, Callable[[], Coroutine[Any, Any, Figures]]]:
    fleet = {"devices": given.devices, "connections": min(given.connections, given.devices)}
    rounds, count = given.rounds, given.count
    all_parts = {
        "a": partial(bench_life.round_trips, _made(home / "a"), rounds, count * TRIPS_PER_LIFE, **fleet),
        "b": partial(bench_life.lives, _made(home / "b"), rounds, count, **fleet, profile=given.profile),
        "c": partial(bench_append.appends, _made(home / "c"), rounds, count * EVENTS_PER_LIFE),
        "d": partial(bench_fanout.fan_outs, _made(home / "d"), rounds),
        "e": partial(bench_listener.measured, rounds, count * TRIPS_PER_LIFE, _made(home / "e")),
        "f": partial(bench_start.starts, _made(home / "f"), rounds),
        "g": partial(bench_floor.floors, _made(home / "g"), rounds, count, **fleet),
        "h": partial(bench_replay.replays, _made(home / "h"), rounds, given.events),
    }
    return {part: measure for part, measure in all_parts.items() if part in given.only}


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _ratio(over: Figures, under: Figures) -> list[float]:
    return [a / b for a, b in zip(over["lives/s"], under["round trips/s"], strict=True)]


def _line(part: str, name: str, values: list[float]) -> str:
    shown = (statistics.median(values), min(values), max(values))
    return f"{part}  {name:41} " + " ".join(f"{_number(value):>11}" for value in shown)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _machine(home: Path) -> dict[str, str]:
    told = subprocess.run([mosquitto(), "-h"], capture_output=True, text=True, check=False)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "Ordain": __version__,
        "cores": f"{os.cpu_count()}, {model[0].partition(': ')[2] if model else platform.machine()}",
        "load": "{:.1f} {:.1f} {:.1f} before the start".format(*os.getloadavg()),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "Mosquitto": told.stdout.partition("\n")[0].removeprefix("mosquitto version "),
        "fsync": f"{_fsync_ms(home / 'fsync'):.2f} ms (median of {FSYNCS}, 4 KiB each)",
    }


def _fsync_ms(path: Path) -> float:
    """The median time of an fsync, ms. Near 0 means that this file system does not sync to a disk, so the
    figures do not include durability."""
    taken = []
    with path.open("wb", buffering=0) as file:
        for _ in range(FSYNCS):
            file.write(bytes(4_096))
            since = time.perf_counter()
            os.fsync(file.fileno())
            taken.append((time.perf_counter() - since) * 1_000)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
