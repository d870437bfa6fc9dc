"""Due commands in a lane, and their timers."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain import answerable, lanes
from broker.domain.events import Acknowledged, Event, Executed, Progressed, Published, TimedOut, Transport
from broker.domain.lanes import Flight, Lane, Member, Presence
from broker.domain.lifecycle import Input
from tests.integration.core_support import DEVICE, PUBLISHED, T, created, definition, folded

BARE: dict[str, Any] = {"carries_ids": False, "carries_grant": False, "late_answer_sec": 20}
REQUIRED: dict[str, Any] = {"presence": "required"}
NONE: dict[str, Any] = {"presence": "none"}


def member(
    name: str, *events: Event | tuple[Event, int], flight: Flight | None = None, **facts: Any
) -> Member:
    ttl_ms = facts.pop("ttl_ms", None)
    state = folded(*events, first=created(ttl_ms=ttl_ms), id=name)
    return Member(state, definition(**facts), flight or Flight())


def lane(*members: Member) -> Lane:
    return Lane(DEVICE, {found.state.id: found for found in members})


def due(found: Lane, presence: Presence = Presence.ONLINE, now: int = T, slots: int = 100) -> list[str]:
    return [hand.state.id for hand in lanes.due(found, presence, now, slots)]


def jitter(low: float, high: float) -> float:
    return random.Random(7).uniform(low, high)


# --- order, window, slots


def test_the_oldest_command_goes_first_and_the_next_waits_for_its_end() -> None:
    assert due(lane(member("a"), member("b"))) == ["a"]
    assert due(lane(member("a", PUBLISHED, flight=Flight(open=True)), member("b"))) == []
    assert due(lane(member("a", PUBLISHED, Acknowledged()), member("b"))) == []


def test_the_window_is_filled_in_order_and_never_exceeded() -> None:
    wide: dict[str, Any] = {"max_in_flight": 3}
    pending = [member(name, **wide) for name in "abcde"]
    flying = member("z", PUBLISHED, flight=Flight(open=True), **wide)

    assert due(lane(*pending)) == ["a", "b", "c"]
    assert due(lane(flying, *pending)) == ["a", "b"]
    assert due(lane(*pending), slots=2) == ["a", "b"]
    assert due(lane(*pending), slots=0) == []


def test_a_closed_or_reopened_command_does_not_fill_the_window() -> None:
    reopened = member("a", PUBLISHED, TimedOut(reason="no_answer"), Acknowledged(late=True))

    assert due(lane(reopened, member("b"))) == ["b"]


KINDS: dict[str, tuple[tuple[Event, ...], Flight, int | None]] = {
    "open": ((PUBLISHED,), Flight(open=True), None),
    "back-off": ((PUBLISHED,), Flight(due_at=T + 5_000), None),
    "due": ((PUBLISHED,), Flight(due_at=T), None),
    "acknowledged": ((PUBLISHED, Acknowledged()), Flight(), None),
    "short": ((), Flight(), 1_000),
    "pending": ((), Flight(), None),
}


@given(
    st.lists(st.sampled_from(list(KINDS)[:4]), max_size=4),
    st.lists(st.sampled_from(["short", "pending"]), max_size=6),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_order_window_and_slots_hold_for_any_lane(
    handed_over: list[str], waiting: list[str], window: int, slots: int
) -> None:
    made = []
    for index, kind in enumerate(handed_over + waiting):
        events, flight, ttl_ms = KINDS[kind]
        made.append(member(f"{index} {kind}", *events, flight=flight, ttl_ms=ttl_ms, max_in_flight=window))

    names = due(lane(*made), now=T + 950, slots=slots)

    assert names == sorted(names)
    assert len(names) <= slots
    assert {name.split()[1] for name in names} <= {"pending", "due"}
    fresh = sum("pending" in name for name in names)
    assert fresh == 0 or len(handed_over) + fresh <= window


# --- presence


@pytest.mark.parametrize(
    ("presence", "required", "counted"),
    [
        (Presence.NEVER, False, False),
        (Presence.OFFLINE, False, False),
        (Presence.UNKNOWN, True, False),
        (Presence.ONLINE, True, True),
    ],
)
def test_presence_decides_whether_a_command_is_sent_and_whether_the_attempt_counts(
    presence: Presence, required: bool, counted: bool
) -> None:
    waiting = Flight(due_at=T)

    assert bool(due(lane(member("a", **REQUIRED)), presence)) is required
    assert bool(due(lane(member("a", PUBLISHED, flight=waiting, **REQUIRED)), presence)) is required
    assert lanes.counts(member("a", **REQUIRED), presence) is counted
    assert due(lane(member("a", **NONE)), presence) == ["a"]
    assert lanes.counts(member("a", **NONE), presence)


def test_a_command_that_may_not_go_blocks_later_ones() -> None:
    assert due(lane(member("a", **REQUIRED), member("b", **NONE)), Presence.OFFLINE) == []
    assert due(lane(member("a", transports=("relay",)), member("b"))) == []


# --- time left


@pytest.mark.parametrize(
    ("ttl_ms", "margin"), [(1_000, 100), (5_000, 500), (10_000, 1_000), (300_000, 1_000)]
)
def test_no_command_is_sent_in_the_last_second_or_tenth_of_its_life(ttl_ms: int, margin: int) -> None:
    last = T + ttl_ms - margin
    waiting = member("a", ttl_ms=ttl_ms)

    assert due(lane(waiting), now=last - 1) == ["a"]
    assert due(lane(waiting, member("b")), now=last) == ["b"], "it will never be sent, so it blocks no other"
    assert due(lane(member("a", PUBLISHED, ttl_ms=ttl_ms)), now=last) == []


def test_a_command_without_expiry_always_has_time() -> None:
    assert due(lane(member("a")), now=T + 10**12) == ["a"]


# --- types whose answers carry no id


def test_a_lane_without_ids_stays_shut_after_an_end_and_longer_after_a_time_out() -> None:
    for ending, pause in ((Executed(), 1_000), (TimedOut(reason="no_answer"), 20_000)):
        found = lane(gone := member("a", PUBLISHED, ending, **BARE), member("b", **BARE))
        lanes.closed(found, gone, T)
        assert due(found, now=T + pause - 1) == []
        assert due(found, now=T + pause) == ["b"]


def test_a_lane_with_ids_or_without_a_hand_over_opens_at_once() -> None:
    for gone in (member("a", PUBLISHED, Executed()), member("a", **BARE)):
        found = lane(gone, member("b", **BARE))
        lanes.closed(found, gone, T)
        assert due(found) == ["b"]


def test_candidates_of_an_answer_without_id_are_handed_over_and_not_final_or_long_timed_out() -> None:
    late = member("late", PUBLISHED, TimedOut(reason="no_answer"), **BARE)
    found = lane(
        late, member("flying", PUBLISHED), member("heard", PUBLISHED, Acknowledged()), member("waiting")
    )
    lanes.closed(found, late, T)

    def named(now: int) -> set[str]:
        return {candidate.state.id for candidate in answerable.candidates(found, now)}

    assert named(T + 19_999) == {"late", "flying", "heard"}
    assert named(T + 20_000) == {"flying", "heard"}


def test_a_command_handed_over_after_an_answer_without_id_is_no_candidate() -> None:
    found = lane(member("flying", PUBLISHED))
    assert [candidate.state.id for candidate in answerable.candidates(found, T)] == ["flying"]
    assert answerable.candidates(found, T - 1) == []


@pytest.mark.parametrize("end", [(), (TimedOut(reason="no_answer"),)], ids=["open", "timed out"])
def test_a_command_that_reached_nobody_is_no_candidate_of_an_answer_without_id(
    end: tuple[Event, ...],
) -> None:
    """A device that comes back sends its old answers again, and they must not close the next command."""

    def found(flight: Flight) -> list[str]:
        made = member("a", PUBLISHED, Published(attempt=2), *end, flight=flight, **BARE)
        held = Lane(DEVICE, {}, {"a": made}) if end else lane(made)
        return [candidate.state.id for candidate in answerable.candidates(held, T + 1)]

    assert found(Flight(missed=2)) == found(Flight(missed=1, refused=1)) == []
    assert found(Flight(missed=1, open=True)) == []
    assert found(Flight(missed=1, open=True, written_at=T)) == found(Flight(missed=1)) == ["a"]


# --- timers


def test_the_attempt_timer_starts_when_the_bytes_were_written() -> None:
    queued = member("a", PUBLISHED, flight=Flight(open=True))
    written = member("a", PUBLISHED, flight=Flight(open=True, written_at=T + 3_000))

    assert lanes.wake_at(queued, T) is None
    assert lanes.overdue(queued, T + 10**9) is None
    assert lanes.wake_at(written, T) == T + 13_000
    assert lanes.overdue(written, T + 12_999) is None
    assert lanes.overdue(written, T + 13_000) is Input.ATTEMPT_TIMER


def test_expiry_precedes_other_timers_until_an_acknowledgement() -> None:
    flight = Flight(open=True, written_at=T)
    acknowledged = member("a", PUBLISHED, Acknowledged(), ttl_ms=5_000)

    assert lanes.wake_at(member("a", ttl_ms=5_000), T) == T + 5_000
    assert lanes.overdue(member("a", ttl_ms=5_000), T + 4_999) is None
    assert lanes.overdue(member("a", PUBLISHED, flight=flight, ttl_ms=5_000), T + 20_000) is Input.EXPIRY
    assert lanes.wake_at(acknowledged, T) == T + 60_000
    assert lanes.overdue(acknowledged, T + 5_000) is None


def test_each_report_restarts_the_result_timer_up_to_the_longest_run() -> None:
    def end(*events: Event | tuple[Event, int]) -> int:
        return lanes.result_due_at(member("a", PUBLISHED, *events, max_run_sec=100)) - T

    assert end((Acknowledged(), 1_000)) == 61_000
    assert end((Acknowledged(), 1_000), (Progressed(percent=1), 30_000)) == 90_000
    assert end((Acknowledged(), 1_000), (Progressed(percent=1), 60_000)) == 101_000
    assert end((Progressed(percent=1), 2_000)) == 62_000


def test_a_reopened_command_gets_a_new_result_timer() -> None:
    again = member("a", PUBLISHED, TimedOut(reason="no_answer"), (Acknowledged(late=True), 500_000))

    assert lanes.overdue(again, T + 559_999) is None
    assert lanes.overdue(again, T + 560_000) is Input.RESULT_TIMER


def test_a_due_attempt_wakes_the_lane_once_and_then_waits_for_other_events() -> None:
    backing_off = member("a", PUBLISHED, flight=Flight(due_at=T + 4_000))

    assert lanes.wake_at(backing_off, T) == T + 4_000
    assert lanes.wake_at(backing_off, T + 4_000) is None
    assert due(lane(backing_off), now=T + 3_999) == []
    assert due(lane(backing_off), now=T + 4_000) == ["a"]


def test_a_non_repeatable_command_is_never_due_again() -> None:
    assert due(lane(member("a", PUBLISHED, repeatable=False))) == []


def test_nothing_without_ids_is_sent_while_answers_from_before_may_come() -> None:
    for carries_ids in (True, False):
        for events in ((), (PUBLISHED,)):
            waiting = lane(member("a", *events, carries_ids=carries_ids))
            found = lanes.due(waiting, Presence.ONLINE, T, 100, drained=False)
            assert [hand.state.id for hand in found] == (["a"] if carries_ids else [])
            assert due(waiting) == ["a"]


# --- fetches without MQTT

PULLED: dict[str, Any] = {"transports": ("mqtt", "relay", "heartbeat")}
CLAIMED = Published(attempt=1, transport="relay", counts=False)


def fetched(found: Lane, transport: Transport = "relay", now: int = T, drained: bool = True) -> list[str]:
    return [hand.state.id for hand in lanes.fetched(found, transport, now, drained)]


def leased(**facts: Any) -> Member:
    return member("a", CLAIMED, flight=Flight(open=True, lease_until=T + 60_000), **PULLED | facts)


def test_a_fetch_gets_the_oldest_commands_up_to_the_window() -> None:
    pending = [member(name, **PULLED) for name in "abc"]
    wide = [member(name, **PULLED, max_in_flight=2) for name in "abc"]

    assert fetched(lane(*pending)) == ["a"]
    assert fetched(lane(*wide)) == ["a", "b"]
    assert fetched(lane(leased(max_in_flight=2), *wide[1:])) == ["a", "b"]
    assert fetched(lane(member("a", CLAIMED, Acknowledged(), **PULLED), *pending[1:])) == []


def test_only_a_transport_that_the_type_allows_fetches() -> None:
    only = member("a", transports=("heartbeat",))

    assert fetched(lane(only), "heartbeat") == ["a"]
    assert fetched(lane(only)) == []
    assert fetched(lane(member("a"))) == []
    assert fetched(lane(only, member("b", **PULLED))) == [], "a command that may not go blocks later ones"


def test_during_a_lease_only_its_own_transport_gets_the_command() -> None:
    assert fetched(lane(leased())) == ["a"]
    assert fetched(lane(leased()), "heartbeat") == []
    assert fetched(lane(leased()), "heartbeat", T + 60_000) == ["a"]
    assert due(lane(leased())) == []


def test_an_mqtt_attempt_blocks_fetches_until_its_deadline_even_without_a_timer() -> None:
    flying = member("a", PUBLISHED, flight=Flight(open=True, written_at=T), **PULLED)
    unwritten = member("a", PUBLISHED, flight=Flight(open=True), **PULLED)
    between = member("a", PUBLISHED, flight=Flight(due_at=T + 99_000), **PULLED)

    assert fetched(lane(flying), now=T + 9_999) == []
    assert fetched(lane(flying), now=T + 10_000) == ["a"]
    assert fetched(lane(unwritten), now=T + 99_000) == []
    assert fetched(lane(between)) == ["a"], "a fetching device does not wait for the back-off"


def test_a_non_repeatable_command_is_fetched_once() -> None:
    assert fetched(lane(member("a", repeatable=False, **PULLED))) == ["a"]
    assert fetched(lane(leased(repeatable=False))) == []
    assert fetched(lane(leased(repeatable=False)), now=T + 60_000) == []


def test_a_command_without_time_left_is_not_fetched() -> None:
    dying, fresh = member("a", ttl_ms=5_000, **PULLED), member("b", **PULLED)

    assert fetched(lane(dying, fresh), now=T + 4_499) == ["a"]
    assert fetched(lane(dying, fresh), now=T + 4_500) == ["b"]
    assert fetched(lane(leased(ttl_ms=5_000)), now=T + 4_500) == []


def test_a_lane_shut_for_answers_without_id_is_shut_for_every_transport() -> None:
    bare = member("a", carries_ids=False, **PULLED)
    shut = Lane(DEVICE, {"a": bare}, shut_until=T + 1_000)

    assert fetched(shut) == []
    assert fetched(shut, now=T + 1_000) == ["a"]
    assert fetched(lane(bare), drained=False) == []
    assert fetched(lane(member("a", carries_ids=False, transports=("relay",))), drained=False) == ["a"]
