"""The whole broker under faults, seed by seed; the same seed twice; and bugs planted to test the checkers.

More seeds, or one of them printed: `python -m scripts.simulate`.
"""

from __future__ import annotations

import pytest

from tests.simulation.planted import BUGS, Bug
from tests.simulation.test_loop import printed_elsewhere
from tests.simulation.world import simulate

SEEDS, CHUNK = 300, 25
TRIES = 60


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_fault_makes_the_broker_break_a_promise(first: int) -> None:
    broken = {}
    for seed in range(first, first + CHUNK):
        found = simulate(seed).found
        if found:
            broken[seed] = found[:3]

    assert not broken, f"see python -m scripts.simulate --print {next(iter(broken))}"


def fingerprint(seed: int) -> str:
    outcome = simulate(seed)
    log = outcome.history.log
    return f"{outcome.trace:08x} {outcome.steps} {len(log)} {log[-1]['hash'].hex()} {outcome.found}"


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    here = "".join(fingerprint(seed) + "\n" for seed in range(6))

    assert printed_elsewhere("tests.simulation.test_simulation", "fingerprint", 6) == [here, here]
    assert len(set(here.splitlines())) == 6


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    assert any(bug.names(bug.run(seed).found) for seed in range(TRIES))
