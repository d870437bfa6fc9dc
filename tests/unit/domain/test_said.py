"""What the device said and what did not decide the command is part of its explanation."""

from __future__ import annotations

import pytest

from broker.domain.explain import Explanation
from broker.domain.said import CONTRADICTING, UNFIT, UNUSABLE, Said, with_answers
from broker.http.v1.unmatched import Reason
from devices.clock import rfc3339
from tests.integration.core_support import T

ACK = "iotee/dev/lamp-1/ack"


def plain(state: str = "published") -> Explanation:
    return Explanation(command_id="cmd_1", state=state, summary="It waits.", reasons=[], next=None)


@pytest.mark.parametrize("reason", list(CONTRADICTING))
def test_a_contradicting_answer_is_added(reason: str) -> None:
    said = [Said(at=T + n, reason=reason) for n in (1_000, 2_000)]

    found = with_answers(plain("executed"), said)

    assert found.summary == f"It waits. But {CONTRADICTING[reason]} (last at {rfc3339(T + 2_000)})."
    assert found.reasons == [{"code": reason, "count": 2, "at": rfc3339(T + 2_000)}]
    assert with_answers(plain(), []) == plain()


@pytest.mark.parametrize("reason", list(UNUSABLE))
def test_an_unusable_message_is_named_unless_the_command_has_its_end(reason: str) -> None:
    said = [Said(at=T, reason=reason, topic=ACK)]

    found = with_answers(plain(), said)

    assert f"it {UNUSABLE[reason]} (last at {rfc3339(T)}, topic {ACK})." in found.summary
    assert found.reasons == [
        {"code": "unusable_answer", "reason": reason, "topic": ACK, "count": 1, "at": rfc3339(T)}
    ]
    for state in ("executed", "failed", "expired", "cancelled"):
        assert with_answers(plain(state), said) == plain(state)
    assert with_answers(plain("timed_out"), said) != plain("timed_out")


@pytest.mark.parametrize("reason", list(UNFIT))
def test_a_part_that_was_left_out_is_named_even_after_the_end(reason: str) -> None:
    found = with_answers(plain("executed"), [Said(at=T, reason=reason, topic=ACK)])

    part = reason.removeprefix("unfit_")
    assert found.reasons == [{"code": "unfit_part", "part": part, "count": 1, "at": rfc3339(T)}]


def test_every_reason_for_which_a_message_is_kept_is_explained_or_names_no_device() -> None:
    known = {*CONTRADICTING, *UNUSABLE, *UNFIT, "unknown_device"}

    assert set(Reason.__args__) == known  # type: ignore[attr-defined]
