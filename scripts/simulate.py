"""Simulates the broker with many seeds, or prints the history of one: `python -m scripts.simulate --help`.

Exits with 1 if a run found a fault. The result of a run depends only on its seed and on the code. With
`--keep FILE` each chunk of seeds is written down when it is done: the same call again goes on after the last
one. The file holds each red seed with the command that runs it again, with as few parts as show the fault.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import msgspec

from tests.simulation.history import History
from tests.simulation.loop import rng
from tests.simulation.nodes.world import Ran, simulate_nodes
from tests.simulation.planted import FIRST, FOUND_BY
from tests.simulation.planted_log import EVERY_BUG
from tests.simulation.shrinking import shrunk
from tests.simulation.tide import ALL, Parts, stretches
from tests.simulation.world import Outcome, simulate

SHOWN = 5  # faults printed of one run
DONE_EVERY, CHUNK = 100, 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate", description="Simulates the broker under faults.")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many processes")
    parser.add_argument("--print", type=int, metavar="SEED", help="run this seed and print its history")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="with --print: only lines with this text, and faults"
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="go on from this file, and write it")
    parser.add_argument("--nodes", action="store_true", help="several nodes on one database")
    parser.add_argument("--bug", choices=[bug.name for bug in EVERY_BUG], help="plant this bug in the broker")
    parser.add_argument("--parts", metavar="JSON", help="with --print: leave out all other parts of the run")
    parser.add_argument("--planted", action="store_true", help="find a seed for each planted bug again")
    asked = parser.parse_args()
    if asked.planted:
        return search(asked.workers)
    if asked.print is not None:
        parts = None if asked.parts is None else msgspec.json.decode(asked.parts, type=Parts)
        outcome = run(asked.bug, asked.print, asked.nodes, parts)
        for line in lines(outcome.history):
            if asked.only in line or " FAULT " in line:
                print(line)
        report(outcome.seed, outcome.found)
        return int(bool(outcome.found))
    known = kept(asked.keep)
    left = [seed for seed in range(asked.first, asked.first + asked.seeds) if seed not in known]
    if len(left) < asked.seeds:
        print(f"{asked.seeds - len(left)} seeds are known from {asked.keep}", flush=True)
    total = Total()
    with ProcessPoolExecutor(asked.workers) as pool:
        for each in pool.map(partial(one, asked.bug, nodes=asked.nodes), left, chunksize=CHUNK):
            report(each.seed, each.found)
            if each.again is not None:
                print(f"seed {each.seed}: {each.again}", flush=True)
            total.add(each)
            if asked.keep is not None:
                keep(asked.keep, each)
            if total.seeds % DONE_EVERY == 0 or total.seeds == len(left):
                print(total, flush=True)
    return int(bool(total.broken or any(each.found for each in known.values())))


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept of one seed. `again`: how to see a red one again."""

    seed: int
    found: list[str] = []
    virtual_sec: float = 0.0
    cpu_sec: float = 0.0
    faults: int = 0
    again: str | None = None
    code: str = ""


class Total:
    def __init__(self) -> None:
        self.seeds = self.broken = self.faults = 0
        self.virtual_sec = self.cpu_sec = 0.0

    def add(self, run: Run) -> None:
        self.seeds += 1
        self.broken += bool(run.found)
        self.faults += run.faults
        self.virtual_sec += run.virtual_sec
        self.cpu_sec += run.cpu_sec

    def __str__(self) -> str:
        hours, minutes = self.virtual_sec / 3_600, self.cpu_sec / 60
        speed = f"{hours / minutes:.0f} virtual hours a CPU minute" if minutes else "no CPU time"
        return (
            f"{self.seeds} seeds, {self.broken} of them with faults; {hours:.0f} virtual hours, "
            f"{self.faults} faults injected, {speed}"
        )


def keep(file: Path, run: Run) -> None:
    """Every run begins a line: an earlier call may have ended within one."""
    with file.open("ab") as lines:
        lines.write(b"\n" + msgspec.json.encode(run))


def kept(file: Path | None) -> dict[int, Run]:
    """The runs of an earlier call. A line that was cut off by its end does not count."""
    known: dict[int, Run] = {}
    for line in file.read_bytes().splitlines() if file is not None and file.exists() else ():
        with suppress(msgspec.DecodeError):
            each = msgspec.json.decode(line, type=Run)
            if each.code == code():
                known[each.seed] = each
    return known


