"""The transitions of the contract, written down a second time, and the fold, which records and never
refuses."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.events import (
    Acknowledged,
    Cancelled,
    CommandEvent,
    Created,
    Error,
    Executed,
    Expired,
    Failed,
    Online,
    Progressed,
    Published,
    TimedOut,
)
from broker.domain.lifecycle import CHANGES, CLOSED, FINAL, TRANSITIONS, CommandState, State, evolve
from tests.integration.core_support import PUBLISHED, WAYS, T, command_in, created, folded, recorded

# Section 2 of the contract: event
# may follow
# leads to.
CONTRACT = """
created      | none                               | pending
published    | pending, published                 | published
acknowledged | published, timed_out               | acknowledged
progressed   | published, acknowledged, timed_out | acknowledged
executed     | published, acknowledged, timed_out | executed
failed       | published, acknowledged, timed_out, pending | failed
timed_out    | published, acknowledged            | timed_out
expired      | pending                            | expired
cancelled    | pending                            | cancelled
"""

RAW = st.sampled_from([b"null", b"1", b'{"value":[1,2]}']).map(msgspec.Raw)
LATE = st.booleans()
EVENTS: st.SearchStrategy[CommandEvent] = st.one_of(
    st.just(created()),
    st.builds(
        Published, attempt=st.integers(1, 9), transport=st.sampled_from(["mqtt", "relay", "heartbeat"])
    ),
    st.builds(Acknowledged, late=LATE),
    st.builds(Progressed, percent=st.floats(0, 100), note=st.text(max_size=3), late=LATE),
    st.builds(Executed, result=RAW, late=LATE, evidence=st.sampled_from(["device_result", "mqtt_puback"])),
    st.builds(
        Failed,
        error=st.builds(Error, code=st.text(max_size=3), message=st.text(max_size=3)),
        by=st.sampled_from(["device", "broker", "mqtt_server"]),
        late=LATE,
    ),
    st.builds(TimedOut, reason=st.sampled_from(["no_answer", "no_result", "ttl", "operator"])),
    st.builds(Expired),
    st.builds(Cancelled, by=st.text(max_size=3)),
)


def test_the_transitions_are_those_of_the_contract() -> None:
    wanted: dict[str, dict[str, str]] = {state.value: {} for state in State}
    for line in CONTRACT.strip().splitlines():
        event, may_follow, gives = [part.strip() for part in line.split("|")]
        for state in may_follow.split(", "):
            wanted[state][event] = gives

    assert {state.value: row for state, row in TRANSITIONS.items()} == wanted


def test_the_four_final_states_allow_no_event_and_timed_out_does() -> None:
    assert {state for state, row in TRANSITIONS.items() if not row} == FINAL
    assert {State.EXECUTED, State.FAILED, State.EXPIRED, State.CANCELLED} == FINAL
    assert {State.TIMED_OUT} == CLOSED - FINAL


@given(st.lists(st.tuples(EVENTS, st.integers(0, 10_000)), max_size=8), st.sampled_from(sorted(WAYS)))
def test_the_fold_refuses_no_event_and_makes_only_moves_of_the_table(
    events: list[tuple[CommandEvent, int]], start: State
) -> None:
    state = folded(*WAYS[start])
    at = T
    for event, later in events:
        at += later
        entry = recorded(event, state.version + 1, at)
        after = evolve(state, entry)
        allowed = TRANSITIONS[state.state].get(entry.type, state.state)
        assert after.state is (State.PENDING if entry.type == "created" else allowed)
        assert (after.version, after.updated_at) == (state.version + 1, at)
        assert (after.closed_at is not None) == after.closed
        state = after


@given(EVENTS)
def test_a_state_survives_encoding_as_json(event: CommandEvent) -> None:
    state = folded(PUBLISHED, event)

    kept = msgspec.json.encode(state)

    assert msgspec.json.encode(msgspec.json.decode(kept, type=CommandState)) == kept


def test_every_event_of_a_command_says_what_it_changes() -> None:
    assert {Created, *CHANGES} == set(get_args(CommandEvent))


def test_a_history_starts_with_created_and_contains_only_command_events() -> None:
    with pytest.raises(ValueError, match="published cannot be version 1"):
        evolve(None, recorded(PUBLISHED, 1))
    with pytest.raises(ValueError, match="online cannot be version 2"):
        evolve(folded(), recorded(Online(), 2))


def test_the_devices_first_answer_sets_delivered_and_later_reports_update_it() -> None:
    state = folded((PUBLISHED, 10), (Acknowledged(), 20), (Progressed(percent=5), 30), (Executed(), 40))

    assert (state.published_at, state.delivered_at, state.acknowledged_at) == (T + 10, T + 20, T + 20)
    assert (state.reported_at, state.executed_at, state.closed_at) == (T + 30, T + 40, T + 40)


def test_a_puback_and_mqtt_server_errors_are_not_answers_of_the_device() -> None:
    refused = Failed(error=Error(code="refused", message="no"), by="mqtt_server")

    assert folded(PUBLISHED, Executed(evidence="mqtt_puback")).delivered_at is None
    assert folded(PUBLISHED, refused).delivered_at is None
    assert folded(PUBLISHED, Executed()).delivered_at == T


def test_attempts_are_numbered_and_some_do_not_count() -> None:
    state = folded(
        PUBLISHED,
        Published(attempt=2, counts=False),
        Published(attempt=3, transport="relay", counts=False),
        (Published(attempt=4), 50),
    )

    assert (state.attempts, state.counted, state.pulled) == (4, 2, True)
    assert (state.published_at, state.handed_over_at, state.transport) == (T, T + 50, "mqtt")


@pytest.mark.parametrize(
    ("answer", "after"),
    [
        (Acknowledged(late=True), State.ACKNOWLEDGED),
        (Progressed(percent=1, late=True), State.ACKNOWLEDGED),
        (Executed(late=True), State.EXECUTED),
        (Failed(error=Error(code="c", message="m"), late=True), State.FAILED),
    ],
)
def test_a_late_answer_corrects_a_time_out_and_is_marked(answer: CommandEvent, after: State) -> None:
    state = folded(PUBLISHED, TimedOut(reason="no_answer"), (answer, 70))

    assert (state.state, state.late) == (after, True)
    assert state.reopened == (after is State.ACKNOWLEDGED)
    assert state.closed_at == (None if state.reopened else T + 70)


def test_every_builder_sequence_ends_in_its_named_state() -> None:
    for state in WAYS:
        found = command_in(state)
        assert found is not None
        assert found.state is state
