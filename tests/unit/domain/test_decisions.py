"""The table of a command's life, written down a second time from its page: every input meets every state.

The page is data here, with its own words. The code's decision is translated into these words and compared. A
cell that depends on facts has one entry for each combination of them.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from broker.domain.decisions import TABLE, Decision, Verdict, decide
from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Created,
    Error,
    Event,
    Executed,
    Expired,
    Failed,
    Progressed,
    Published,
    TimedOut,
)
from broker.domain.lifecycle import CommandState, Input, Request, State
from tests.integration.core_support import COMMAND, PUBLISHED, T, command_in, created, folded

COLUMNS = ["none", "pending", "published", "acknowledged", "timed_out"]
COLUMNS += ["executed", "failed", "expired", "cancelled"]
SAME, OTHER = msgspec.Raw(b'{ "open": 1.0 }'), msgspec.Raw(b'{"open":2}')
SAME_ERROR, OTHER_ERROR = Error(code="jammed", message="it is jammed"), Error(code="hot", message="too hot")

# `–`: nothing. 200, 404, 409: the answer to a caller, nothing recorded. `U:`: kept as unmatched. `>`: an
# event.
# `!name`: see FACTS.
PAGE = """
create                                      | >created | 200 | 200 | 200 | 200 | 200 | 200 | 200 | 200
create of a successor with the same collapse_key | – | >cancelled broker superseded | – | – | – | – | – | – | –
cancel                                      | 404 | >cancelled key | 409 | 409 | 409 | 409 | 409 | 409 | 200
abandon                                     | 404 | 409 | >timed_out operator | >timed_out operator | 200 | 409 | 409 | 409 | 409
retry                                       | 404 | 409 | 409 | 409 | new | 409 | new | new | new
delete                                      | 404 | >cancelled key | 409 | 409 | erase | erase | erase | erase | erase
device deleted                              | – | >cancelled device_deleted | >timed_out device_deleted | >timed_out device_deleted | – | – | – | – | –
key that created it revoked                 | – | – | – | – | – | – | – | – | –
hand over by MQTT                           | – | >published 1 mqtt | !again | – | – | – | – | – | –
heartbeat or relay fetch                    | – | !fetch | !fetch_again | – | – | – | – | – | –
device type cannot speak it                 | – | >failed broker unsendable | >timed_out unsendable | – | – | – | – | – | –
MQTT server refuses the publish             | – | – | !refused | – | – | – | – | – | –
MQTT server has no matching subscriber      | – | – | !no_subscriber | – | – | – | – | – | –
MQTT server accepts the publish             | – | – | !accepted | – | – | – | – | – | –
outcome of the write unknown                | – | – | – | – | – | – | – | – | –
attempt timer                               | – | – | !attempt_timer | – | – | – | – | – | –
expires_at reached                          | – | >expired | >timed_out ttl | – | – | – | – | – | –
result timer                                | – | – | – | >timed_out no_result | – | – | – | – | –
device goes offline                         | – | – | !offline | – | – | – | – | – | –
device comes online                         | – | – | !due | – | – | – | – | – | –
restart of the broker                       | – | – | !restart | – | – | – | – | – | –
answer acknowledged                         | U:unknown | U:never_handed_over | >acknowledged | – | >acknowledged late | – | – | U:promise_broken | U:promise_broken
answer progress                             | U:unknown | U:never_handed_over | >progressed | !progress | >progressed late | – | – | U:promise_broken | U:promise_broken
answer executed                             | U:unknown | U:never_handed_over | >executed | >executed | >executed late | !same_result | U:contradiction | U:promise_broken | U:promise_broken
answer failed                               | U:unknown | U:never_handed_over | >failed device | >failed device | >failed device late | U:contradiction | !same_error | U:promise_broken | U:promise_broken
live state shows that it is done            | – | – | >executed | >executed | >executed late | – | – | – | –
answer from another device or project       | U:wrong_device | U:wrong_device | U:wrong_device | U:wrong_device | U:wrong_device | U:wrong_device | U:wrong_device | U:wrong_device | U:wrong_device
answer without id                           | U:nothing_in_flight | U:nothing_in_flight | !without_id | !without_id | !without_id | U:nothing_in_flight | U:nothing_in_flight | U:nothing_in_flight | U:nothing_in_flight
answer that does not parse                  | U:malformed | U:malformed | U:malformed | U:malformed | U:malformed | U:malformed | U:malformed | U:malformed | U:malformed
"""  # noqa: E501

FACTS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "again": [
        ({"attempt_open": False}, ">published 2 mqtt"),
        ({"attempt_open": True}, "–"),
        ({"attempt_open": False, "repeatable": False}, "–"),
        ({"attempt_open": True, "repeatable": False}, "–"),
    ],
    "fetch": [
        ({"transport": "heartbeat"}, ">published 1 heartbeat"),
        ({"transport": "relay"}, ">published 1 relay"),
    ],
    # the state's own attempt went by MQTT; a test below covers a lease of the same transport
    "fetch_again": [
        ({"transport": "relay", "attempt_open": True}, "–"),
        ({"transport": "heartbeat", "attempt_open": True}, "–"),
        ({"transport": "relay"}, ">published 2 relay"),
        ({"transport": "relay", "repeatable": False}, "–"),
    ],
    "refused": [
        ({"every_attempt_refused": True}, ">failed mqtt_server refused"),
        ({"every_attempt_refused": False}, "attempt closed, counted"),
    ],
    # the only attempt stays open until its timer ends the command
    "no_subscriber": [
        ({}, "attempt closed, not counted, pause"),
        ({"last_attempt": True, "exhausted": True}, "attempt closed, not counted, pause"),
        ({"repeatable": False}, "–"),
        ({"always_sent": True}, "back-off"),
        ({"always_sent": True, "last_attempt": True}, ">timed_out no_answer"),
        ({"always_sent": True, "repeatable": False, "last_attempt": True}, "–"),
    ],
    "accepted": [({"one_way": True}, ">executed"), ({"one_way": False}, "–")],
    "attempt_timer": [
        ({}, "back-off"),
        ({"last_attempt": True}, ">timed_out no_answer"),
        ({"repeatable": False}, ">timed_out no_answer"),
        ({"repeatable": False, "last_attempt": True}, ">timed_out no_answer"),
        ({"held": True}, "hold"),
        ({"held": True, "last_attempt": True}, "hold"),
        ({"held": True, "repeatable": False}, ">timed_out no_answer"),
        ({"exhausted": True}, ">timed_out no_answer"),
        ({"held": True, "exhausted": True}, ">timed_out no_answer"),
    ],
    "offline": [
        ({}, "attempt closed, not counted"),
        ({"last_attempt": True}, "attempt closed, not counted"),
        ({"exhausted": True}, ">timed_out no_answer"),
        ({"repeatable": False}, "–"),
        ({"exhausted": True, "repeatable": False}, "–"),
    ],
    # an attempt that the log does not allow to be repeated stays open until its timer ends the command
    "restart": [({}, "due"), ({"repeatable": False}, "–"), ({"exhausted": True}, "–")],
    "due": [({}, "due"), ({"repeatable": False}, "–")],
    "progress": [
        ({"percent": 10.0}, ">progressed"),
        ({"note": "warm"}, ">progressed"),
        ({}, "–"),  # nothing changed
    ],
    "same_result": [({"result": SAME}, "200"), ({"result": OTHER}, "U:contradiction")],
    "same_error": [({"error": SAME_ERROR}, "200"), ({"error": OTHER_ERROR}, "U:contradiction")],
    "without_id": [
        ({"candidates": 1}, "belongs to the one candidate"),
        ({"candidates": 2}, "U:ambiguous"),
        ({"candidates": 0}, "U:nothing_in_flight"),
    ],
}
DEFAULTS: dict[str, Any] = {"now": T + 60_000, "by": "key", "error": SAME_ERROR, "result": SAME}
BY_THE_BROKER = {Input.SUPERSEDE}


def cells() -> list[Any]:
    found = []
    for line in PAGE.strip().splitlines():
        name, *words = [part.strip() for part in line.split("|")]
        assert len(words) == len(COLUMNS), name
        for column, word in zip(COLUMNS, words, strict=True):
            cases = FACTS[word[1:]] if word.startswith("!") else [({}, word)]
            for facts, expected in cases:
                said = " ".join(
                    f"{key}={value}" for key, value in facts.items() if key not in ("result", "error")
                )
                case = f"{name} meets {column} {said}".strip()
                found.append(pytest.param(Input(name), State(column), facts, expected, id=case))
    return found


def request(what: Input, **facts: Any) -> Request:
    extra: dict[str, Any] = {}
    if what is Input.CREATE:
        extra["created"] = created()
    if what in BY_THE_BROKER:
        extra |= {"by": "broker", "superseded_by": "cmd_2"}
    return Request(input=what, **DEFAULTS | extra | facts)


def in_words(what: Input, decision: Decision) -> str:
    """A decision in the words of the page."""
    if decision.verdict is Verdict.ATTEMPT:
        words = {
            "close": "attempt closed, counted",
            "dropped": "attempt closed, not counted",
            "unheard": "attempt closed, not counted, pause",
            "back_off": "back-off",
            "held": "hold",
            "due": "due",
            "again": "belongs to the one candidate" if what is Input.WITHOUT_ID else "the same attempt again",
        }
        return words[decision.word]
    if decision.verdict is Verdict.UNMATCHED:
        return f"U:{decision.word}"
    if decision.verdict is not Verdict.RECORD:
        words = {"nothing": "–", "already": "200", "conflict": "409", "missing": "404", "renew": "new"}
        return words.get(decision.verdict, decision.verdict.value)
    assert decision.event is not None
    late = " late" if getattr(decision.event, "late", False) else ""
    match decision.event:
        case Published(attempt=attempt, transport=transport):
            return f">published {attempt} {transport}"
        case TimedOut(reason=reason):
            return f">timed_out {reason}"
        case Failed(by=by, error=error):
            return f">failed {by}{late}" if by == "device" else f">failed {by} {error.code}"
        case Cancelled(by=by, reason=reason, superseded_by=superseded):
            return f">cancelled {reason or by}" + (" superseded" if superseded else "")
        case event:
            return (
                f">{decision.word}{late}"
                if type(event).__name__.lower() == decision.word
                else "another event"
            )


def test_the_page_has_a_row_for_every_input_and_a_column_for_every_state() -> None:
    assert {line.split("|")[0].strip() for line in PAGE.strip().splitlines()} == {i.value for i in Input}
    assert [state.value for state in State] == COLUMNS
    assert TABLE.keys() == set(Input)
    assert all(row.keys() == set(State) for row in TABLE.values())


@pytest.mark.parametrize(("what", "state", "facts", "expected"), cells())
def test_every_cell_matches_the_page(what: Input, state: State, facts: dict[str, Any], expected: str) -> None:
    decision = decide(command_in(state), request(what, **facts))

    assert in_words(what, decision) == expected
    assert (decision.event is not None) == expected.startswith(">")


REPORTS = {
    Input.ANSWER_ACKNOWLEDGED: "404|409|>acknowledged|200|>acknowledged late|200|200|409+U|409+U",
    Input.ANSWER_PROGRESS: "404|409|>progressed|200|>progressed late|200|200|409+U|409+U",
    Input.ANSWER_EXECUTED: "404|409|>executed|>executed|>executed late|200|409|409+U|409+U",
    Input.ANSWER_FAILED: "404|409|>failed device|>failed device|>failed device late|409|200|409+U|409+U",
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("what", REPORTS)
@pytest.mark.parametrize("reporter", ["the device itself", "a relay that fetched it", "a stranger to it"])
def test_every_report_over_http_gets_an_answer(what: Input, column: str, reporter: str) -> None:
    state, expected = command_in(State(column)), REPORTS[what].split("|")[COLUMNS.index(column)]
    if reporter == "a relay that fetched it" and state is not None:
        state = msgspec.structs.replace(state, pulled=True)
    if reporter == "a stranger to it" and column in ("published", "acknowledged", "timed_out"):
        expected = "409"

    decision = decide(state, request(what, over_http=True, may_report=reporter == "the device itself"))

    said = in_words(what, decision)
    assert said + ("+U" if decision.word == "promise_broken" else "") == expected


def test_a_different_result_over_http_is_refused() -> None:
    decision = decide(
        command_in(State.EXECUTED),
        request(Input.ANSWER_EXECUTED, over_http=True, may_report=True, result=OTHER),
    )
    assert decision.verdict is Verdict.CONFLICT


@pytest.mark.parametrize("transport", ["heartbeat", "relay"])
def test_during_a_lease_only_its_own_transport_gets_the_same_attempt(transport: Any) -> None:
    other = "relay" if transport == "heartbeat" else "heartbeat"
    pulled = folded(Published(attempt=1, transport=transport))

    def fetched(**facts: Any) -> str:
        return in_words(Input.FETCH, decide(pulled, request(Input.FETCH, **facts)))

    assert fetched(transport=transport, attempt_open=True, lease_open=True) == "the same attempt again"
    assert fetched(transport=transport, attempt_open=True, lease_open=True, repeatable=False) == "–"
    assert fetched(transport=transport) == f">published 2 {transport}"
    assert fetched(transport=other, attempt_open=True, lease_open=True) == "–"
    assert in_words(Input.HAND_OVER, decide(pulled, request(Input.HAND_OVER, attempt_open=True))) == "–"


def test_only_mqtt_attempts_to_a_present_device_count() -> None:
    def counted(**facts: Any) -> bool:
        event = decide(command_in(State.PENDING), request(Input.HAND_OVER, **facts)).event
        assert isinstance(event, Published)
        return event.counts

    assert counted()
    assert not counted(counts=False)
    assert not counted(transport="relay")


def test_a_late_copy_of_an_acknowledgement_does_not_reopen_a_command() -> None:
    def decided(*events: Event) -> str:
        what = Input.ANSWER_ACKNOWLEDGED
        return in_words(what, decide(folded(PUBLISHED, *events), request(what, now=T + 60_000)))

    assert decided(Acknowledged(), TimedOut(reason="no_result")) == "–"
    assert decided(Progressed(percent=1), TimedOut(reason="no_result")) == "–"
    assert decided(TimedOut(reason="no_answer")) == ">acknowledged late"


class TestProgress:
    def decided(self, state: CommandState, **facts: Any) -> str:
        return in_words(Input.ANSWER_PROGRESS, decide(state, request(Input.ANSWER_PROGRESS, **facts)))

    def test_progress_is_recorded_at_most_once_per_second_and_only_if_it_changed(self) -> None:
        state = folded(PUBLISHED, (Progressed(percent=10, note="warm"), 1_000))

        assert self.decided(state, percent=20, now=T + 1_999) == "–"
        assert self.decided(state, percent=20, now=T + 2_000) == ">progressed"
        assert self.decided(state, percent=10, note="warm", now=T + 9_000) == "–"
        assert self.decided(state, percent=10, note="hot", now=T + 9_000) == ">progressed"

    def test_the_first_progress_need_not_wait_after_an_acknowledgement(self) -> None:
        assert self.decided(folded(PUBLISHED, Acknowledged()), percent=1, now=T) == ">progressed"

    def test_a_late_copy_of_recorded_progress_is_not_recorded(self) -> None:
        state = folded(PUBLISHED, Progressed(percent=10, note="warm"), TimedOut(reason="no_result"))

        assert self.decided(state, percent=10, note="warm", now=T + 60_000) == "–"
        assert self.decided(state, percent=20, note="warm", now=T + 60_000) == ">progressed late"

    @pytest.mark.parametrize("end", [(), (TimedOut(reason="no_result"),)], ids=["acknowledged", "timed out"])
    def test_at_most_a_thousand_progress_events_are_recorded_per_command(
        self, end: tuple[TimedOut, ...]
    ) -> None:
        state = folded(PUBLISHED, *(Progressed(percent=n / 10) for n in range(999)), *end)
        full = folded(PUBLISHED, *(Progressed(percent=n / 10) for n in range(1_000)), *end)

        assert self.decided(state, percent=1, now=T + 60_000).startswith(">progressed")
        assert self.decided(full, percent=1, now=T + 60_000) == "–"


EVIDENCE = [
    (None, Input.CREATE, {}, Created, "accepted"),
    (State.PENDING, Input.HAND_OVER, {}, Published, "handed_over"),
    (State.PENDING, Input.FETCH, {"transport": "relay"}, Published, "handed_over"),
    (State.PUBLISHED, Input.ANSWER_ACKNOWLEDGED, {"evidence": "device_ack"}, Acknowledged, "device_ack"),
    (State.PUBLISHED, Input.ANSWER_EXECUTED, {"evidence": "inferred"}, Executed, "inferred"),
    (State.PUBLISHED, Input.ANSWER_FAILED, {"evidence": "device_result"}, Failed, "device_result"),
    (State.PUBLISHED, Input.ANSWER_PROGRESS, {"evidence": "relay_report"}, Progressed, "relay_report"),
    (
        State.PUBLISHED,
        Input.ACCEPTED,
        {"one_way": True, "evidence": "device_result"},
        Executed,
        "mqtt_puback",
    ),
    (State.PUBLISHED, Input.REFUSED, {"every_attempt_refused": True}, Failed, "mqtt_refused"),
    (State.PENDING, Input.UNSENDABLE, {}, Failed, "broker"),
    (State.PENDING, Input.EXPIRY, {}, Expired, "timer"),
    (State.PUBLISHED, Input.EXPIRY, {}, TimedOut, "timer"),
    (State.PUBLISHED, Input.ATTEMPT_TIMER, {"last_attempt": True}, TimedOut, "timer"),
    (State.ACKNOWLEDGED, Input.RESULT_TIMER, {}, TimedOut, "timer"),
    (State.PUBLISHED, Input.ABANDON, {}, TimedOut, "operator"),
    (State.PENDING, Input.CANCEL, {}, Cancelled, "operator"),
    (State.PENDING, Input.SUPERSEDE, {}, Cancelled, "broker"),
]


@pytest.mark.parametrize(("state", "what", "facts", "event", "evidence"), EVIDENCE)
def test_every_transition_carries_its_evidence(
    state: State | None, what: Input, facts: dict[str, Any], event: type, evidence: str
) -> None:
    decided = decide(None if state is None else command_in(state), request(what, **facts)).event

    assert type(decided) is event
    assert getattr(decided, "evidence", None) == evidence


def test_an_answer_keeps_the_devices_time_and_its_content() -> None:
    said = {"at": "2026-11-20T09:30:00Z", "percent": 40.0, "note": "half way"}
    progressed = decide(command_in(State.PUBLISHED), request(Input.ANSWER_PROGRESS, **said)).event
    failed = decide(
        command_in(State.PUBLISHED), request(Input.ANSWER_FAILED, at=said["at"], error=OTHER_ERROR)
    ).event

    assert isinstance(progressed, Progressed)
    assert (progressed.at, progressed.percent, progressed.note) == (said["at"], 40.0, "half way")
    assert isinstance(failed, Failed)
    assert (failed.at, failed.error) == (said["at"], OTHER_ERROR)


def test_a_repeated_failure_without_a_reason_is_the_same_failure() -> None:
    first = decide(command_in(State.PUBLISHED), request(Input.ANSWER_FAILED, error=None)).event
    assert isinstance(first, Failed)
    failed = folded(PUBLISHED, first)

    assert decide(failed, request(Input.ANSWER_FAILED, error=None)).verdict is Verdict.ALREADY


def test_an_abandon_keeps_who_and_why() -> None:
    event = decide(
        command_in(State.PUBLISHED), request(Input.ABANDON, by="key:key_7", reason="broken lamp")
    ).event

    assert isinstance(event, TimedOut)
    assert (event.by, event.note) == ("key:key_7", "broken lamp")
    assert COMMAND.startswith("cmd_")
