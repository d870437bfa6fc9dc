"""The core against a small model of the contract: in any order of events its promises hold.

Everything is real except the far end of the link, which is the test. Time is virtual; the disk is in memory
under real SQLite. The model uses the contract's transitions and not the code's table. For a longer run set
`ORDAIN_MODEL_EXAMPLES=2000`.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.core import Core
from broker.domain.errors import Refusal, Unavailable
from broker.engine.registry import NewDevice
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.seams import Message, Outgoing, Receipt
from projections import commands as commands_view
from projections import follower
from tests.integration.core_support import ME, PROJECT, TAKEN, UNKNOWN, Bench, Wire, new_core
from tests.reading import plain
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import Node, SimClock, SimLoop
from tests.unit.domain.test_lifecycle import CONTRACT

T = TypeVar("T")

EXAMPLES = int(os.environ.get("ORDAIN_MODEL_EXAMPLES", "0"))
# Shrinking a failure takes minutes, so only the longer run does it.
PHASES = (Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,)
pytestmark = pytest.mark.timeout(0 if EXAMPLES else 900)
settings.register_profile(
    "model",
    max_examples=EXAMPLES or 250,
    stateful_step_count=60,
    derandomize=not EXAMPLES,
    phases=PHASES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SETTLE_SEC = 0.1
RESULT_SEC, GRACE_SEC, LATE_MS = 60, 15, 20_000
MAX_ATTEMPTS = 5
ENDS = {"executed", "failed", "expired", "cancelled"}
SAID = {"acknowledged": "acknowledged", "progress": "progressed", "executed": "executed", "failed": "failed"}
TEXTS = {b"ack": "acknowledged", b"ok": "executed", b"error": "failed"}
# hardware id -> (its type, {its commands: whether they may be sent again})
DEVICES: dict[str, tuple[str, dict[str, bool]]] = {
    "lamp": ("generic", {"open": True}),
    "lock": ("iotee_device", {"lock": True, "reboot": False}),
}
FOLLOWS: dict[str, dict[str, str]] = defaultdict(dict)
for _line in CONTRACT.strip().splitlines():
    _event, _states, _gives = [part.strip() for part in _line.split("|")]
    for _state in _states.split(", "):
        FOLLOWS[_state][_event] = _gives

names = st.sampled_from(sorted(DEVICES))
picks = st.integers(0, 1_000)
rarely = st.sampled_from([False, False, False, True])


class Seen:
    """One command as the log, the wire and its requests show it."""

    def __init__(self, row: Row) -> None:
        data = msgspec.json.decode(row.data or b"")
        self.id, self.position = row.stream, row.position
        self.device, self.type = data["hardware_id"], data["type"]
        self.expires_at: int | None = data.get("expires_at")
        self.state, self.changed_at, self.reopened = "pending", row.recorded_at, False
        self.events: list[str] = []
        self.sent: list[int] = []
        self.counted = 0
        self.vain = 0  # attempts that the MQTT server refused or had nobody to give to
        self.more_attempts = 0  # each restart and each attempt that does not count adds one

    def add(self, row: Row) -> None:
        assert row.type in FOLLOWS[self.state if self.events else "none"], f"{row.type} after {self.events}"
        if row.type == "failed" and self.state == "pending":
            assert b'"by":"broker"' in (row.data or b"")
        late = self.state == "timed_out"
        self.state = FOLLOWS[self.state if self.events else "none"][row.type]
        self.reopened = self.state == "acknowledged" and (late or self.reopened)
        self.events.append(row.type)
        self.changed_at = row.recorded_at

    @property
    def closed(self) -> bool:
        return self.state in ENDS or self.state == "timed_out"


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = SimLoop(0)
        self.disk = SimDisk(self.loop)
        self.clock = SimClock(self.loop)
        self.rows: list[Row] = []
        self.folded = follower.Fold()
        self.to_fold: list[Row] = []
        self.kept: dict[str, Any] | None = None  # the projections, until the next commit or start
        self.commands: dict[str, Seen] = {}
        self.ended: dict[str, str] = {}
        self.called_off: set[str] = set()
        self.promised: set[str] = set()
        self.online: set[str] = set()
        self.linked = True
        self.last: tuple[str, bytes] | None = None
        self.lives = 0
        self.start()

    # --- the world

    def start(self) -> None:
        self.lives += 1
        self.kept = None
        self.node, self.wire = Node(f"broker-{self.lives}"), Wire()
        self.wire.on_publish = self.published
        self.started: list[Bench] = []
        self.serving = self.loop.spawn(self.node, self.serve(self.wire, self.started))
        while not self.started:
            self.settle(0.01)
        self.wire.up = self.linked
        if self.linked:
            self.core().intake.link_up()
        for hardware_id in sorted(self.online):
            self.core().intake.device_online(hardware_id)
        self.settle()

    async def serve(self, wire: Wire, started: list[Bench]) -> None:
        storage = SimStorage(self.loop, self.disk, on_commit=self.committed)
        core = new_core(storage, self.clock, seed=self.lives)
        await core.open(embedded=True)
        kept = await storage.read(log.all_rows)
        assert kept[: len(self.rows)] == self.rows
        wire.up = False
        core.attach(wire)
        async with core.running("embedded"):
            started.append(Bench(core, wire))
            await asyncio.Event().wait()

    def settle(self, seconds: float = SETTLE_SEC) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        assert not self.loop.unhandled, self.loop.unhandled
        if self.serving.done():
            self.serving.result()

    def ask(self, request: Coroutine[Any, Any, T]) -> T | None:
        """The answer to a request; None if it was refused or the log could not be written."""

        async def asked() -> T | None:
            try:
                return await request
            except (Refusal, Unavailable):
                return None

        answer = self.loop.run_until_complete(self.loop.spawn(self.node, asked()))
        self.settle()
        return answer

    def core(self) -> Core:
        return self.started[0].core

    def committed(self, connection: Any) -> None:
        self.kept = None
        for row in read_now(connection, log.rows, len(self.rows), 100_000):
            self.rows.append(row)
            self.to_fold.append(row)
            if row.stream.startswith("cmd_"):
                if row.type == "created":
                    self.commands[row.stream] = Seen(row)
                seen = self.commands[row.stream]
                seen.add(row)
                seen.counted += row.type == "published" and b'"counts":false' not in (row.data or b"")

    def published(self, outgoing: Outgoing) -> None:
        """Checks every publish at the moment its bytes leave: D1, D4, D6, D8, R6, sent once, and numbers of
        attempts."""
        seen = self.commands[(outgoing.correlation or b"").decode()]
        attempt = int(dict(outgoing.user_properties)["attempt"])
        assert seen.events.count("published") >= attempt, "D1: published is durable before the bytes leave"
        assert attempt > max(seen.sent, default=0), "every attempt is sent once, in order"
        assert seen.expires_at is None or self.core().writer.now() < seen.expires_at, "D4"
        assert not seen.closed, "D8: nothing is sent after a closing event"
        assert seen.state != "acknowledged", "an acknowledged command is never sent again"
        assert seen.id not in self.called_off, "R6: a cancelled command is never handed over"
        if not seen.sent:
            later = [
                c for c in self.commands.values() if c.device == seen.device and c.position > seen.position
            ]
            assert not any(command.sent for command in later), "D6: in order of creation"
        seen.sent.append(attempt)
        assert len(seen.sent) == 1 or DEVICES[seen.device][1][seen.type], (
            "a non-repeatable command is sent once"
        )
        assert seen.counted <= MAX_ATTEMPTS + seen.more_attempts, "attempts that count are limited"

    def known(self, *states: str) -> list[Seen]:
        found = sorted(self.commands.values(), key=lambda command: command.position)
        return [command for command in found if not states or command.state in states]

    # --- what can happen

    @initialize()
    def devices(self) -> None:
        for hardware_id, (kind, _) in DEVICES.items():
            new = NewDevice(hardware_id=hardware_id, type=kind, project=PROJECT)
            assert self.ask(self.core().registry.register(ME, new)) is not None
        self.comes_or_goes("lamp", True)

    @rule(
        hardware_id=names,
        picked=st.lists(picks, min_size=1, max_size=3),
        ttl_sec=st.sampled_from([None, None, 3, 30]),
    )
    def create(self, hardware_id: str, picked: list[int], ttl_sec: int | None) -> None:
        kinds = sorted(DEVICES[hardware_id][1])
        for pick in picked:
            made = self.ask(self.started[0].order(hardware_id, kinds[pick % len(kinds)], ttl_sec=ttl_sec))
            if made is not None:
                self.promised.add(made.id)

    @precondition(lambda self: self.wire.due)
    @rule(pick=picks, reason=st.sampled_from([0, 0, 0x10, 0x87, 0x97, None]))
    def receipt(self, pick: int, reason: int | None) -> None:
        outgoing, done = self.wire.due.pop(pick % len(self.wire.due))
        seen = self.commands[(outgoing.correlation or b"").decode()]
        seen.more_attempts += reason == 0x10
        seen.vain += bool(reason)
        done(Receipt(written=True, reason=reason))
        self.settle()

    @precondition(lambda self: self.commands)
    @rule(pick=picks, status=st.sampled_from(sorted(SAID)), value=st.integers(0, 2))
    def answer(self, pick: int, status: str, value: int) -> None:
        """Answers with an id, in any state: early, in time, twice, late, after the end."""
        flying = self.known("published", "acknowledged", "timed_out")
        known = flying if flying and pick % 3 else self.known()
        seen = known[-1 - pick % min(4, len(known))]
        said = {"id": seen.id, "status": status, "result": value, "progress": {"percent": value}}
        may = SAID[status] in FOLLOWS[seen.state] and seen.state != "pending"
        self.say(seen.device, msgspec.json.encode(said), seen, SAID[status] if may else None)

    @rule(statuses=st.lists(st.sampled_from(["acknowledged", "executed", "failed"]), min_size=1, max_size=4))
    def devices_work(self, statuses: list[str]) -> None:
        """Answers all handed-over commands, so that the lanes continue."""
        for status in statuses:
            for seen in self.known("published", "acknowledged"):
                may = SAID[status] in FOLLOWS[seen.state]
                said = msgspec.json.encode({"id": seen.id, "status": status})
                self.say(seen.device, said, seen, SAID[status] if may else None)
            self.settle(1.2)

    @rule(pick=picks, text=st.sampled_from(sorted(TEXTS)))
    def text(self, pick: int, text: bytes) -> None:
        """A bare answer of the lock: belongs to the only candidate, or to none."""
        now = self.core().writer.now()
        means = [c for c in self.known("published", "acknowledged") if c.device == "lock"]
        means += [c for c in self.known("timed_out") if c.device == "lock" and now < c.changed_at + LATE_MS]
        one = means[0] if len(means) == 1 else None
        if one is not None and len(one.sent) <= one.vain:
            one = None  # no device got it: the broker may know that, or have forgotten it in a restart
        for outgoing, done in [due for due in self.wire.due if one is not None]:
            # Before the MQTT server has confirmed a command, no answer can be to it.
            if one is not None and (outgoing.correlation or b"").decode() == one.id:
                self.wire.due.remove((outgoing, done))
                done(TAKEN)
                self.settle()
        event = SAID[TEXTS[text]]
        self.say("lock", text, one, event if one is not None and event in FOLLOWS[one.state] else None)

    @precondition(lambda self: self.last is not None)
    @rule()
    def answer_twice(self) -> None:
        assert self.last is not None
        if self.last[1] not in TEXTS:
            seen = self.commands[msgspec.json.decode(self.last[1])["id"]]
            before = seen.events if seen.state in ENDS else None
            self.say(*self.last, None, None)
            assert before is None or seen.events == before

    def say(self, hardware_id: str, payload: bytes, seen: Seen | None, expected: str | None) -> None:
        """Delivers an answer and checks that exactly the expected event follows, or none."""
        self.last = hardware_id, payload
        head, state = len(self.rows), seen.state if seen is not None else ""
        told = set(seen.events) if seen is not None else set()
        if expected == "acknowledged" and told & {"acknowledged", "progressed"}:
            expected = None  # a copy of a recorded answer
        unsure = expected == "progressed" and (state == "acknowledged" or "progressed" in told)
        was_open = self.core().writer.open and self.disk.capacity is None
        self.core().intake.message(Message(topic=f"iotee/dev/{hardware_id}/ack", payload=payload))
        self.settle()
        answers = [(row.stream, row.type) for row in self.rows[head:] if row.type in SAID.values()]
        answers = [entry for entry in answers if entry[1] != "failed" or state != "pending"]
        if was_open and seen is not None and not unsure:
            assert answers == ([] if expected is None else [(seen.id, expected)])

    @rule(seconds=st.sampled_from([0.5, 2.0, 11.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.settle(seconds)

    @rule()
    def next_deadline(self) -> None:
        at = self.core().deadlines.next()
        if at is not None:
            self.settle(max(0, at - self.core().writer.now()) / 1_000 + SETTLE_SEC)

    @precondition(lambda self: self.commands)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        known = self.known("pending", "cancelled") or self.known()
        seen = known[pick % len(known)]
        done = self.ask(self.core().commands.cancel(ME, seen.id))
        if done is not None:
            assert done.state == "cancelled"
            assert not seen.sent
            self.called_off.add(seen.id)

    @precondition(lambda self: self.commands)
    @rule(pick=picks)
    def abandon(self, pick: int) -> None:
        known = self.known("published", "acknowledged") or self.known()
        seen = known[pick % len(known)]
        before = seen.state
        done = self.ask(self.core().commands.abandon(ME, seen.id))
        assert done is None or before in ("published", "acknowledged", "timed_out")

    @precondition(lambda self: self.commands)
    @rule(pick=picks)
    def retry(self, pick: int) -> None:
        """Only a command that ended without success can be retried."""
        known = self.known("failed", "timed_out", "expired", "cancelled") or self.known()
        seen = known[pick % len(known)]
        made = self.ask(self.core().repairs.retry(ME, seen.id))
        if made is not None:
            assert seen.closed
            assert seen.state != "executed" or "timed_out" in seen.events
            assert (made.state.retry_of, made.state.type) == (seen.id, seen.type)
            self.promised.add(made.state.id)

    @rule(hardware_id=names, now=rarely)
    def comes_or_goes(self, hardware_id: str, now: bool) -> None:
        if hardware_id in self.online:
            if not now:
                return
            self.online.remove(hardware_id)
            self.core().intake.device_offline(hardware_id)
            for seen in self.known("published"):
                seen.more_attempts += seen.device == hardware_id
        else:
            self.online.add(hardware_id)
            self.core().intake.device_online(hardware_id)
        self.settle()

    @rule(now=rarely)
    def link_goes_or_comes(self, now: bool) -> None:
        if self.linked and not now:
            return
        self.linked = self.wire.up = not self.linked
        if self.linked:
            self.core().intake.link_up()
        else:
            self.core().intake.link_down("the model says so")
            while self.wire.due:
                self.wire.receipt(UNKNOWN)
        self.settle()

    @rule(now=rarely)
    def disk_is_full_or_not(self, now: bool) -> None:
        if self.disk.capacity is None and not now:
            return
        self.disk.capacity = 0 if self.disk.capacity is None else None
        self.settle(0.1 if self.disk.capacity == 0 else 2.5)

    @rule(hardware_id=names, after_ms=st.integers(0, 15), power=st.booleans(), now=rarely)
    def crash(self, hardware_id: str, after_ms: int, power: bool, now: bool) -> None:
        """Crashes the broker during a create, `after_ms` after its start."""
        if not now:
            return
        self.disk.capacity = None
        kind = sorted(DEVICES[hardware_id][1])[0]
        asked = self.loop.spawn(self.node, self.started[0].order(hardware_id, kind, ttl_sec=30))
        self.settle(after_ms / 1_000)
        if asked.done() and asked.exception() is None:
            self.promised.add(asked.result().id)
        self.loop.kill(self.node)
        if power:
            self.disk.lose_power()
        for seen in self.known("published"):
            seen.more_attempts += 1
        self.start()

    # --- what always holds

    @invariant()
    def promises_hold(self) -> None:
        assert [row.position for row in self.rows] == list(range(1, len(self.rows) + 1)), "S1"
        assert self.promised <= self.commands.keys(), "R1"
        for seen in self.commands.values():
            if seen.state in ENDS:
                assert self.ended.setdefault(seen.id, seen.state) == seen.state, "L3"
        for hardware_id in DEVICES:
            held = [
                c
                for c in self.known("published", "acknowledged")
                if c.device == hardware_id and not c.reopened
            ]
            assert len(held) <= 1, "the window"

    @invariant()
    def memory_projections_and_log_agree(self) -> None:
        """Checks L6, S3 and S4."""
        if not self.core().writer.open or self.disk.capacity is not None:
            return
        if self.kept is None or self.core().writer._last() is not None:
            self.kept = self.look()
        kept = self.kept
        touched = self.folded
        for row in self.to_fold:
            touched.fold(log.recorded(row))
        self.to_fold.clear()
        bodies = {row[0]: row[-1] for row in kept["projections.commands"]}
        assert bodies == {
            self.commands[name].position: commands_view.later(state)
            for name, state in touched.commands.items()
        }
        assert {name: seen.state for name, seen in self.commands.items()} == {
            name: state.state for name, state in touched.commands.items()
        }
        for name, member in self.core().live.members.items():
            assert commands_view.later(member.state) == bodies[self.commands[name].position]
            assert msgspec.json.encode(member.state) == msgspec.json.encode(touched.commands[name])
        lane = sorted(row[0] for row in kept["projections.commands"] if row[6] is None)
        assert lane == [seen.position for seen in self.known() if not seen.closed]

    def look(self) -> dict[str, Any]:
        """The projections at a moment without writes on the way to the disk."""
        writer = self.core().writer
        while True:
            self.ask(writer.barrier())
            look = plain(lambda sql: (read_now(sql, follower.dump), read_now(sql, log.head)))
            found: tuple[dict[str, Any], log.Head] = self.read(look)
            if found[1].position == len(self.rows) and writer._last() is None:
                return found[0]

    def read(self, work: Any) -> Any:
        found = self.loop.run_until_complete(
            self.loop.spawn(self.node, self.core().writer.storage.read(work))
        )
        assert not self.loop.unhandled, self.loop.unhandled
        return found

    def teardown(self) -> None:
        """L4: once faults stop, every command that has an expiry or was acknowledged ends."""
        try:
            if self.started:
                self.disk.capacity = None
                self.settle(2.5)
                if not self.linked:
                    self.link_goes_or_comes(True)
                for hardware_id in sorted(DEVICES.keys() - self.online):
                    self.comes_or_goes(hardware_id, True)
                self.settle(RESULT_SEC + 30 + GRACE_SEC)
                self.kept = None
                self.memory_projections_and_log_agree()
                self.promises_hold()
                assert self.read(log.verify).fault is None  # a fault of the chain stays until the end
                ended = [c for c in self.known("pending", "published") if c.expires_at is not None]
                assert [c.id for c in ended] == []
                assert [c.id for c in self.known("acknowledged")] == []
        finally:
            self.loop.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


TestModel = Model.TestCase
TestModel.settings = settings.get_profile("model")


def test_the_models_receipts_equal_those_of_the_seam() -> None:
    assert (TAKEN.reason, UNKNOWN.reason) == (0, None)
