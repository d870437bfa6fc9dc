"""The checkers of requests, access, timing and the wire each name the fault in a wrong history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.checkers.life import CHECKERS, check
from tests.simulation.history import BY_MQTT, Secret
from tests.simulation.test_checkers import WRONG as OTHERS
from tests.simulation.test_checkers import A, B, Story, closed

LEVEL: dict[str, Any] = {"params": {"level": 1_000}}
FAR = 1_000_000


def asked(
    story: Story,
    kind: str,
    status: int,
    *ids: str,
    answer: Any = None,
    body: str = "",
    who: Secret | None = None,
) -> Story:
    call = story.history.invoked(kind, body=body, ids=ids)
    call.secret = who
    story.history.returned(call, status, ids=ids, answer=answer)
    return story


def later(story: Story, ms: int) -> Story:
    story.now += ms
    return story


def again() -> Story:
    """A process that has started after an event."""
    return Story().log("audit", "operated").log("system", "started")


def sent_and_killed() -> Story:
    sent = Story().log("system", "started").created(ttl_ms=5_000, expires_at=6_500).published().wire()
    return later(lived(sent, "down"), 10).log("system", "started").log("audit", "operated")


def answered_before_the_next(after_ms: int) -> Story:
    """A command without id times out, and this long afterwards its device answers, and gets the next one."""
    story = Story().log("system", "started").defined(carries_ids=False, late_answer_sec=1).sent("cmd_b")
    story.history.linked(True)
    later(story.ended("cmd_b", "timed_out", evidence="timer"), after_ms)
    story.created().answers("executed", command_id=None).published().wire()
    return story.ended(evidence="inferred")


def ended_unheard(story: Story) -> Story:
    return story.published().wire().ended(event="expired")


def lived(story: Story, *events: Any) -> Story:
    for event in events:
        story.history.lived(event)
    return story


def wrote(story: Story, *, ok: bool) -> Story:
    story.history.wrote(story.now, ok=ok)
    return story


def backed_up(story: Story, events: int) -> Story:
    story.history.backed_up([dict(row) for row in story.rows[:events]])
    return story


def spied(story: Story, answer: str) -> Story:
    error = {"error": {"message": answer}}
    return asked(story, "pry", 404, A, answer=error, body=f"/v1/commands/{A} ")


def after_its_key() -> Story:
    story = Story().created()
    ended = Secret(who="key_1", value="s", ended=story.now)
    return asked(later(story, 6_000), "read", 200, A, who=ended)


def by_another() -> Story:
    story = Story().created()
    story.rows[0]["actor"] = "key:other"
    story.history.secret("acme", "s", "key:acme")
    return asked(story, "create", 201, A, who=story.history.secrets[0])


def in_a_line() -> Story:
    story = Story()
    story.history.secret("acme", "sk_live_1")
    story.history.lines = ["key.used {'key': 'sk_live_1'}"]
    return story


def bounded() -> Story:
    story = Story()
    story.history.bound("send slots", 4, 3)
    return story


def crowded() -> Story:
    story = Story().created(A, type="beep").created(B, type="beep")
    story.history.most = 1, 1
    return story


def refused_to_the_rival(*, full: bool) -> Story:
    """The neighbour's command did not expire, because the broker's clock stands."""
    story = Story().created()
    story.history.most = (5, 1) if full else (5, 2)
    story.history.secret("rival", "s")
    story.history.returned(story.history.invoked("create", secret="s"), 201, ids=(A,))
    story.history.returned(later(story, 20_000).history.invoked("create", secret="s"), 429)
    return story


def not_told() -> Story:
    story = Story()
    story.history.readers = {"every event": None}
    story.history.reads("every event", on=True)
    later(story, 20_000).created()
    later(story, 20_000).history.reads("every event", on=False)
    return story


def granted(fault: str | None, exp: int) -> Story:
    story = Story().created(expires_at=50_000)
    story.history.grant("hw1", A, exp, fault)
    return story


def link(story: Story, *ups: bool) -> Story:
    for up in ups:
        story.history.linked(up)
    return story


def delivered(story: Story, name: str) -> Story:
    story.history.on_wire("delivery", f"iotee/dev/{name}/ack", b"{}")
    return story


def acknowledged(story: Story, name: str) -> Story:
    story.history.on_wire("puback", f"iotee/dev/{name}/ack", b"{}")
    return story


def decided_before_the_session() -> Story:
    story = link(Story().log("system", "started").defined(presence="required"), False, True)
    story.history.on_wire("delivery", "iotee/dev/hw1/status", b"online")
    story.created().log(B, "created", hardware_id="hw2", durable=False)
    story.log(A, "published", attempt=1, durable=False)
    link(later(story, 100), False, True).history.committed(len(story.rows) - 1)
    return story.durable()


def timed_out_before_the_cut() -> Story:
    story = link(Story().log("system", "started").defined(ack_timeout_sec=1), False, True).sent()
    later(story, 2_000).log(A, "timed_out", reason="no_answer", durable=False)
    return later(link(story, False), 3_000).durable()


def hurried() -> Story:
    story = Story().defined(ack_timeout_sec=10).sent()
    story.history.on_wire("accepted", "iotee/dev/hw1/rls", b"{}", A.encode(), attempt=1)
    return later(story, 5_000).published(attempt=2)


def stood_still() -> Story:
    story = lived(later(Story().defined(ack_timeout_sec=10).sent(), 2_000), "paused")
    lived(later(story, 60_000), "resumed")
    return story.log(A, "timed_out", reason="no_answer")


def told(*positions: int) -> Story:
    story = Story().created().published()
    story.history.mqtt_events = True
    for position in positions:
        story.history.streamed(BY_MQTT, position, "")
    story.history.hooked_until = 2
    return story


WRONG: dict[str, tuple[Callable[[], Story], str]] = {
    "R2 twice": (
        lambda: Story().created(**LEVEL).created(B, **LEVEL),
        "R2: cmd_b was created by the same order as cmd_a",
    ),
    "R4 older than before": (
        lambda: asked(
            asked(closed(), "read", 200, A, answer={"id": A, "state": "executed"}),
            "read", 200, A, answer={"id": A, "state": "pending"},
        ),
        "R4: read of cmd_a showed pending, older than an answer before it",
    ),
    "R4 gone": (
        lambda: asked(
            asked(Story().created(), "create", 201, A, answer={"id": A, "state": "pending"}), "read", 404, A
        ),
        "R4: read of cmd_a was answered 404 after it was answered before",
    ),
    "R5 refused and there": (
        lambda: asked(Story(), "create", 400, body='{"level":1000}').created(**LEVEL),
        "R5: cmd_a was created by a request that was refused",
    ),
    "R5 a retry that was refused": (
        lambda: asked(closed("failed"), "retry", 409, body=f"/commands/{A}/retry").created(B, retry_of=A),
        "R5: cmd_a was retried 1 times, 0 of the requests were not refused",
    ),
    "R7 ready": (
        lambda: wrote(asked(later(wrote(Story(), ok=False), 2_000), "ready", 200), ok=True),
        "R7: /readyz answered 200 while the log could not be written",
    ),
    "R7 no reads": (
        lambda: wrote(asked(later(wrote(Story(), ok=False), 2_000), "read", 503, A), ok=True),
        "R7: a read was answered 503 while only the log could not be written",
    ),
    "L3 another end": (
        lambda: asked(closed().well(1, FAR), "read", 200, A, answer={"id": A, "state": "expired"}),
        "L3: read showed cmd_a as expired, and it ended as executed",
    ),
    "D2 never sent": (
        lambda: later(later(Story().created(), 50_000).published(), 5_000).well(1, FAR),
        "D2: cmd_a attempt 1 was recorded and never sent",
    ),
    "D2 never reached": (
        lambda: Story().created().call("create", 201, A, key="fresh-hw1").well(1, FAR),
        "D2: cmd_a, created when all was well, never reached its device",
    ),
    "D2 not subscribed": (
        lambda: ended_unheard(Story().created().call("create", 201, A, key="fresh-hw1")).well(1, FAR),
        "D2: cmd_a, created when all was well, never reached its device",
    ),
    "D4 a slow commit": (
        lambda: (
            later(
                Story().log("system", "started").created(expires_at=3_000).published(durable=False), 3_000
            )
            .durable()
            .wire()
        ),
        "D4: cmd_a attempt 1 was sent 1006 ms after it expired",
    ),
    "D4 by true time": (
        lambda: later(Story().created(ttl_ms=5_000, expires_at=FAR).published(), 6_000).wire(),
        "D4: cmd_a attempt 1 was sent 1003 ms after it expired",
    ),
    "A3 an answer for which the broker had to wait": (
        lambda: answered_before_the_next(990),
        "A3: cmd_a: executed was inferred from an answer older than the command",
    ),
    "D4 sent again by the next process": (
        lambda: later(sent_and_killed(), 6_000).wire(),
        "D4: cmd_a attempt 1 was sent 522 ms after it expired",
    ),
    "D5 a wrong grant": (
        lambda: granted("wrong_device: for hw2", 1),
        "D5: hw1 got cmd_a with a wrong grant: wrong_device: for hw2",
    ),
    "D5 too long": (
        lambda: granted(None, 60_000),
        "D5: the grant of cmd_a ends 10000 ms after the command",
    ),
    "D7 another device": (
        lambda: Story().created(hardware_id="hw2").published().wire(),
        "D7: cmd_a went to hw1, which is another device",
    ),
    "D9 not heard": (
        lambda: later(link(Story().defined(presence="required"), False, True).created(), 10).published(),
        "D9: cmd_a attempt 1 counts, its device not heard since",
    ),
    "D13 in a hurry": (hurried, "D13: cmd_a attempt 1 was given 5003 ms of 10000"),
    "A4 no PUBACK": (
        lambda: later(delivered(later(Story(), 9_000), "hw1"), 9_000).created(),
        "A4: a message on iotee/dev/hw1/ack waited for more than 1000 ms for its PUBACK",
    ),
    "A4 out of order": (
        lambda: acknowledged(delivered(delivered(Story(), "hw1"), "hw2"), "hw2"),
        "A4: the PUBACK for iotee/dev/hw2/ack overtook that of an earlier message",
    ),
    "A5 after standing still": (stood_still, "A5: cmd_a timed out 2 ms after the process went on"),
    "E3 a salt": (
        lambda: closed().log("erasures", "erased", ids=[A]).erase(1).change(1, salt=b"1").well(1, FAR),
        "E3: position 1 was erased and still has its salt",
    ),
    "S5 never by MQTT": (lambda: told(1), "S5: MQTT events never had position 2"),
    "S5 by MQTT in another order": (
        lambda: told(2, 1),
        "S5: MQTT events had position 2 before an earlier one of its command",
    ),
    "S6 early": (
        lambda: Story().created(ttl_ms=60_000).log(A, "expired"),
        "S6: cmd_a had 60000 ms and ended by time after 2 ms",
    ),
    "S7 another's name": (by_another, "S7: cmd_a was created by key:other, asked for by key:acme"),
    "S7 in a line": (in_a_line, "S7: the secret of acme is in a log line: key.used {'key': 'sk_live_1'}"),
    "C1 seen": (
        lambda: asked(Story(), "pry", 200, A, answer={}, body=f"/v1/commands/{A} "),
        "C1: another project's request for ('cmd_a',) was answered 200",
    ),
    "C1 told apart": (
        lambda: spied(spied(Story(), "there is no such command"), "not yours"),
        "C1: /v1/commands/ID shows whether an id of another project exists: "
        "['[404, {\"error\": {\"message\": \"not yours\"}}]', "
        "'[404, {\"error\": {\"message\": \"there is no such command\"}}]']",
    ),
    "C2 an ended key": (after_its_key, "C2: read with the ended secret of key_1 was answered 200"),
    "C3 a bound": (bounded, "C3: send slots: 4 of at most 3"),
    "C3 a queue": (crowded, "C3: cmd_b was taken while its device had 1 open commands"),
    "A3 the bytes never left": (
        lambda: (
            Story()
            .log("system", "started")
            .created()
            .published()
            .answers("executed", command_id=None)
            .ended(evidence="inferred")
        ),
        "A3: cmd_a: executed was inferred from an answer older than the command",
    ),
    "C3 the neighbour": (
        lambda: refused_to_the_rival(full=False),
        "C3: a create of another project was answered 429 after 1 ms",
    ),
    "C4 not in time": (not_told, "C4: the reader of every event did not get position 1 in time"),
    "O2 too slow": (
        lambda: lived(later(lived(Story(), "stopping"), 11_000), "ended"),
        "O2: the process ended 11001 ms after it was asked to",
    ),
    "O5 not all": (
        lambda: backed_up(Story().created().published(), 1),
        "O5: a backup has 1 events, and 2 were durable",
    ),
    "O5 another log": (
        lambda: backed_up(Story().created(), 1).change(1, type="expired"),
        "O5: the event at position 1 was changed",
    ),
    "O4 never again": (
        lambda: wrote(later(lived(wrote(lived(Story(), "full"), ok=False), "room"), 6_000), ok=True),
        "O4: 6000 ms after there was space the log had not been written again",
    ),
}  # fmt: skip


RIGHT: dict[str, Callable[[], Story]] = {
    "A5 the link went down while the commit was slow": timed_out_before_the_cut,
    "A3 after a start nobody knows that the bytes never left": lambda: (
        Story()
        .created()
        .published()
        .log("system", "started")
        .answers("executed", command_id=None)
        .ended(evidence="inferred")
    ),
    "C3 the neighbour's own queue is full": lambda: refused_to_the_rival(full=True),
    "D4 the clock stands from the start, before it could be seen": lambda: (
        later(again().created(ttl_ms=5_000, expires_at=FAR), 6_000)
        .published()
        .wire()
        .change(2, recorded_at=1_001)
        .change(3, recorded_at=1_001)
        .change(4, recorded_at=1_001)
    ),
    "A3 an answer later than the broker waits for it": lambda: answered_before_the_next(1_001),
    "D4 sent again by a process whose clock stands from its start": lambda: later(
        sent_and_killed().change(4, recorded_at=1_005).change(5, recorded_at=1_005), 6_000
    ).wire(),
    "D9 the session ended while the commit was slow": decided_before_the_session,
    "S6 the clock stood since the start, and then went on": lambda: (
        later(again(), 500_000)
        .created(ttl_ms=60_000)
        .log(A, "expired")
        .change(2, recorded_at=1_001)
        .change(3, recorded_at=1_001)
    ),
    "O4 the last write of a killed process": lambda: wrote(
        later(lived(wrote(lived(Story(), "full", "down"), ok=False), "room"), 6_000), ok=True
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_correct_history_has_no_violation(name: str) -> None:
    assert check(RIGHT[name]().dump().history) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_is_named(name: str) -> None:
    story, sentence = WRONG[name]

    assert sentence in check(story().dump().history)


def test_a_process_still_stands_when_its_disk_gets_space() -> None:
    ((since, end),) = lived(Story(), "full", "paused", "room", "resumed", "down").history.stops()

    assert (since, end.what, end.t) == (1_002, "resumed", 1_004)


def test_every_checker_has_a_wrong_history() -> None:
    assert {name.split()[0] for name in (*WRONG, *OTHERS)} == CHECKERS.keys()
