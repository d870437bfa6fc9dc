"""Each checker accepts a correct history and names the fault in a wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.checkers.life import check, s4
from tests.simulation.facts import Facts
from tests.simulation.history import History, Row

A, B = "cmd_a", "cmd_b"
TOPIC = "iotee/dev/hw1/rls"
DEFINITION = "d1"
URL = "https://one.example/hook"


class Story:
    """Builds a history. Each `log` is its own commit, at least 1 ms later than the previous entry."""

    def __init__(self) -> None:
        self.now = 1000
        self.history = History(self.tick)
        self.rows: list[Row] = []

    def tick(self) -> int:
        self.now += 1
        return self.now

    def log(self, stream: str, event: str, *, durable: bool = True, **data: Any) -> Story:
        version = 1 + sum(row["stream"] == stream for row in self.rows)
        position = len(self.rows) + 1
        row = {"position": position, "stream": stream, "version": version, "type": event, "data": data}
        self.rows.append({**row, "recorded_at": self.tick(), "device_id": "dev_1"})
        if durable:
            self.durable()
        return self

    def durable(self) -> Story:
        self.history.committed(len(self.rows))
        return self

    def created(self, command_id: str = A, **data: Any) -> Story:
        said = {"hardware_id": "hw1", "topic": TOPIC, "definition": DEFINITION, "expires_at": None}
        return self.log(command_id, "created", **{**said, **data})

    def published(self, command_id: str = A, attempt: int = 1, **options: Any) -> Story:
        return self.log(command_id, "published", attempt=attempt, **options)

    def ended(self, command_id: str = A, event: str = "executed", **data: Any) -> Story:
        return self.log(command_id, event, **{"evidence": "device_result", **data})

    def wire(self, command_id: str | None = A, attempt: int = 1) -> Story:
        payload = json.dumps({"id": command_id, "attempt": attempt}) if command_id else "1"
        self.history.on_wire("publish", TOPIC, payload.encode())
        return self

    def reached(self, command_id: str = A) -> Story:
        self.history.on_wire("reached", TOPIC, b"1", command_id.encode())
        return self

    def fetched(self, command_id: str = A, attempt: int = 1) -> Story:
        self.history.handed("relay", "hw1", command_id, attempt)
        return self

    def report(self, command_id: str, state: str) -> Story:
        call = self.history.invoked("report", body=f"/v1/devices/hw1/commands/{command_id}/result {{}}")
        self.history.returned(call, 200, answer={"state": state})
        return self

    def puback(self, status: str, command_id: str = A, hardware_id: str = "hw1") -> Story:
        payload = json.dumps({"id": command_id, "status": status}).encode()
        self.history.on_wire("puback", f"iotee/dev/{hardware_id}/ack", payload)
        return self

    def status(self) -> Story:
        self.history.on_wire("delivery", "iotee/dev/hw1/status", b"online", retain=True)
        return self

    def executes(self, command_id: str = A) -> Story:
        self.history.executed("hw1", command_id)
        return self

    def answers(self, status: str, command_id: str | None = A, hardware_id: str = "hw1") -> Story:
        self.history.answered(hardware_id, command_id, status)
        return self

    def call(self, kind: str, status: int | None, *ids: str, key: str | None = None, body: str = "") -> Story:
        call = self.history.invoked(kind, key=key, body=body)
        if status is not None:
            self.history.returned(call, status, ids=ids)
        return self

    def lists(self, *ids: str) -> Story:
        call = self.history.invoked("list")
        self.history.returned(call, 200, answer={"data": [{"id": each} for each in ids]})
        return self

    def well(self, since: int, until: int) -> Story:
        self.history.healed_at, self.history.ended_at = since, until
        return self

    def dump(self) -> Story:
        self.history.dumped([dict(row) for row in self.rows])
        return self

    def without_last(self) -> Story:
        self.rows.pop()
        return self

    def sent(self, command_id: str = A) -> Story:
        return self.created(command_id).published(command_id).wire(command_id)

    def defined(self, **definition: Any) -> Story:
        return self.log(f"type/{DEFINITION}", "defined", definition=definition)

    def hook(self, position: int, type: str = "", *, taken: bool = True, id: str = "") -> Story:
        named = next((row["type"] for row in self.rows if row["position"] == position), "")
        self.history.hooked(
            URL, id or f"log_{position}", position, type or f"ordain.command.{named}.v1", taken=taken
        )
        return self

    def delivered(self) -> Story:
        self.history.hooked_until = len(self.rows)
        return self

    def erase(self, position: int) -> Story:
        self.rows[position - 1]["data"] = None
        return self

    def change(self, at: int, **columns: Any) -> Story:
        self.rows[at - 1].update(columns)
        return self


def many(story: Story, command_id: str) -> Story:
    """Adds an answered fan-out with the key `k`: one device gets a command, the other is unknown."""
    call = story.history.invoked("fan_out", key="k")
    answer = {"hw1": {"command_id": command_id}, "stranger": {"error": {"code": "not_found"}}}
    story.history.returned(call, 200, ids=(command_id,), answer=answer)
    return story


def whole_life() -> Story:
    """A correct history with one entry of each kind."""
    story = Story().log("system", "started").defined(repeatable=True).created(expires_at=10_000)
    story.history.linked(True)
    story.call("create", 201, A, key="k", body="x").call("create", 200, A, key="k", body="x")
    story.published().wire().executes().answers("acknowledged").answers("progress").answers("executed")
    story.ended(event="acknowledged", evidence="device_ack").puback("acknowledged").puback("acknowledged")
    story.ended(event="progressed", percent=10, evidence="device_ack").puback("progress")
    story.ended().puback("executed").puback("failed")
    story.created(B).call("create", None).log(B, "cancelled", by="ops").call("cancel", 200, B)
    story.created("cmd_c").published("cmd_c").wire("cmd_c").dump()
    story.log("cmd_c", "timed_out", reason="no_answer").answers("executed", "cmd_c").executes("cmd_c")
    story.ended("cmd_c", late=True).puback("executed", "cmd_c").puback("executed", "cmd_c", "hw2")
    return story.erase(3).log("erasures", "erased", ids=[A])


def leased() -> Story:
    return Story().defined(relay_lease_sec=60).created().published(transport="relay").fetched()


def hooked(*events: str) -> Story:
    """A history with one command that was created and handed over, and a webhook that wants `events`."""
    story = Story()
    call = story.history.invoked("webhook")
    story.history.returned(call, 201, answer={"url": URL, "events": list(events), "cursor": 1})
    return story.created().published()


def closed(event: str = "executed") -> Story:
    return Story().sent().executes().answers(event).ended(event=event, reason="no_answer")


RIGHT: dict[str, Callable[[], Story]] = {
    "a whole life": whole_life,
    "R1 an answer that nobody saw": lambda: Story().call("create", None),
    "R1 a request that was refused": lambda: Story().call("create", 409, "cmd_never"),
    "L1 a broker that cannot send": lambda: (
        Story().created().ended(event="failed", by="broker", evidence="broker")
    ),
    "L4 it expired while everything was broken": lambda: (
        Story().created(expires_at=1100).well(50_000, 99_000).log(A, "expired").change(2, recorded_at=64_000)
    ),
    "L4 the clock stood until everything was well": lambda: (
        Story()
        .log("audit", "operated")
        .log("system", "started", mqtt="embedded")
        .created(expires_at=1100)
        .well(1_000, 99_000)
        .log(A, "expired")
        .change(2, recorded_at=1_001)
        .change(4, recorded_at=47_500)
    ),
    "L4 there was no time to end it": lambda: Story().created(expires_at=90_000).well(1000, 99_000),
    "D1 bare payloads, each with its event": lambda: (
        Story().created().published().wire(None).published(attempt=2).wire(None)
    ),
    "D2 its device had answered an earlier attempt": lambda: (
        Story()
        .sent()
        .well(1, 99_000)
        .answers("acknowledged")
        .log(A, "published", attempt=2)
        .log(A, "acknowledged")
        .change(3, recorded_at=50_001)
        .change(4, recorded_at=50_002)
        .log(A, "timed_out", evidence="operator")
        .change(5, recorded_at=60_000)
    ),
    "D3 what may be repeated was": lambda: Story().defined().sent().published(attempt=2).wire(attempt=2),
    "D6 the pipe was late": lambda: (
        Story()
        .sent(A)
        .log(A, "timed_out", reason="no_answer", evidence="operator")
        .sent(B)
        .executes(B)
        .executes(A)
    ),
    "A3 the MQTT server doubled the one before, and the device did it twice": lambda: (
        Story()
        .created()
        .published()
        .wire()
        .reached()
        .reached()
        .answers("executed", command_id=None)
        .ended(evidence="inferred")
        .created(B)
        .answers("executed", command_id=None)
        .published(B)
        .wire(B)
        .ended(B, evidence="inferred")
    ),
    "E2 it was read before": lambda: (
        closed().call("read", 200, A).log("erasures", "erased", ids=[A], count=1).call("read", 404, A)
    ),
    "E3 what was open when the purge came, or is younger, stays": lambda: (
        Story()
        .sent()
        .log("erasures", "erased", cutoff=1)
        .log("erasures", "erased", cutoff=90_000)
        .call("purge", 200)
    ),
    "D6 several may be in flight": lambda: (
        Story().defined(max_in_flight=2).sent(A).sent(B).executes(B).executes(A)
    ),
    "A1 the device was deleted": lambda: (
        Story()
        .sent()
        .log(A, "timed_out", evidence="operator")
        .log("device/dev_1", "deleted")
        .puback("executed")
    ),
    "A1 never handed over": lambda: Story().created().puback("executed").puback("failed"),
    "A2 the device answered twice, and it is one event": lambda: (
        Story().sent().answers("executed").answers("executed").ended()
    ),
    "D11 a lease that ended": lambda: leased().published(attempt=2).change(4, recorded_at=62_000),
    "R3 many, and one more the second time": lambda: many(many(Story().created(), A), A),
    "R10 one takes the place of another": lambda: (
        Story()
        .created(collapse_key="c")
        .log(A, "cancelled", durable=False, by="broker", superseded_by=B)
        .created(B, collapse_key="c")
    ),
    "R10 what was handed over stays": lambda: (
        Story().created(collapse_key="c").published().created(B, collapse_key="c").wire()
    ),
    "A5 it could not be answered by MQTT": lambda: (
        Story()
        .log("system", "started")
        .defined(transports=["relay"])
        .sent()
        .log(A, "timed_out", reason="ttl")
    ),
    "A6 a relay": lambda: leased().answers("executed").ended(evidence="relay_report").report(A, "executed"),
    "A2 an id-less answer": lambda: Story().sent().answers("executed", None).ended(evidence="inferred"),
    "S5 taken at the second try, each device in order": lambda: (
        hooked().hook(1, taken=False).hook(1).hook(1).hook(2).delivered()
    ),
    "S5 what was not wanted, and what came too late": lambda: (
        hooked("executed").answers("executed").ended().hook(3).delivered().created(B)
    ),
    "D9 a retained word made it open again": lambda: (
        Story().defined(presence="required").log("device/dev_1", "offline").status().sent()
    ),
    "D9 a retained word came in the same commit": lambda: (
        Story()
        .defined(presence="required")
        .status()
        .log("device/dev_1", "online", durable=False)
        .log("device/dev_1", "offline")
        .sent()
    ),
}

WRONG: dict[str, tuple[Callable[[], Story], str]] = {
    "R1 lost": (lambda: Story().call("create", 201, A), "R1: cmd_a was answered 201 and is not in the log"),
    "R1 answered too early": (
        lambda: Story().log(A, "created", durable=False).call("create", 201, A).durable(),
        "R1: cmd_a was answered 201 before it was durable",
    ),
    "R3 two commands": (
        lambda: Story().created(A).created(B).call("create", 201, A, key="k").call("create", 201, B, key="k"),
        "R3: key k gave two commands: ('cmd_a',) and ('cmd_b',)",
    ),
    "R3 two bodies": (
        lambda: (
            Story()
            .created()
            .call("create", 201, A, key="k", body="x")
            .call("create", 200, A, key="k", body="y")
        ),
        "R3: key k was taken with two bodies: ('cmd_a',) and ('cmd_a',)",
    ),
    "R6 forgotten": (
        lambda: Story().created().call("cancel", 200, A),
        "R6: cancel of cmd_a was answered 200 and its log says ['created']",
    ),
    "R6 sent all the same": (
        lambda: Story().created().log(A, "cancelled", by="ops").call("cancel", 200, A).wire(),
        "R6: cmd_a was cancelled and handed over",
    ),
    "L1 not in the table": (
        lambda: Story().created().log(A, "acknowledged"),
        "L1: cmd_a: acknowledged after pending at version 2",
    ),
    "L1 failed before any hand-over": (
        lambda: Story().created().log(A, "failed", by="device"),
        "L1: cmd_a: failed after pending at version 2",
    ),
    "L1 attempt skipped": (
        lambda: Story().created().published(attempt=2),
        "L1: cmd_a: attempt 2 where 1 was due",
    ),
    "L1 not marked late": (
        lambda: Story().sent().log(A, "timed_out", reason="ttl").answers("executed").ended(),
        "L1: cmd_a: executed after timed_out is not marked late",
    ),
    "L2 an event after the end": (
        lambda: Story().sent().answers("executed").ended().log(A, "timed_out", reason="ttl"),
        "L2: cmd_a: timed_out after its final executed",
    ),
    "L4 closed too late": (
        lambda: (
            Story()
            .created(expires_at=1100)
            .well(1000, 99_000)
            .log(A, "expired")
            .change(2, recorded_at=17_000)
        ),
        "L4: cmd_a: expired came 15900 ms after it was due",
    ),
    "L4 no result, and nobody gave up": (
        lambda: Story().sent().ended(event="acknowledged").answers("acknowledged").well(1000, 99_000),
        "L4: cmd_a is acknowledged at the end, 98000 ms after the faults stopped",
    ),
    "L4 never handed over": (
        lambda: Story().created().well(1000, 99_000),
        "L4: cmd_a is pending at the end, 98000 ms after the faults stopped",
    ),
    "D1 never recorded": (
        lambda: Story().created().wire(),
        "D1: cmd_a attempt 1 was sent and never recorded as published",
    ),
    "D1 sent before durable": (
        lambda: Story().created().published(durable=False).wire().durable(),
        "D1: cmd_a attempt 1 was sent before its event was durable",
    ),
    "D1 a bare payload too many": (
        lambda: Story().created().published().wire(None).wire(None).published(attempt=2),
        "D1: publish 2 on iotee/dev/hw1/rls has no durable event before it",
    ),
    "D3 executed twice": (lambda: Story().sent().executes().executes(), "D3: hw1 executed cmd_a 2 times"),
    "D3 sent twice": (
        lambda: Story().defined(repeatable=False).sent().published(attempt=2),
        "D3: cmd_a is not repeatable and was sent 2 times",
    ),
    "D4 sent after its time": (
        lambda: Story().created(expires_at=1007).published().puback("x").puback("x").puback("x").wire(),
        "D4: cmd_a attempt 1 was sent 0 ms after it expired",
    ),
    "D6 the later one first": (
        lambda: Story().sent(A).sent(B).executes(B).executes(A),
        "D6: hw1 executed cmd_a after cmd_b, which was created later",
    ),
    "D8 sent after its end": (
        lambda: Story().sent().log(A, "timed_out", reason="ttl").wire(),
        "D8: cmd_a attempt 1 was sent after it was closed",
    ),
    "A1 PUBACK before the event": (
        lambda: Story().sent().answers("executed").ended(durable=False).puback("executed").durable(),
        "A1: cmd_a: executed got its PUBACK while only published was durable",
    ),
    "A1 a late answer dropped": (
        lambda: Story().sent().log(A, "timed_out", reason="no_answer").puback("failed"),
        "A1: cmd_a: failed got its PUBACK while only timed_out was durable",
    ),
    "A2 an answer that its device never sent": (
        lambda: Story().sent().answers("executed", hardware_id="hw2").ended(),
        "A2: cmd_a: 1 executed events of 0 answers",
    ),
    "A2 one report recorded twice": (
        lambda: (
            Story()
            .sent()
            .answers("progress")
            .answers("progress")
            .ended(event="progressed", percent=5)
            .ended(event="progressed", percent=5)
        ),
        "A2: cmd_a: the same progressed was recorded twice",
    ),
    "R8 retried while open": (
        lambda: Story().sent().created(B, retry_of=A),
        "R8: cmd_b retries cmd_a, which was published",
    ),
    "D9 known offline": (
        lambda: Story().defined(presence="required").log("device/dev_1", "offline").sent(),
        "D9: cmd_a was handed over at position 4, its device offline",
    ),
    "D10 done before its PUBACK": (
        lambda: Story().defined(completes_on="published").sent().log(A, "executed", evidence="mqtt_puback"),
        "D10: cmd_a was completed before the MQTT server accepted it",
    ),
    "D12 more counting attempts than twice the maximum": (
        lambda: (
            Story()
            .defined(max_attempts=1)
            .created()
            .published(attempt=1)
            .published(attempt=2)
            .published(attempt=3, counts=False)
            .published(attempt=4)
        ),
        "D12: cmd_a has 3 counting attempts, at most 2 are allowed",
    ),
    "A3 an answer to what was before": (
        lambda: (
            Story()
            .created()
            .answers("executed", command_id=None)
            .published()
            .wire()
            .ended(evidence="inferred")
        ),
        "A3: cmd_a: executed was inferred from an answer older than the command",
    ),
    "R9 a report forgotten": (
        lambda: Story().sent().report(A, "executed"),
        "R9: a report on cmd_a was answered 200 before it was durable",
    ),
    "D1 fetched before durable": (
        lambda: Story().created().published(durable=False, transport="relay").fetched().durable(),
        "D1: cmd_a attempt 1 was sent before its event was durable",
    ),
    "D1 fetched by another way than recorded": (
        lambda: Story().created().published(transport="heartbeat").fetched(),
        "D1: cmd_a attempt 1 was sent and never recorded as published",
    ),
    "D3 fetched twice": (
        lambda: Story().defined(repeatable=False).created().published(transport="relay").fetched().fetched(),
        "D3: cmd_a is not repeatable and was sent 2 times",
    ),
    "D11 a lease cut short": (
        lambda: leased().published(attempt=2).change(4, recorded_at=20_000),
        "D11: cmd_a: attempt 2 came 41005 ms before the lease's end",
    ),
    "A6 a stranger": (
        lambda: Story().sent().answers("executed").ended(evidence="relay_report"),
        "A6: cmd_a: executed was reported by a relay that never fetched the command",
    ),
    "A5 nobody could hear": (
        lambda: Story().log("system", "started").sent().log(A, "timed_out", reason="no_answer"),
        "A5: cmd_a timed out before the link was up once",
    ),
    "E1 a delete that nobody recorded": (
        lambda: closed().call("erase", 200, A),
        "E1: the delete of cmd_a was answered 200 before it was durable",
    ),
    "E1 a purge that nobody recorded": (
        lambda: closed().log("erasures", "erased", ids=[A], count=1).call("purge", 200),
        "E1: a purge was answered 200 before it was durable",
    ),
    "E2 it was read afterwards": (
        lambda: closed().log("erasures", "erased", ids=[A], count=1).call("read", 200, A),
        "E2: read answered 200 with cmd_a, which was erased",
    ),
    "E2 it was among others afterwards": (
        lambda: closed().log("erasures", "erased", cutoff=90_000, count=1).lists(A),
        "E2: list answered 200 with cmd_a, which was erased",
    ),
    "E2 it was retried afterwards": (
        lambda: closed("timed_out").log("erasures", "erased", ids=[A], count=1).created(B, retry_of=A),
        "E2: cmd_b retries cmd_a, which was erased",
    ),
    "E3 nobody asked": (
        lambda: closed().erase(1),
        "E3: cmd_a has lost its data without an erasure",
    ),
    "E3 it was open when the purge came": (
        lambda: Story().sent().log("erasures", "erased", cutoff=90_000).ended().erase(1),
        "E3: cmd_a has lost its data without an erasure",
    ),
    "E3 it went on": (
        lambda: closed("timed_out").log("erasures", "erased", ids=[A], count=1).ended(),
        "E3: cmd_a has a executed after it was erased",
    ),
    "E3 it was never carried out": (
        lambda: closed().log("erasures", "erased", cutoff=90_000, count=1).well(1000, 99_000),
        "E3: cmd_a was erased and still has data",
    ),
    "R1 an answer to many that is nowhere": (
        lambda: many(Story(), A),
        "R1: cmd_a was answered 200 and is not in the log",
    ),
    "R3 many get two under one key": (
        lambda: many(many(Story().created().created(B), A), B),
        "R3: key k gave hw1 two commands: cmd_a and cmd_b",
    ),
    "R3 many get another's": (
        lambda: many(Story().created(hardware_id="hw2"), A),
        "R3: cmd_a was answered for hw1 but belongs to another device",
    ),
    "R10 one that should have gone": (
        lambda: Story().created(collapse_key="c").created(B, collapse_key="c"),
        "R10: cmd_a was still pending when cmd_b replaced it",
    ),
    "R10 gone without a successor": (
        lambda: Story().created().log(A, "cancelled", by="broker", superseded_by=B),
        "R10: cmd_a was replaced by cmd_b, which is not in the log",
    ),
    "R10 gone for nothing": (
        lambda: Story().created().log(A, "cancelled", by="broker", superseded_by=B).created(B),
        "R10: cmd_a was replaced by cmd_b, which may not replace it",
    ),
    "R10 gone too early": (
        lambda: (
            Story()
            .created(collapse_key="c")
            .log(A, "cancelled", by="broker", superseded_by=B)
            .created(B, collapse_key="c")
        ),
        "R10: cmd_a was replaced by cmd_b in another commit",
    ),
    "S1 a gap": (lambda: Story().created().change(1, position=2), "S1: found position 2 where 1 was due"),
    "S1 time falls": (
        lambda: Story().created().published().change(2, recorded_at=1),
        "S1: recorded_at falls at position 2",
    ),
    "S1 shorter than it was": (
        lambda: Story().created().published().dump().without_last(),
        "S1: the log had 2 events and later 1",
    ),
    "S1 rewritten": (
        lambda: Story().created().dump().change(1, data={"hardware_id": "hw2"}),
        "S1: the event at position 1 was changed",
    ),
    "S2 a version twice": (
        lambda: Story().created().published().change(2, version=1),
        "S2: cmd_a has versions [1, 1]",
    ),
    "S5 never": (lambda: hooked().hook(1).delivered(), f"S5: {URL} never got position 2, of dev_1"),
    "S5 not taken": (
        lambda: hooked().hook(1).hook(2, taken=False).delivered(),
        f"S5: {URL} never got position 2, of dev_1",
    ),
    "S5 out of order": (
        lambda: hooked().hook(1, taken=False).hook(2),
        f"S5: {URL} got position 2 before 1 of the same device was taken",
    ),
    "S5 too early": (
        lambda: hooked().log(A, "acknowledged", durable=False).hook(1).hook(2).hook(3).durable(),
        f"S5: {URL} got position 3 before it was durable",
    ),
    "S5 invented": (
        lambda: hooked().hook(1).hook(2).hook(3, "ordain.command.executed.v1"),
        f"S5: {URL} got ordain.command.executed.v1 at position 3, which is not wanted or not in the log",
    ),
    "S5 another id": (
        lambda: hooked().hook(1).hook(1, id="other"),
        f"S5: {URL} got position 1 under two ids",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_correct_history_has_no_violation(name: str) -> None:
    assert check(RIGHT[name]().dump().history) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_is_named(name: str) -> None:
    story, sentence = WRONG[name]

    assert sentence in check(story().dump().history)


def test_rebuilt_projections_must_equal_the_incremental_ones() -> None:
    kept = {"commands": [("cmd_a", "executed")], "devices": []}

    assert s4(kept, kept) == []
    assert s4(kept, {**kept, "devices": [("dev_1",)]}) == ["S4: devices has 0 rows and rebuilt 1"]
    assert s4(kept, {**kept, "commands": [("cmd_a", "failed")]}) == [
        "S4: commands has ('cmd_a', 'executed') and rebuilt ('cmd_a', 'failed')"
    ]


def test_an_event_is_durable_from_the_first_commit_that_covers_it() -> None:
    story = Story().log(A, "created", durable=False).log(A, "published", durable=False).durable().dump()
    facts = Facts(story.history)

    assert {facts.durable(row) for row in story.rows} == {story.history.commits[0].seq}
