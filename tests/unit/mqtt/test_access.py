"""Topic filters: which are valid, and which topics they cover."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.mqtt.access import fits, is_filter

LEVELS = st.sampled_from(["", "a", "b", "+", "#", "a+", "+b", "#c", "$x"])


def valid(levels: list[str]) -> bool:
    """The rule of MQTT 5.0, section 4.7.1, level by level."""
    *first, last = levels
    return all(each == "+" or not {"+", "#"} & set(each) for each in first) and (
        last in ("+", "#") or not {"+", "#"} & set(last)
    )


def covers(wanted: list[str], found: list[str]) -> bool:
    if wanted[:1] == ["#"]:
        return True
    if not wanted or not found:
        return wanted == found
    return wanted[0] in ("+", found[0]) and covers(wanted[1:], found[1:])


@given(st.lists(LEVELS, min_size=1, max_size=6))
def test_a_filter_is_valid_by_the_rule_of_the_standard(levels: list[str]) -> None:
    assert is_filter("/".join(levels)) is (levels != [""] and valid(levels))


@given(
    st.lists(st.sampled_from(["a", "b", "", "+"]), min_size=1, max_size=5),
    st.booleans(),
    st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=5),
)
def test_a_filter_covers_topics_by_the_rule_of_the_standard(
    wanted: list[str], rest: bool, found: list[str]
) -> None:
    wanted = [*wanted, "#"] if rest else wanted
    assert fits("/".join(wanted), "/".join(found)) is covers(wanted, found)


@pytest.mark.parametrize("text", ["/" * 65_535, "+/" * 32_767 + "#", "a/" * 32_767], ids=["/", "+/", "a/"])
def test_a_filter_of_thousands_of_levels_costs_little(text: str) -> None:
    since = time.process_time()
    for _ in range(4):  # as many fit into one packet
        is_filter(text)
        fits(text, "iotee/dev/door/rls")
    assert time.process_time() - since < 0.02
