"""`make bench-compare OLD=COMMIT`: the named figures of an earlier commit and of this one, taken in turn.

Both run on this machine in the same minutes, each with its own benchmark. The ratios to the floor are what is
compared; the packages are those of this commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.bench.processes import ROOT

Ratios = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.compare", description=__doc__)
    parser.add_argument("old", help="the earlier commit")
    parser.add_argument("--only", default="b,g", help="parts of the benchmark (default: b,g)")
    parser.add_argument("--turns", type=int, default=3, help="how often each commit is measured (default: 3)")
    given = parser.parse_args()
    if given.turns < 1:
        parser.error("--turns must be at least 1")
    with tempfile.TemporaryDirectory(prefix="ordain-compare-") as home:
        old = Path(home) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run([*git, "add", "--detach", str(old), given.old], capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"{given.old}: {made.stderr.strip()}")
        try:
            found: dict[str, Ratios] = {"old": {}, "new": {}}
            for turn in range(given.turns):
                for name, tree in (("old", old), ("new", ROOT)):
                    print(f"turn {turn + 1} of {given.turns}: {name}", file=sys.stderr, flush=True)
                    _measure(tree, given.only, Path(home) / "figures.json", found[name])
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=False)
    _show(found["old"], found["new"])


def _measure(tree: Path, only: str, into: Path, ratios: Ratios) -> None:
    command = [sys.executable, "-m", "scripts.bench", "--rounds", "1", "--only", only, "--json", str(into)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    figures = json.loads(into.read_text()) if done.returncode == 0 else None
    if not isinstance(figures, list):
        raise SystemExit(f"{tree.name}: its benchmark writes no named figures\n{done.stderr[-500:]}")
    for figure in figures:
        ratios.setdefault(figure["name"], []).append(figure["ratio"])


def _show(old: Ratios, new: Ratios) -> None:
    print(f"{'ratio to the floor':24} {'old':>9} {'new':>9} {'new / old':>10}   each turn")
    for name in old.keys() & new.keys():
        before, now = statistics.median(old[name]), statistics.median(new[name])
        turns = [after / first for first, after in zip(old[name], new[name], strict=True)]
        each = " ".join(f"{turn:.2f}" for turn in turns)
        print(f"{name:24} {before:9.3f} {now:9.3f} {now / before:10.3f}   {each}")


if __name__ == "__main__":
    main()
