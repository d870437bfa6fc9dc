"""Commands through the running core: requests, hand-overs, answers and timers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.core import KEYS_AT_ONCE
from broker.domain.errors import Refusal
from broker.domain.events import Changed
from broker.domain.lanes import Presence
from broker.engine.commands import Caller, Order
from broker.log import sqlite as log
from broker.seams import Message, New, Receipt
from broker.settings import Limits
from broker.world import SqliteStorage
from projections import follower
from tests.integration.core_support import (
    ME,
    PROJECT,
    TAKEN,
    Bench,
    on_virtual_time,
    running,
    simulated,
    until,
)
from tests.reading import plain
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import SimClock, SimLoop

STRANGER = Caller(actor="key:key_2", project="other")
NO_SUBSCRIBER, REFUSED, BUSY = (Receipt(written=True, reason=code) for code in (0x10, 0x87, 0x97))

Scene = Callable[[Bench], Awaitable[None]]


def play(scene: Scene, limits: Limits | None = None) -> None:
    """Runs a scene on the virtual clock, then checks the log's chain and compares the projections with
    rebuilt ones."""

    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, limits) as (bench, _):
            await scene(bench)
            await bench.writer.barrier()
            storage = bench.writer.storage
            assert (await storage.read(log.verify)).fault is None
            kept = await storage.read(follower.dump)
            await storage.rebuild()
            assert await storage.read(follower.dump) == kept

    simulated(world)


async def passes(seconds: float) -> None:
    """Lets so many seconds pass; only on the virtual clock."""
    assert isinstance(asyncio.get_running_loop(), SimLoop)
    await asyncio.sleep(seconds)


async def sent(bench: Bench, count: int) -> None:
    await until(lambda: len(bench.wire.sent) >= count, within_sec=3_600)
    assert len(bench.wire.sent) == count


# --- requests


def test_a_create_answers_with_the_created_state_and_hands_over_at_once() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order(params={"a": 1})
        await sent(bench, 1)

        assert (state.state, state.version, state.attempts) == ("pending", 1, 0)
        assert state.expires_at is None, "generic has no default; the interface gives /v1 its own"
        said = msgspec.json.decode(bench.wire.sent[0].payload)
        assert (said["id"], said["params"], said["attempt"]) == (state.id, {"a": 1}, 1)
        assert bench.wire.sent[0].correlation == state.id.encode()
        assert await bench.types(state.id) == ["created", "published"]

    play(scene)


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"device": "nobody"}, "not_found", "nobody"),
    ({"device": "tape-1", "type": "fly"}, "invalid_request", "no command 'fly'"),
    ({"type": "o p"}, "invalid_request", "no command"),
    (
        {"device": "tape-1", "type": "start_recording", "params": {"max_duration_sec": 0}},
        "invalid_request",
        "params",
    ),
    ({"device": "tape-1", "type": "start_recording", "params": {"speed": 1}}, "invalid_request", "params"),
    ({"device": "tape-1", "type": "start_recording", "params": [1]}, "invalid_request", "must be an object"),
    ({"ttl_sec": 0}, "invalid_request", "ttl_sec"),
    ({"ttl_sec": 31_536_001}, "invalid_request", "ttl_sec"),
    ({"device_type": "toaster"}, "invalid_request", "device_type"),
    ({"params": {"text": "x" * 65_536}}, "too_large", "65536"),
]


@pytest.mark.parametrize(("fields", "kind", "says"), REFUSALS)
def test_a_refused_request_names_the_fault_and_leaves_no_event(
    fields: dict[str, Any], kind: str, says: str
) -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        await bench.device("tape-1", "recorder")
        before = await bench.rows()
        with pytest.raises(Refusal, match=says) as refused:
            await bench.order(**fields)
        assert refused.value.kind == kind
        assert await bench.rows() == before

    play(scene)


def test_another_project_sees_neither_devices_nor_commands() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order()
        for request in (
            bench.core.commands.create(STRANGER, Order(device="lamp-1", type="open")),
            bench.core.commands.cancel(STRANGER, state.id),
            bench.core.commands.abandon(STRANGER, state.id),
        ):
            with pytest.raises(Refusal) as refused:
                await request
            assert refused.value.kind == "not_found"

    play(scene)


def test_a_full_queue_refuses_and_accepts_again_when_a_place_is_free() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device(online=False)
        first = await bench.order()
        await bench.order()
        with pytest.raises(Refusal, match="2 of them open"):
            await bench.order()
        await bench.order(type="close")
        with pytest.raises(Refusal, match="3 open commands"):
            await bench.order(type="other")
        await bench.core.commands.cancel(ME, first.id)
        await bench.order()

    play(scene, Limits(queue_per_name=2, queue_per_device=3))


async def test_32_requests_with_one_key_make_one_command(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        same = [bench.accepted(idempotency_key="k", fingerprint=b"body") for _ in range(32)]
        answers = await asyncio.gather(*same)
        assert len({answer.state.id for answer in answers}) == 1
        assert sorted(answer.replayed for answer in answers) == [False] + [True] * 31
        with pytest.raises(Refusal) as refused:
            await bench.accepted(idempotency_key="k", fingerprint=b"other body")
        assert refused.value.kind == "idempotency_conflict"
    storage = await SqliteStorage.open(tmp_path)
    async with running(storage, seed=2) as bench:
        again = await bench.accepted(idempotency_key="k", fingerprint=b"body")
        assert (again.replayed, again.state.id) == (True, answers[0].state.id)
    await storage.close()


def test_only_a_command_not_handed_over_is_cancelled_and_a_cancel_may_be_repeated() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device(online=False)
        waiting = await bench.order()
        for _ in range(2):
            assert (await bench.core.commands.cancel(ME, waiting.id, "wrong lamp")).state == "cancelled"
        assert await bench.types(waiting.id) == ["created", "cancelled"]
        bench.core.intake.device_online("lamp-1")
        flying = await bench.order()
        await sent(bench, 1)
        with pytest.raises(Refusal, match="is published, it was handed over"):
            await bench.core.commands.cancel(ME, flying.id)
        with pytest.raises(Refusal, match="no command 'cmd_0'"):
            await bench.core.commands.cancel(ME, "cmd_0")

    play(scene)


def test_abandon_ends_a_handed_over_command_and_frees_the_lane() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        stuck, next_ = await bench.order(), await bench.order()
        await sent(bench, 1)
        with pytest.raises(Refusal, match="cancel it"):
            await bench.core.commands.abandon(ME, next_.id)
        for _ in range(2):
            assert (await bench.core.commands.abandon(ME, stuck.id)).state == "timed_out"
        await bench.becomes(next_.id, "published")
        assert (await bench.types(stuck.id))[-1] == "timed_out"

    play(scene)


# --- answers


def test_a_lane_continues_after_every_kind_of_end() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        states = [await bench.order() for _ in range(3)]
        for number, (state, end) in enumerate(
            zip(states, ("executed", "failed", "executed"), strict=True), start=1
        ):
            await sent(bench, number)
            bench.answers(state.id, "acknowledged")
            bench.answers(state.id, end)
            await bench.becomes(state.id, end)
        order = [msgspec.json.decode(out.payload)["id"] for out in bench.wire.sent]
        assert order == [state.id for state in states]

    play(scene)


@pytest.mark.parametrize("percent", [0, 50, 50.5, 100])
def test_progress_in_whole_percent_folds_to_the_same_bytes(percent: float) -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order()
        await sent(bench, 1)
        bench.answers(state.id, "progress", progress={"percent": percent})
        await bench.becomes(state.id, "acknowledged")

    play(scene)


def test_an_unmatched_answer_is_kept_with_its_reason_and_changes_nothing() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        await bench.device("lamp-2")
        state = await bench.order()
        waiting = await bench.order()
        await sent(bench, 1)
        bench.answers(state.id, hardware_id="lamp-2")
        bench.answers("cmd_unknown")
        bench.answers(waiting.id)
        bench.says(b"\xff\x00")
        bench.says(b'{"status":"executed"}', "lamp-9")
        bench.core.intake.message(Message(topic="iotee/dev/../ack", payload=b"{}"))
        bench.answers(state.id, result=1)
        bench.answers(state.id, result=2)
        bench.answers(state.id, "failed")
        await until(lambda: len(bench.wire.pubacks) == 9)

        assert await bench.unmatched() == [
            "wrong_device", "unknown", "never_handed_over", "malformed", "unknown_device", "unknown_device",
            "contradiction", "contradiction",
        ]  # fmt: skip
        assert (await bench.types(state.id))[-1] == "executed"

    play(scene)


def test_copies_of_an_answer_give_one_event_and_pubacks_go_out_in_order() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order()
        await sent(bench, 1)
        copies = [
            bench.answers(state.id, status, result={"n": 1}) for status in ["acknowledged", "executed"] * 5
        ]
        await until(lambda: len(bench.wire.pubacks) == 10)
        assert bench.wire.pubacks == copies
        assert await bench.types(state.id) == ["created", "published", "acknowledged", "executed"]

    play(scene)


def test_an_answer_without_id_belongs_to_the_only_candidate_as_inferred() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("lock-1", "iotee_device")
        state = await bench.order("lock-1", "lock")
        next_ = await bench.order("lock-1", "unlock")
        await sent(bench, 1)
        bench.wire.receipt()
        for text in (b"ack", b"ok"):
            bench.says(text, "lock-1")
        done = await bench.becomes(state.id, "executed")
        bench.says(b"ok", "lock-1")
        await until(lambda: len(bench.wire.pubacks) == 3)
        assert bench.state(next_.id) == "pending", "a doubled ok must not complete the next"
        assert await bench.unmatched() == ["nothing_in_flight"]
        await sent(bench, 2)
        assert bench.writer.now() >= (done.closed_at or 0) + 1_000

    play(scene)


def test_after_a_restart_a_second_answer_without_id_does_not_end_the_next_command() -> None:
    async def world(loop: SimLoop) -> None:
        disk = SimDisk(loop)
        async with running(SimStorage(loop, disk), SimClock(loop)) as bench:
            await bench.device(type="iotee_device")
            lock = await bench.order(type="lock")
            await sent(bench, 2)
            bench.says(b"ok")
            await bench.becomes(lock.id, "executed")
        async with running(SimStorage(loop, disk), SimClock(loop)) as bench:
            unlock = await bench.order(type="unlock")
            await passes(5)
            bench.says(b"ok")
            await until(lambda: len(bench.wire.pubacks) == 1)

            assert await bench.unmatched() == ["nothing_in_flight"]
            await sent(bench, 1)
            bench.wire.receipt()
            bench.says(b"ok")
            await bench.becomes(unlock.id, "executed")

    simulated(world)


def test_an_answer_without_id_is_not_to_a_command_that_the_mqtt_server_does_not_have_yet() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("lock-1", "iotee_device")
        state = await bench.order("lock-1", "lock")
        await sent(bench, 1)
        bench.says(b"ok", "lock-1")  # a late copy of an earlier answer
        await until(lambda: len(bench.wire.pubacks) == 1)
        assert bench.state(state.id) == "published"
        assert await bench.unmatched() == ["ambiguous"]
        bench.wire.receipt()
        bench.says(b"ok", "lock-1")
        await bench.becomes(state.id, "executed")

    play(scene)


def test_the_pause_of_a_lane_without_ids_is_as_long_as_its_link_is_slow() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("lock-1", "iotee_device")
        await bench.order("lock-1", "lock")
        next_ = await bench.order("lock-1", "unlock")
        await sent(bench, 1)
        await passes(4)
        bench.wire.receipt()
        bench.says(b"ok", "lock-1")
        await passes(7)
        bench.says(b"ok", "lock-1")  # the doubled message is answered twice
        await until(lambda: len(bench.wire.pubacks) == 2)
        assert bench.state(next_.id) == "pending"
        assert await bench.unmatched() == ["nothing_in_flight"]
        await sent(bench, 2)

    play(scene)


def test_a_bare_answer_is_read_with_the_type_of_its_command() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("odd-1", "generic")
        state = await bench.order("odd-1", "lock", device_type="iotee_device")
        await sent(bench, 1)
        assert bench.wire.sent[0].payload == b"1"
        bench.wire.receipt()
        bench.says(b"ok", "odd-1")
        await bench.becomes(state.id, "executed")

    play(scene)


def test_a_changed_device_type_does_not_affect_an_open_command() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("lock-1", "iotee_device")
        state = await bench.order("lock-1", "lock")
        await sent(bench, 1)
        await bench.core.registry.change(ME, "lock-1", Changed(device_type="generic"))
        bench.wire.receipt()
        bench.says(b"ok", "lock-1")
        await bench.becomes(state.id, "executed")

    play(scene)


def test_a_late_answer_corrects_a_time_out_and_does_not_block_the_lane() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        late = await bench.order(ttl_sec=5)
        next_ = await bench.order()
        await bench.becomes(late.id, "timed_out")
        await bench.becomes(next_.id, "published")
        bench.answers(late.id, "acknowledged")
        assert (await bench.becomes(late.id, "acknowledged")).reopened
        bench.answers(next_.id)
        third = await bench.order()
        await bench.becomes(third.id, "published")
        bench.answers(late.id)
        assert (await bench.becomes(late.id, "executed")).late

    play(scene)


# --- time


def test_an_unanswered_command_is_sent_again_after_pauses_until_its_last_attempt() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order()
        done = await until_closed(bench, state.id)
        assert (done.state, done.reason, done.attempts) == ("timed_out", "no_answer", 5)
        await sent(bench, 5)
        assert [msgspec.json.decode(out.payload)["attempt"] for out in bench.wire.sent] == [1, 2, 3, 4, 5]

    play(scene)


async def until_closed(bench: Bench, command_id: str) -> Any:
    def closed() -> bool:
        found = bench.live.command(command_id)
        return found is not None and found.closed

    await until(closed, within_sec=86_400)
    await bench.writer.barrier()
    return bench.live.command(command_id)


def test_a_pending_command_expires_on_time_and_a_handed_over_one_times_out() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device(online=False)
        waiting = await bench.order(ttl_sec=30)
        assert (await until_closed(bench, waiting.id)).state == "expired"
        bench.core.intake.device_online("lamp-1")
        flying = await bench.order(ttl_sec=30)
        done = await until_closed(bench, flying.id)
        assert (done.state, done.reason) == ("timed_out", "ttl")
        for state in (waiting, flying):
            closed = bench.live.command(state.id)
            assert closed is not None
            assert 30_000 <= (closed.closed_at or 0) - closed.created_at <= 31_000

    play(scene)


def test_reports_extend_a_command_and_silence_times_it_out() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order(ttl_sec=20)
        await sent(bench, 1)
        for percent in range(4):
            bench.answers(state.id, "progress", progress={"percent": percent})
            await passes(50)
        assert bench.state(state.id) == "acknowledged"
        done = await until_closed(bench, state.id)
        assert (done.state, done.reason, done.attempts) == ("timed_out", "no_result", 1)

    play(scene)


def test_a_non_repeatable_command_is_sent_once_and_ends_without_a_subscriber_too() -> None:
    async def scene(bench: Bench) -> None:
        for number, receipt in enumerate((None, TAKEN, NO_SUBSCRIBER, BUSY), start=1):
            name = f"lock-{number}"
            await bench.device(name, "iotee_device")
            state = await bench.order(name, "reboot", ttl_sec=None)
            next_ = await bench.order(name, "lock")
            await until(lambda n=number: len(bench.wire.due) >= 1)  # type: ignore[misc]
            if receipt is None:
                bench.wire.due.clear()
            else:
                bench.wire.receipt(receipt)
            done = await until_closed(bench, state.id)
            assert (done.state, done.reason, done.attempts) == ("timed_out", "no_answer", 1)
            await bench.becomes(next_.id, "published")
            bench.answers(next_.id, hardware_id=name)
            await until_closed(bench, next_.id)
            bench.wire.due.clear()

    play(scene)


def test_a_publish_that_is_always_refused_fails_and_names_the_mqtt_server() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("lock-1", "iotee_device")
        state = await bench.order("lock-1", "lock")
        await sent(bench, 1)
        bench.wire.receipt(REFUSED)
        done = await until_closed(bench, state.id)
        assert (done.state, done.by, done.error.code) == ("failed", "mqtt_server", "refused")
        mixed = await bench.order("lock-1", "lock", ttl_sec=None)
        await sent(bench, 2)
        bench.wire.receipt(BUSY)
        await sent(bench, 3)
        bench.wire.receipt(REFUSED)
        await sent(bench, 4)
        assert bench.state(mixed.id) == "published"

    play(scene)


# --- presence


def test_attempts_to_an_absent_device_do_not_count_and_it_gets_its_command_on_return() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order()
        await sent(bench, 1)
        for round_ in range(2, 8):
            bench.core.intake.device_offline("lamp-1")
            await passes(1_000)
            assert len(bench.wire.sent) == round_ - 1
            bench.core.intake.device_online("lamp-1")
            await sent(bench, round_)
        assert bench.state(state.id) == "published"
        bench.answers(state.id)
        await bench.becomes(state.id, "executed")

    play(scene)


def test_a_type_without_presence_gets_commands_at_any_time() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device("lock-1", "iotee_device", online=False)
        await bench.order("lock-1", "lock")
        await sent(bench, 1)

    play(scene)


# --- the link


def test_without_a_link_commands_wait_and_go_out_when_it_is_back() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        bench.wire.up = False
        bench.core.intake.link_down("test")
        state = await bench.order(ttl_sec=600)
        await passes(60)
        assert (bench.state(state.id), bench.wire.sent) == ("pending", [])
        bench.wire.up = True
        bench.core.intake.link_up()
        await sent(bench, 1)

    play(scene)


def test_a_deadline_that_passed_without_a_link_waits_for_answers_kept_by_the_server() -> None:
    async def scene(bench: Bench) -> None:
        await bench.device()
        state = await bench.order(ttl_sec=20)
        await sent(bench, 1)
        bench.wire.up = False
        bench.core.intake.link_down("test")
        await passes(60)
        assert bench.state(state.id) == "published"
        bench.wire.up = True
        bench.core.intake.link_up()
        await passes(1.5)
        assert bench.state(state.id) == "published"
        bench.answers(state.id)
        await bench.becomes(state.id, "executed")

    play(scene)


def test_a_command_that_only_waits_has_no_flight_in_memory() -> None:
    async def world(loop: SimLoop) -> None:
        disk = SimDisk(loop)
        async with running(SimStorage(loop, disk), SimClock(loop)) as bench:
            device = await bench.device()
            for _ in range(3):
                await bench.order(ttl_sec=600)
            await sent(bench, 1)
            for presence in (Presence.OFFLINE, Presence.ONLINE):
                bench.core.dispatch.presence(device.id, presence)
            assert [each.begun is not None for each in bench.live.members.values()] == [True, False, False]
        async with running(SimStorage(loop, disk), SimClock(loop)) as bench:
            assert [each.begun is not None for each in bench.live.members.values()] == [True, False, False]

    simulated(world)


def test_a_device_id_and_hardware_id_belong_to_one_project_for_ever() -> None:
    async def scene(bench: Bench) -> None:
        device = await bench.device(online=False)
        assert device.project == PROJECT
        for name in ("lamp-1", device.id):
            with pytest.raises(Refusal, match="is taken"):
                await bench.device(name, online=False)

    play(scene)


def test_an_attempt_interrupted_by_a_lost_link_is_sent_again_soon_after_its_return() -> None:
    async def scene(bench: Bench) -> None:
        device = await bench.device()
        await bench.order(ttl_sec=None)
        await sent(bench, 1)
        bench.wire.up = False
        bench.core.intake.link_down("gone")
        await passes(3_600)
        bench.wire.up = True
        bench.core.dispatch.presence(device.id, Presence.UNKNOWN)
        back = bench.writer.now()
        bench.core.intake.link_up()
        await sent(bench, 2)

        assert bench.writer.now() - back <= 12_500, "two seconds for the backlog, then within the answer time"

    play(scene)


async def test_old_idempotency_keys_of_closed_commands_are_forgotten_a_few_at_a_time(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        state = await bench.order()
        rows = [("acme", f"key-{n}", "", b"", "cmd_gone", 0) for n in range(KEYS_AT_ONCE + 1)]
        rows.append(("acme", "mine", "", b"", state.id, 0))
        bench.writer.also(*(New("idempotency", row) for row in rows))
        await bench.writer.barrier()
        assert await bench.core._forget_some_keys() == KEYS_AT_ONCE
        assert await bench.core._forget_some_keys() == 1
        assert await bench.core._forget_some_keys() == 0
        left = await bench.writer.storage.read(
            plain(lambda sql: sql.execute("SELECT key FROM idempotency").fetchall())
        )
        assert [tuple(row) for row in left] == [("mine",)]
