"""A red run shrinks to the parts that its fault needs."""

from __future__ import annotations

from msgspec.structs import replace

from tests.simulation.planted_log import EVERY_BUG
from tests.simulation.shrinking import shrunk
from tests.simulation.tide import Parts


def test_what_the_fault_does_not_need_is_left_out() -> None:
    names = tuple("abcdefghijk")

    def red(parts: Parts) -> bool:
        return {"c", "j"} <= set(parts.only or ()) and parts.spells >= 2 and parts.devices >= 4

    assert shrunk(names, red) == Parts(spells=2, devices=4, clients=0, only=("c", "j"))


def test_a_run_without_what_can_be_left_out_stays_as_it_is() -> None:
    assert shrunk(("a", "b"), lambda parts: parts == Parts(only=("a", "b"))) == Parts(only=("a", "b"))


def test_the_smaller_run_of_a_planted_bug_is_still_red() -> None:
    bug = next(each for each in EVERY_BUG if each.name == "a token in a log line")
    names = ("_create", "_rotate_token", "_kill")
    whole = replace(bug.parts, only=names)

    def red(seed: int, parts: Parts) -> bool:
        return bug.names(bug.run(seed, parts).found)

    def size(parts: Parts) -> tuple[int, ...]:
        return parts.spells, parts.devices, parts.clients, len(parts.only or ())

    seed = next(seed for seed in bug.seeds if red(seed, whole))

    smaller = shrunk(names, lambda parts: parts.spells == whole.spells and red(seed, parts))

    assert red(seed, smaller)
    assert "_rotate_token" in (smaller.only or ())
    assert all(after <= before for after, before in zip(size(smaller), size(whole), strict=True))
    assert size(smaller) != size(whole)
