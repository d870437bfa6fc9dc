"""Pauses between attempts, the bound on attempts, and hand-overs after a restart."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain import attempts, lanes
from broker.domain.events import Acknowledged, Published
from broker.domain.lanes import Flight, Presence
from tests.integration.core_support import PUBLISHED, T, definition, folded
from tests.unit.domain.test_lanes import jitter, member

# --- back-off


@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.floats(0.05, 60),
    st.floats(1, 10),
    st.floats(60, 600),
    st.integers(0, 2**32),
)
def test_back_off_is_at_least_a_second_and_at_most_its_ceiling(
    counted: int, counting: bool, base: float, factor: float, cap: float, seed: int
) -> None:
    kind = definition(backoff_base_sec=base, backoff_factor=factor, backoff_cap_sec=cap)
    grown = base * factor ** min(counted - 1, 64) if counted > 0 else base
    ceiling = min(cap, grown) if counting else cap

    pause = attempts.backoff_ms(kind, counted, counting, random.Random(seed).uniform)

    assert 1_000 <= pause <= max(1_000, round(ceiling * 1_000))


@pytest.mark.parametrize(
    ("counted", "ceiling_sec"), [(1, 5), (2, 10), (3, 20), (6, 160), (7, 300), (500, 300)]
)
def test_back_off_doubles_from_five_seconds_up_to_five_minutes(counted: int, ceiling_sec: float) -> None:
    assert attempts.backoff_ms(definition(), counted, True, lambda low, high: high) == ceiling_sec * 1_000
    assert attempts.backoff_ms(definition(), counted, True, lambda low, high: low) == 1_000
    assert attempts.backoff_ms(definition(), counted, False, lambda low, high: high) == 300_000


def test_the_last_attempt_is_the_one_that_reaches_the_maximum() -> None:
    tries = [Published(attempt=n) for n in (1, 2, 3)]

    assert attempts.is_last(member("a", *tries, max_attempts=3))
    assert not attempts.is_last(member("a", *tries, max_attempts=4))
    assert not attempts.is_last(member("a", *tries, flight=Flight(voided=1), max_attempts=3))
    assert not attempts.is_last(member("a", *tries[:2], Published(attempt=3, counts=False), max_attempts=3))


@pytest.mark.parametrize("pause", [attempts.drop_pause_ms, attempts.unheard_pause_ms])
def test_pauses_of_uncounted_attempts_double_from_one_second_up_to_the_cap(pause: Any) -> None:
    kind = definition(backoff_cap_sec=10)

    assert [pause(kind, tried) for tried in (0, 1, 2, 3, 4, 5, 1_000)] == [
        1_000, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000,
    ]  # fmt: skip


def test_an_attempt_counts_only_if_the_last_one_found_a_subscriber() -> None:
    for flight in (Flight(unheard=1), Flight(hastened=True)):
        assert not lanes.counts(member("a", flight=flight, presence="required"), Presence.ONLINE)
        assert lanes.counts(member("a", flight=flight, presence="none"), Presence.ONLINE)


# --- after a restart


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**32))
def test_an_interrupted_attempt_is_due_again_within_the_answer_time(tries: int, most: int, seed: int) -> None:
    state = folded(*(Published(attempt=n + 1) for n in range(tries)))
    kind = definition(max_attempts=most)

    flight = attempts.recovered(state, kind, T, random.Random(seed).uniform)

    if tries >= 2 * most:
        assert (flight.open, flight.written_at, flight.counts) == (True, T, True), "its timer ends it"
        return
    assert not flight.open
    assert T <= flight.due_at <= T + max(10_000, attempts.drop_pause_ms(kind, tries))
    left = most - (state.counted - flight.voided)
    assert left == max(1, most - tries), "an interrupted last attempt is repeated once"


def test_an_attempt_that_does_not_count_exhausts_nothing() -> None:
    tries = [Published(attempt=n) for n in range(1, 7)]
    uncounted = Published(attempt=7, counts=False)
    kind = definition(max_attempts=3)

    assert attempts.recovered(folded(*tries), kind, T, jitter).open
    assert not attempts.recovered(folded(*tries, uncounted), kind, T, jitter).open
    flying = Flight(open=True)
    assert attempts.is_exhausted(member("a", *tries, flight=flying, max_attempts=3))
    assert not attempts.is_exhausted(member("a", *tries[:5], flight=flying, max_attempts=3))
    assert not attempts.is_exhausted(member("a", *tries, flight=Flight(), max_attempts=3))
    between = Flight(open=True, counts=False)
    assert not attempts.is_exhausted(member("a", *tries, uncounted, flight=between, max_attempts=3))


def test_after_a_restart_the_pause_follows_from_the_log() -> None:
    """The device may have dropped its connection on each of these."""
    state = folded(*((Published(attempt=n), 0) for n in range(1, 6)))

    flight = attempts.recovered(state, definition(max_attempts=5), T + 500, jitter)

    assert flight.not_before == T + 16_000
    assert flight.due_at == T + 16_000


def test_a_non_repeatable_or_leased_attempt_waits_for_its_end_after_a_restart() -> None:
    once = attempts.recovered(folded(PUBLISHED), definition(repeatable=False), T + 500, jitter)
    leased = attempts.recovered(
        folded((Published(attempt=1, transport="relay"), 100)),
        definition(relay_lease_sec=30),
        T + 500,
        jitter,
    )

    assert (once.open, once.written_at) == (True, T + 500)
    assert (leased.open, leased.lease_until) == (True, T + 30_100)


def test_a_command_without_an_open_attempt_has_no_flight_after_a_restart() -> None:
    for state in (folded(), folded(PUBLISHED, Acknowledged())):
        assert attempts.recovered(state, definition(), T, jitter) == Flight()
