"""`make simulate` goes on where an earlier call ended."""

from __future__ import annotations

from pathlib import Path

from scripts.simulate import Run, code, keep, kept


def test_a_call_that_ended_within_a_line_costs_only_that_run(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    runs = [Run(seed=seed, virtual_sec=1.5, code=code()) for seed in (3, 4, 5)]
    keep(file, runs[0])
    keep(file, runs[1])
    file.write_bytes(file.read_bytes()[:-5])
    keep(file, runs[2])

    assert kept(file) == {3: runs[0], 5: runs[2]}


def test_runs_of_other_code_are_not_known(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    keep(file, Run(seed=3, code="of another commit"))

    assert kept(file) == {}
