"""A tree of topics gives the same as comparing a filter with each topic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.mqtt.access import fits, is_filter
from broker.mqtt.matching import Topics

levels = st.sampled_from(["a", "b", "", "long"])
topics = st.sets(st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool), max_size=12)
filters = (
    st.lists(st.one_of(levels, st.sampled_from(["+", "#"])), min_size=1, max_size=6)
    .map("/".join)
    .filter(is_filter)
)


@given(topics, filters)
def test_a_filter_covers_the_same_topics_as_one_by_one(known: set[str], wanted: str) -> None:
    assert sorted(Topics(known).fitting(wanted)) == sorted(each for each in known if fits(wanted, each))


def test_a_filter_of_very_many_levels_is_cut_short() -> None:
    assert list(Topics({"a/b"}).fitting("+/" * 30_000 + "#")) == []
    assert list(Topics({"a/b"}).fitting("a/b/#")) == ["a/b"]
