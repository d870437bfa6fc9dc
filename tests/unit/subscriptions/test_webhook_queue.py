"""Due webhook deliveries: order per device, the cursor, waiting, and signatures that the official library
accepts."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from broker.subscriptions.webhook_queue import (
    BASE_MS,
    CAP_MS,
    GIVE_UP_MS,
    HOLD_MS,
    WINDOW,
    Pending,
    Progress,
    Window,
    backoff_ms,
    fresh,
    hold_ms,
    signature,
)

DAY_MS = 86_400_000
START = Progress(cursor=1, reached=0)


def most(low: float, high: float) -> float:
    return high


def window(*entries: tuple[int, str], progress: Progress = START) -> Window:
    made = Window(progress)
    made.looked(entries, max((position for position, _ in entries), default=0), now=0)
    return made


def taken(window: Window, now: int = 0) -> list[int]:
    found = []
    while (pending := window.take(now)) is not None:
        found.append(pending.position)
    return found


def test_per_device_the_first_event_is_due_and_the_next_after_its_delivery() -> None:
    made = window((1, "a"), (2, "b"), (3, "a"))
    first = made.take(0)
    assert first is not None
    assert (first.position, taken(made)) == (1, [2])

    made.delivered(first, 5)

    assert taken(made, 5) == [3]


def test_the_cursor_is_the_lowest_undelivered_position_and_memory_holds_only_open_ones() -> None:
    made = window((1, "a"), (2, "b"), (4, "b"))
    made.take(0)
    for _ in range(2):
        other = made.take(0)
        assert other is not None
        made.delivered(other, 0)

    assert made.cursor == 1
    assert [pending.position for pending in made.progress().open] == [1]
    assert made.progress().reached == 4


def test_events_delivered_ahead_of_the_cursor_are_not_sent_again_after_a_restart() -> None:
    before = window((1, "a"), (2, "b"), (3, "a"))
    before.take(0)
    other = before.take(0)
    assert other is not None
    before.delivered(other, 0)
    stored = msgspec.json.decode(msgspec.json.encode(before.progress()), type=Progress)

    after = Window(stored)
    assert after.progress() == stored, "before it has read any entry again"
    after.looked([(1, "a"), (2, "b")], 2, 0)
    assert after.progress() == stored
    after.looked([(3, "a"), (4, "b")], 4, 0)

    assert sorted(taken(after)) == [1, 4]


def test_a_failure_before_a_restart_is_shown_before_its_event_is_read_again() -> None:
    before = window((1, "a"))
    pending = before.take(0)
    assert pending is not None
    before.failed(pending, 5, most)

    shown = Window(before.progress()).failing()

    assert shown is not None
    assert (shown.position, shown.failed_since) == (1, 5)


def test_an_event_that_is_no_longer_wanted_does_not_hold_the_cursor() -> None:
    stored = window((1, "a"), (2, "b")).progress()
    after = window((2, "b"), progress=stored)
    assert [pending.position for pending in after.progress().open] == [2]


def test_a_failure_waits_longer_each_time_and_stops_after_three_days() -> None:
    made, now, waits = window((7, "a")), 1_000, []
    while True:
        pending = made.take(now)
        assert pending is not None
        going_on = made.failed(pending, now, most)
        due = made.next_at()
        if not going_on:
            break
        assert due is not None
        assert made.take(due - 1) is None
        waits.append(due - now)
        now = due

    assert now == 1_000 + GIVE_UP_MS == 1_000 + 3 * DAY_MS
    assert waits[:3] == [BASE_MS, 2 * BASE_MS, 4 * BASE_MS]
    assert max(waits) == CAP_MS
    assert made.cursor == 7
    failing = made.failing()
    assert failing is not None
    assert (failing.position, failing.failed_since) == (7, 1_000)


def test_the_three_days_continue_over_a_restart_and_start_again_on_resume() -> None:
    made = window((7, "a"))
    pending = made.take(10)
    assert pending is not None
    made.failed(pending, 10, most)

    for progress, goes_on in ((made.progress(), False), (fresh(made.progress()), True)):
        after = window((7, "a"), progress=progress)
        again = after.take(10)
        assert again is not None
        assert after.failed(again, 10 + GIVE_UP_MS, most) is goes_on


def test_while_an_endpoint_is_held_nothing_is_due() -> None:
    made = window((1, "a"))
    made.hold_until = 50
    assert (made.take(49), made.next_at()) == (None, 50)
    assert taken(made, 50) == [1]


def test_the_window_has_a_limit() -> None:
    assert not window(*((position, "a") for position in range(1, WINDOW))).full
    assert window(*((position, "a") for position in range(1, WINDOW + 1))).full


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_wait_is_between_a_second_and_two_hours(attempts: int, share: float) -> None:
    wait = backoff_ms(attempts, lambda low, high: low + share * (high - low))
    assert 1_000 <= wait <= CAP_MS


@pytest.mark.parametrize(
    ("header", "ms"),
    [
        ("7", 7_000),
        (" 120 ", 120_000),
        ("99999999999999999999", HOLD_MS),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30_000),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", HOLD_MS),
        ("soon", 0),
        ("-5", 0),
        ("1.5", 0),
        ("٣", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date_and_capped(header: str | None, ms: int) -> None:
    assert hold_ms(header, 1_445_412_480_000) == ms  # 2015-10-21T07:28:00Z


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_with_failures_and_restarts_everything_is_delivered_in_order_per_device(seed: int) -> None:
    draw = random.Random(seed)
    log = [(position, draw.choice("abc")) for position in range(1, 40)]
    made, saved, now = Window(START), START, 0
    delivered: list[tuple[int, str]] = []
    under_way: list[Pending] = []
    while made.cursor < 40:
        now += draw.randrange(20_000)
        act = draw.random()
        if act < 0.2 and made.reached < 39:
            until = min(39, made.reached + draw.randint(1, 9))
            made.looked([entry for entry in log if made.reached < entry[0] <= until], until, now)
        elif act < 0.25:
            saved = made.progress()
        elif act < 0.28:  # a crash: deliveries since `saved` are sent again
            made, under_way = Window(saved), []
        elif act < 0.7 and (pending := made.take(now)):
            under_way.append(pending)
        elif under_way:
            pending = under_way.pop(draw.randrange(len(under_way)))
            if draw.random() < 0.3:
                made.failed(pending, now, draw.uniform)
            else:
                delivered.append((pending.position, pending.device_id))
                made.delivered(pending, now)

    firsts = list(dict.fromkeys(delivered))
    assert sorted(firsts) == log
    for device in "abc":
        mine = [position for position, owner in firsts if owner == device]
        assert mine == sorted(mine)


# --- signatures ------------------------------------------------------------------------------------

OLD, NEW = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDAAAA"
BODY = json.dumps({"id": "7"}).encode()


def headers(*secrets: str) -> dict[str, str]:
    at = int(datetime.now(UTC).timestamp())
    return {
        "webhook-id": "log_1_7",
        "webhook-timestamp": str(at),
        "webhook-signature": signature(secrets, "log_1_7", at, BODY),
    }


def test_the_official_library_verifies_with_either_secret_of_a_rotation() -> None:
    for secret in (OLD, NEW):
        assert Webhook(secret).verify(BODY, headers(NEW, OLD)) == {"id": "7"}


def test_the_official_library_refuses_another_secret_body_or_id() -> None:
    for secret, body, wrong in (
        (OLD, BODY, {}),
        (NEW, BODY + b" ", {}),
        (NEW, BODY, {"webhook-id": "log_1_8"}),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, headers(NEW) | wrong)


def test_the_example_of_the_specification_gives_its_signature() -> None:
    """The test vector of the reference implementations."""
    made = signature([OLD], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