@cache
def code() -> str:
    """A digest of everything that decides a run: what is kept of other code says nothing."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for folder in ("broker", "devices", "projections", "tests/simulation"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def one(bug: str | None, seed: int, nodes: bool = False) -> Run:
    try:
        outcome = run(bug, seed, nodes)
    except Exception as error:
        return Run(seed=seed, found=[raised(error)], again=again(bug, seed, nodes), code=code())
    smaller = None
    if outcome.found and isinstance(outcome, Outcome):
        first = outcome.found[0].partition(":")[0]
        smaller = shrunk(outcome.asked, lambda parts: names(first, found(bug, seed, parts)))
    return Run(
        seed=seed,
        found=outcome.found,
        virtual_sec=outcome.virtual_sec,
        cpu_sec=outcome.cpu_sec,
        faults=len(outcome.history.notes),
        again=again(bug, seed, nodes, smaller) if outcome.found else None,
        code=code(),
    )


def again(bug: str | None, seed: int, nodes: bool, parts: Parts | None = None) -> str:
    planted = "" if bug is None else f" --bug {shlex.quote(bug)}"
    fewer = "" if parts is None else f" --parts {shlex.quote(msgspec.json.encode(parts).decode())}"
    return f"python -m scripts.simulate{' --nodes' if nodes else ''} --print {seed}{planted}{fewer}"


def run(bug: str | None, seed: int, nodes: bool = False, parts: Parts | None = None) -> Outcome | Ran:
    if nodes:
        return simulate_nodes(seed)
    planted = next((each for each in EVERY_BUG if each.name == bug), None)
    return simulate(seed, parts=parts or ALL) if planted is None else planted.run(seed, parts)


def found(bug: str | None, seed: int, parts: Parts | None = None) -> list[str]:
    try:
        return run(bug, seed, parts=parts).found
    except Exception as error:
        return [raised(error)]


def raised(error: Exception) -> str:
    return f"RUN: {type(error).__name__}: {error}"


def names(invariant: str, found: list[str]) -> bool:
    return any(sentence.startswith(f"{invariant}:") for sentence in found)


def search(workers: int) -> int:
    """Finds a short seed that shows each planted bug, and writes them down for the tests. A seed that is
    written down already and still shows its bug stays; what is no bug any more goes."""
    seeds = {bug.name: FIRST[bug.name] for bug in EVERY_BUG if bug.name in FIRST}
    missed = 0
    with ProcessPoolExecutor(workers) as pool:
        for done in as_completed(pool.submit(shows, bug.name) for bug in EVERY_BUG):
            name, seed = done.result()
            missed += seed is None
            print(f"{name}: {'no seed shows it' if seed is None else f'seed {seed}'}", flush=True)
            if seed is not None:
                seeds[name] = seed
                text = msgspec.json.encode(seeds, order="sorted")
                FOUND_BY.write_bytes(msgspec.json.format(text) + b"\n")
    return int(missed > 0)


def shows(name: str) -> tuple[str, int | None]:
    bug = next(each for each in EVERY_BUG if each.name == name)

    def length(seed: int) -> float:
        return sum(busy + quiet / 40 for busy, quiet in stretches(rng(seed, "tide"), bug.parts))

    seeds = sorted(range(bug.within), key=length)
    if name in FIRST:
        seeds.insert(0, FIRST[name])
    return name, next((seed for seed in seeds if bug.names(found(name, seed))), None)


def report(seed: int, found: list[str]) -> None:
    for sentence in found[:SHOWN]:
        print(f"seed {seed}: {sentence[:400]}", flush=True)
    if len(found) > SHOWN:
        print(f"seed {seed}: and {len(found) - SHOWN} more", flush=True)


def lines(history: History) -> list[str]:
    """The history in order: virtual seconds since the start, actor, action."""
    start = history.commits[0].t
    return [f"{(t - start) / 1000:>9.3f} {text}" for _, t, text in sorted(_records(history))]


def _records(history: History) -> Iterator[tuple[int, int, str]]:
    rows, durable = history.log, 0
    for commit in history.commits:
        for row in rows[durable : commit.head]:
            said = {key: value for key, value in (row["data"] or {}).items() if key != "definition"}
            text = f"LOG {row['position']} {row['stream']} {row['type']} at {row['recorded_at']} {said}"
            yield commit.seq, commit.t, text
        durable = max(durable, commit.head)
    for call in history.calls:
        yield call.invoked, call.t, f"HTTP {call.kind} {call.key or ''} {call.ids} {call.body}"
        if call.returned is not None:
            yield call.returned, call.t, f"HTTP {call.kind} {call.key or ''} {call.ids} -> {call.status}"
    for wire in history.wire:
        said = {"attempt": wire.attempt, "status": wire.status, "retain": wire.retain}
        yield wire.seq, wire.t, f"MQTT {wire.what} {wire.topic} {wire.command_id} {said}"
    for done in history.executions:
        yield done.seq, done.t, f"DEVICE {done.hardware_id} begins {done.command_id}"
    for sent in history.answers:
        yield sent.seq, sent.t, f"DEVICE {sent.hardware_id} answers {sent.command_id} {sent.status}"
    for note in history.notes:
        yield note.seq, note.t, f"FAULT {note.what}"


if __name__ == "__main__":
    sys.exit(main())
