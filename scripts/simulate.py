"""Simulates the broker with many seeds, or prints the history of one: `python -m scripts.simulate --help`.

Exits with 1 if a run found a fault. The result of a run depends only on its seed and on the code. With
`--keep FILE` each chunk of seeds is written down when it is done: the same call again goes on after the last
one, and the file holds each red seed with the command that runs it again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import msgspec

from tests.simulation.history import History
from tests.simulation.planted import BUGS as OLD_BUGS
from tests.simulation.planted_outside import MORE_BUGS
from tests.simulation.world import Outcome, simulate

BUGS = (*OLD_BUGS, *MORE_BUGS)
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
    parser.add_argument("--bug", choices=[bug.name for bug in BUGS], help="plant this bug in the broker")
    asked = parser.parse_args()
    if asked.print is not None:
        outcome = run(asked.bug, asked.print)
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
        for each in pool.map(partial(one, asked.bug), left, chunksize=CHUNK):
            report(each.seed, each.found)
            total.add(each)
            if asked.keep is not None:
                with asked.keep.open("ab") as file:
                    file.write(msgspec.json.encode(each) + b"\n")
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


def one(bug: str | None, seed: int) -> Run:
    try:
        outcome = run(bug, seed)
    except Exception as error:
        sentence = f"RUN: {type(error).__name__}: {error}"
        return Run(seed=seed, found=[sentence], again=again(seed), code=code())
    return Run(
        seed=seed,
        found=outcome.found,
        virtual_sec=outcome.virtual_sec,
        cpu_sec=outcome.cpu_sec,
        faults=len(outcome.history.notes),
        again=again(seed) if outcome.found else None,
        code=code(),
    )


def again(seed: int) -> str:
    return f"python -m scripts.simulate --print {seed}"


def run(bug: str | None, seed: int) -> Outcome:
    planted = next((each for each in BUGS if each.name == bug), None)
    return simulate(seed) if planted is None else planted.run(seed)


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
