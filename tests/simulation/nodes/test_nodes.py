"""Several nodes on one simulated database under faults, for some seeds; and planted bugs test the checkers.

`make test-simulation` runs more seeds. To print one: `python -m scripts.simulate --nodes --print SEED`.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from broker.log.postgresql import log as postgresql
from tests.simulation.facts import Facts
from tests.simulation.loop import SimLoop, run
from tests.simulation.nodes.checkers import Acts, Look, Passed, check_nodes
from tests.simulation.nodes.planted import BUGS, NodesBug
from tests.simulation.nodes.world import NodesWorld, as_data, simulate_nodes
from tests.simulation.test_checkers import A, B, Story
from tests.simulation.test_loop import printed_elsewhere
from tests.simulation.test_simulation import WHOLE
from tests.simulation.world import quiet

SEEDS = 100 if WHOLE else 8


@pytest.mark.parametrize("seed", range(SEEDS))
def test_several_nodes_keep_all_invariants_under_faults(seed: int) -> None:
    assert simulate_nodes(seed).found == []


def fingerprint(seed: int) -> str:
    ran = simulate_nodes(seed)
    return f"{ran.trace:08x} {len(ran.history.log)} {ran.history.log[-1]['hash'].hex()}"


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    here = f"{fingerprint(0)}\n"
    assert printed_elsewhere("tests.simulation.nodes.test_nodes", "fingerprint", 1) == [here, here]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_of_several_nodes_is_found(bug: NodesBug) -> None:
    assert any(bug.names(bug.run(seed).found) for seed in bug.seeds)


def test_at_least_eight_bugs_are_planted() -> None:
    assert len(BUGS) >= 8


def test_nodes_that_saw_what_the_database_then_lost_end() -> None:
    """A standby that was not synchronous takes over: devices and clients know of more than the log has."""

    async def main(loop: SimLoop) -> NodesWorld:
        world = NodesWorld(loop)
        await world.furnish()
        owner, database = world.owner(), world.database
        assert owner is not None
        database.asynchronous = True
        database.take_standby()
        body: dict[str, Any] = {"type": "ping", "params": {}, "ttl_sec": 60}
        made = await world.door.call("create", "POST", "/v1/devices/hw1/commands", body)
        assert made.status == 201
        database.fail_over(1.0)
        await world.loop.until(lambda: not owner.node.alive, "the owner goes on")
        await world.loop.until(lambda: world.owner() is not None, "nobody goes on with what is left")
        world.found.append(f"owner {owner.incarnation}")
        return world

    with quiet([]), patch.object(postgresql, "arguments", as_data):
        world = run(main, "lost")

    assert "no longer has the event" in world.found[0]
    assert [who for _, who in world.acts.by].count(world.found[-1].removeprefix("owner ")) > 0


# --- the checkers themselves


def acts(*told: tuple[str, str]) -> Acts:
    made = Acts(lambda: 1_000)
    for position, (who, what) in enumerate(told, 1):
        if what == "claimed":
            made.claimed(who, position)
        else:
            made.acted(who, what)
    return made


def found(acts: Acts, story: Story | None = None) -> list[str]:
    history = (story or Story()).history
    history.dumped(story.rows if story else [])
    return [sentence.partition(":")[0] for sentence in check_nodes(acts, Facts(history))]


def test_who_acts_after_another_claimed_is_found() -> None:
    right = ("a", "claimed"), ("a", "published"), ("b", "claimed"), ("b", "answered")
    assert found(acts(*right)) == []
    assert found(acts(*right, ("a", "published"))) == ["N2"]


def test_who_appends_in_the_term_of_another_is_found() -> None:
    story = Story().log("owner", "owned", incarnation="a").created().log("owner", "owned", incarnation="b")
    made = acts()
    for position, who in ((1, "a"), (2, "a"), (3, "b")):
        made.appended(who, position)
    assert found(made, story) == []
    made.appended("a", 4)
    assert found(made, story.ended()) == ["N1"]


def test_a_failover_that_takes_too_long_is_found() -> None:
    made = acts()
    made.failed_over = 9.9
    assert found(made) == []
    made.failed_over = 10.1
    assert found(made) == ["N3"]


def test_a_node_that_lists_other_events_than_the_others_or_the_streams_is_found() -> None:
    story = Story().created(A).published(A)
    story.history.readers["everything"] = None
    story.history.streamed("everything", 2, "published")
    made = acts()
    made.listed = {"a": [(1, "created"), (2, "published")], "b": [(1, "created"), (2, "published")]}
    assert found(made, story) == []
    made.listed["b"] = [(2, "published"), (1, "created")]
    assert found(made, story) == ["N4"]
    made.listed = {"a": [(1, "created")], "b": [(1, "created")]}
    assert found(made, story) == ["N4"]


def test_a_node_that_does_not_ask_the_log_or_does_not_believe_it_is_found() -> None:
    def look(began: int) -> Look:
        return Look(t=began + 10, incarnation="c", began=began, confirmed=True)

    made = acts(("a", "claimed"), ("b", "claimed"))  # both at 1,000
    made.began["c"] = 900
    made.looks += [look(900), look(2_000), look(13_000)]
    made.passed.append(Passed(t=3_000, incarnation="c", owner="a"))  # it has just read of b
    assert found(made) == []
    made.passed.append(Passed(t=3_100, incarnation="c", owner="a"))
    assert found(made) == ["N5"]
    del made.passed[1:]
    made.looks.append(look(25_100))
    assert found(made) == ["N5"]
    made.woken.append((25_000, "c"))
    assert found(made) == []


def test_a_claim_that_a_failover_of_the_database_lost_is_known_to_nobody() -> None:
    made = acts(("a", "claimed"), ("b", "claimed"))
    made.looks.append(Look(t=2_000, incarnation="c", began=1_990, confirmed=True))
    made.began["c"] = 900
    made.passed.append(Passed(t=4_000, incarnation="c", owner="a"))
    assert found(made) == ["N5"]
    made.appended("a", 2)  # where b's claim was
    assert found(made) == []


def test_a_node_that_never_begins_to_ask_the_log_or_stops_asking_is_found() -> None:
    made = acts()
    made.began["c"], made.ended["c"] = 1_000, 25_000
    made.looks.append(Look(t=13_000, incarnation="c", began=12_990, confirmed=True))
    assert found(made) == []
    made.ended["c"] = 25_001
    assert found(made) == ["N5"]
    made.began["c"], made.ended["c"] = 999, 25_000
    assert found(made) == ["N5"]
    made.looks.clear()
    assert found(made) == ["N5"]


def test_an_older_command_that_arrives_after_a_later_one_for_a_device_without_ids_is_found() -> None:
    story = Story().defined(carries_ids=False).created(A).published(A).created(B).published(B)
    made = acts()
    made.arrived += [("t", A), ("t", A), ("t", B)]
    assert found(made, story) == []
    made.arrived.append(("t", A))
    assert found(made, story) == ["N2"]
