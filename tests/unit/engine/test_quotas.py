"""A project's rate limit: the burst, the time of the next allowed command, and the independence of
projects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.errors import Refusal
from broker.engine.quotas import Quotas
from broker.settings import Limits, ProjectLimits

T = 1_800_000_000_123


def quotas(per_minute: int, **projects: ProjectLimits) -> Quotas:
    return Quotas(Limits(commands_per_minute=per_minute), projects)


def taken(quotas: Quotas, at: int, count: int, project: str = "acme") -> int:
    """How many of `count` commands at one moment are allowed."""
    allowed, limits = 0, quotas.of_command("operator:local", None, project, None)
    for _ in range(count):
        try:
            quotas.take(limits, at)
        except Refusal:
            continue
        allowed += 1
    return allowed


def wait_sec(quotas: Quotas, at: int, project: str = "acme") -> int:
    """Seconds until the next allowed command, as the refusal says."""
    with pytest.raises(Refusal) as refusal:
        quotas.take(quotas.of_command("operator:local", None, project, None), at)
    assert refusal.value.kind == "rate_limit_exceeded"
    assert refusal.value.retry_after_sec is not None
    assert refusal.value.details == {"retry_after_sec": refusal.value.retry_after_sec}
    return refusal.value.retry_after_sec


def test_without_a_rate_everything_is_allowed() -> None:
    assert taken(quotas(0), T, 10_000) == 10_000


@pytest.mark.parametrize("rate", [1, 7, 60, 999])
def test_a_minutes_commands_may_come_at_once_and_again_after_a_minute(rate: int) -> None:
    bucket = quotas(rate)

    assert taken(bucket, T, rate + 5) == rate
    assert taken(bucket, T + 59_999, rate + 5) == rate - 1
    assert taken(bucket, T + 10**9, rate + 5) == rate


def test_the_bucket_fills_evenly() -> None:
    bucket = quotas(6)
    taken(bucket, T, 6)

    assert taken(bucket, T + 9_999, 1) == 0
    assert taken(bucket, T + 10_000, 2) == 1
    assert taken(bucket, T + 40_000, 9) == 3


@given(rate=st.integers(1, 5_000), gaps=st.lists(st.integers(0, 5_000), min_size=1, max_size=60))
def test_the_retry_time_of_a_refusal_is_true_and_the_rate_is_kept(rate: int, gaps: list[int]) -> None:
    bucket, at, allowed = quotas(rate), T, 0
    for gap in gaps:
        at += gap
        while taken(bucket, at, 1):
            allowed += 1
        wait = wait_sec(bucket, at)
        assert 1 <= wait <= 60
        assert taken(bucket, at + (wait - 1) * 1_000, 1) == 0
        assert taken(bucket, at + wait * 1_000, 1) == 1
        at += wait * 1_000
        allowed += 1
    assert allowed <= rate + rate * (at - T) / 60_000 + 1e-6


def test_a_refused_command_costs_nothing() -> None:
    bucket = quotas(1)
    taken(bucket, T, 1_000)

    assert wait_sec(bucket, T + 1) == 60
    assert taken(bucket, T + 60_000, 1) == 1


def test_projects_are_independent_and_may_have_their_own_limits() -> None:
    bucket = quotas(2, busy=ProjectLimits(commands_per_minute=5), free=ProjectLimits(commands_per_minute=0))

    assert taken(bucket, T, 10) == 2
    assert taken(bucket, T, 10, "other") == 2
    assert taken(bucket, T, 10, "busy") == 5
    assert taken(bucket, T, 10, "free") == 10


def test_a_limit_that_a_project_does_not_set_is_the_default() -> None:
    limits = Limits(queue_per_name=7, params_bytes=9)
    found = Quotas(limits, {"acme": ProjectLimits(params_bytes=2)})

    assert (found.of("acme").queue_per_name, found.of("acme").params_bytes) == (7, 2)
    assert found.of("other") == limits
