"""Simulates the broker with many seeds, or prints the history of one: `python -m scripts.simulate --help`.

Exits with 1 if a run found a fault. The result of a run depends only on its seed and on the code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.simulation.history import History
from tests.simulation.planted import BUGS as OLD_BUGS
from tests.simulation.planted_outside import MORE_BUGS
from tests.simulation.world import Outcome, simulate

BUGS = (*OLD_BUGS, *MORE_BUGS)
SHOWN = 5  # faults printed of one run
DONE_EVERY = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate", description="Simulates the broker under faults.")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many processes")
    parser.add_argument("--print", type=int, metavar="SEED", help="run this seed and print its history")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="with --print: only lines with this text, and faults"
    )
    parser.add_argument("--bug", choices=[bug.name for bug in BUGS], help="plant this bug in the broker")
    asked = parser.parse_args()
    if asked.print is not None:
        outcome = run(asked.bug, asked.print)
        for line in lines(outcome.history):
            if asked.only in line or " FAULT " in line:
                print(line)
        report(outcome.seed, outcome.found)
        return int(bool(outcome.found))
    broken = 0
    seeds = range(asked.first, asked.first + asked.seeds)
    with ProcessPoolExecutor(asked.workers) as pool:
        for seed, found in zip(
            seeds, pool.map(partial(sentences, asked.bug), seeds, chunksize=10), strict=True
        ):
            broken += bool(found)
            report(seed, found)
            done = seed + 1 - asked.first
            if done % DONE_EVERY == 0 or done == asked.seeds:
                print(f"{done} seeds, {broken} of them with faults", flush=True)
    return int(bool(broken))


def run(bug: str | None, seed: int) -> Outcome:
    planted = next((each for each in BUGS if each.name == bug), None)
    return simulate(seed) if planted is None else planted.run(seed)


def sentences(bug: str | None, seed: int) -> list[str]:
    try:
        return run(bug, seed).found
    except Exception as error:
        return [f"RUN: {type(error).__name__}: {error}"]


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
