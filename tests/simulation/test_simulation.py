"""The whole broker under faults, for many seeds; the same seed twice; and planted bugs that test the
checkers.

`make test` runs the first seeds and all planted bugs. `planted.json` names a seed that finds each bug. If a
change makes a test search, the summary of the tests says so: `python -m scripts.simulate --planted` writes
that file again.
`make test-simulation` runs 300 seeds. For more seeds, or to print one of them: `python -m scripts.simulate`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from broker.settings import Limits
from devices.clock import rfc3339
from tests.conftest import NOTE
from tests.simulation.checkers.life import CHECKERS, check
from tests.simulation.fleet import COMMANDS
from tests.simulation.loop import SimLoop, run
from tests.simulation.network import MOSQUITTO
from tests.simulation.nodes import planted as nodes
from tests.simulation.planted import KEEPALIVE_BUG, REPORT_BUG, SHORT, TAKEOVER_BUG, Bug
from tests.simulation.planted_log import EVERY_BUG
from tests.simulation.test_loop import printed_elsewhere
from tests.simulation.tide import ALL
from tests.simulation.world import World, quiet, simulate

WHOLE = os.environ.get("ORDAIN_SIMULATION") == "whole"
SEEDS, CHUNK = (300, 5) if WHOLE else (60, 5)
MORE_SEEDS, SEARCH = 30, "python -m scripts.simulate --planted"
WITH_IDS = ("generic", "recorder")  # the kinds of device whose answers name the command


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_the_broker_keeps_all_invariants_under_faults(first: int) -> None:
    broken = {}
    for seed in range(first, first + CHUNK):
        found = simulate(seed).found
        if found:
            broken[seed] = found[:3]

    assert not broken, f"see python -m scripts.simulate --print {next(iter(broken))}"


def fingerprint(number: int) -> str:
    """One whole run and five short ones, of seeds with little to do."""
    outcome = simulate((5, 66, 68, 69, 74, 88)[number], parts=SHORT if number else ALL)
    log = outcome.history.log
    return f"{outcome.trace:08x} {outcome.steps} {len(log)} {log[-1]['hash'].hex()} {outcome.found}"


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    here = "".join(fingerprint(seed) + "\n" for seed in range(6))

    assert printed_elsewhere("tests.simulation.test_simulation", "fingerprint", 6) == [here, here]
    assert len(set(here.splitlines())) == 6


@pytest.mark.parametrize("bug", EVERY_BUG, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug, record_property: Callable[[str, object], None]) -> None:
    """If the written seed shows it no more, others are tried, and the summary of the tests says so."""
    tries = bug.seeds if WHOLE else islice(bug.seeds, 1 + MORE_SEEDS)
    number = next((number for number, seed in enumerate(tries) if bug.names(bug.run(seed).found)), None)

    assert number is not None, f"no seed that was tried shows it: run {SEARCH}"
    if number:
        record_property(NOTE, f"the written seed does not show it, try {number} after it did: run {SEARCH}")


def test_a_planted_function_takes_what_the_function_that_it_replaces_takes() -> None:
    """Otherwise the planted bug is another one than its name says, as when the product's function changed."""
    for bug in (*EVERY_BUG, TAKEOVER_BUG, KEEPALIVE_BUG, *nodes.BUGS):
        for owner, name, replacement in bug.patches:
            original = getattr(owner, name)
            if callable(original) and callable(replacement):
                taken = inspect.signature(original).parameters.values()
                named = {each.name: None for each in taken if each.kind is each.KEYWORD_ONLY}
                inspect.signature(replacement).bind(*[None] * (len(taken) - len(named)), **named)


def test_the_docs_name_every_checker_and_the_planted_bugs_that_show_it() -> None:
    page = (Path(__file__).parents[2] / "docs/explanation/reliability.md").read_text()
    lines = page.partition("## Checkers and planted bugs")[2].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    told = {name: bugs for name, _, bugs in (each for each in cells if len(each) == 3)}

    checked_elsewhere = {"S3", "S4", "M1", "M2", "M3", "M4", "M5"}  # at each commit, and in the listener
    assert told.keys() - {""} == CHECKERS.keys() | checked_elsewhere
    for name, bugs in told.items():
        planted = (*EVERY_BUG, TAKEOVER_BUG, KEEPALIVE_BUG)
        mine = [bug.name for bug in planted if name in bug.caught_by or (bug, name) == (REPORT_BUG, "A6")]
        assert name == "" or (mine and bugs == "; ".join(mine)), name


@pytest.mark.parametrize("seed", range(5))
def test_an_hour_without_the_mqtt_server_loses_no_command(seed: int) -> None:
    """Commands in every state wait. The server keeps the answers from before its restart, so none of them is
    late. A device that answered while the server was away may come back after the drain, and is late."""
    gone_at = ""
    ordered: set[str] = set()

    async def main(loop: SimLoop) -> World:
        world = World(loop, kind=MOSQUITTO)
        world.limits = limits = Limits()  # the orders of this test fit
        world.history.most = limits.queue_per_device, limits.queue_per_name
        named = [device for device in world.devices if device.kind in WITH_IDS]
        for device in named:
            device.whims = False
        await world.furnish()
        named[0].port.disconnect()

        async def order() -> None:
            for device in named * 3:
                name = next(iter(COMMANDS[device.kind]))
                body: dict[str, Any] = {"type": name, "params": {}, "ttl_sec": None}
                path = f"/v1/devices/{device.hardware_id}/commands"
                made = await world.door.call("create", "POST", path, body)
                assert made.status == 201
                ordered.add(made.answer["id"])

        await order()
        await asyncio.sleep(seed / 2)
        nonlocal gone_at
        gone_at = rfc3339(world.clock.true_ms())
        world.server.restart("kept", 3_600)
        await order()
        await asyncio.sleep(3_600)
        named[0].connect()
        await world.end()
        return world

    with quiet([]):
        world = run(main, seed)
    log = [row for row in world.history.log if row["stream"] in ordered]
    told = Counter(row["type"] for row in log)
    executed = [each for each in world.history.executions if each.command_id in ordered]

    assert [*world.found, *check(world.history)] == []
    assert told["created"] == told["executed"] == len(executed) == len(ordered) > 0
    late = [row["data"]["at"] for row in log if row["data"].get("late")]
    assert told["timed_out"] == len(late)
    assert told["failed"] == 0
    assert all(at >= gone_at for at in late)
