"""Repeats the decisions of a real broker on the virtual clock, from the export of each command.

A manipulated log is detected, because one of its decisions would be different.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Executed,
    Expired,
    Failed,
    Offline,
    Published,
    Recorded,
    TimedOut,
)
from broker.engine.commands import Caller
from broker.log import lines
from broker.operations import transfer
from broker.operations.backup import Refused
from broker.operations.redecide import Step, redecide
from broker.seams import Message, Receipt, Sqlite
from devices.types import load_type
from tests.golden.write import lives
from tests.integration.core_support import PROJECT, UNKNOWN, Bench, on_virtual_time, simulated
from tests.reading import plain
from tests.simulation.loop import SimLoop

Events = list[Recorded]
SHORT = """
payload = "json"
transports = ["mqtt", "heartbeat"]
max_attempts = 2
ack_timeout_sec = 3
backoff_cap_sec = 10
[commands.open]
[commands.reboot]
repeatable = false
"""
TYPES = {
    name: load_type(f'name = "{name}"\npresence = "{presence}"{SHORT}')
    for name, presence in (("door", "required"), ("bell", "none"), ("gate", "optional"))
}
KINDS = {f"{kind}-1": kind for kind in TYPES}  # hardware id and type of the devices of a random history
REASONS = (0, 0, 0, None, 0x10, 0x10, 0x87, 0x97)


@cache
def exported() -> dict[str, bytes]:
    """The export of each command, after at least one command of every kind of life."""

    async def world(loop: SimLoop) -> dict[str, bytes]:
        async with on_virtual_time(loop) as (bench, _):
            await lives(bench)
            await bench.writer.barrier()
            return await bench.writer.storage.read(plain(everything))

    return simulated(world)


def everything(sql: Sqlite) -> dict[str, bytes]:
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for (command_id,) in sql.execute(
            "SELECT stream FROM events JOIN commands USING (position) ORDER BY position"
        ).fetchall():
            file = Path(home) / command_id
            transfer.export_command(sql, file, command_id)
            found[command_id] = file.read_bytes()
    return found


def read(content: bytes, tmp_path: Path) -> tuple[str, Events]:
    (tmp_path / "bundle.jsonl").write_bytes(content)
    return transfer.read_command(tmp_path / "bundle.jsonl")


def decided(command: str, events: Events) -> list[Step]:
    return list(redecide(events, min(each.position for each in events if each.stream == command)))


def test_all_decisions_are_repeated_with_the_same_result(tmp_path: Path) -> None:
    seen: set[tuple[str, str]] = set()
    for content in exported().values():
        command, events = read(content, tmp_path)
        steps = decided(command, events)
        assert [step for step in steps if step.fault is not None] == []
        own = [each for each in events if each.stream == command]
        assert [step.recorded for step in steps if step.recorded.stream == command] == own
        seen |= {(step.recorded.type, step.input.name) for step in steps}
    assert seen >= {
        ("created", "CREATE"),
        ("published", "HAND_OVER"),
        ("acknowledged", "ANSWER_ACKNOWLEDGED"),
        ("progressed", "ANSWER_PROGRESS"),
        ("executed", "ANSWER_EXECUTED"),
        ("failed", "ANSWER_FAILED"),
        ("failed", "REFUSED"),
        ("timed_out", "ATTEMPT_TIMER"),
        ("timed_out", "RESULT_TIMER"),
        ("timed_out", "EXPIRY"),
        ("timed_out", "ABANDON"),
        ("expired", "EXPIRY"),
        ("cancelled", "CANCEL"),
    }


def one(tmp_path: Path, *types: str) -> tuple[str, Events]:
    """The first exported command with exactly these event types."""
    for content in exported().values():
        command, events = read(content, tmp_path)
        if tuple(each.type for each in events if each.stream == command) == types:
            return command, events
    raise AssertionError(types)


def altered(events: Events, command: str, type: str, **fields: Any) -> Events:
    return [
        msgspec.structs.replace(each, **fields) if (each.stream, each.type) == (command, type) else each
        for each in events
    ]


def first_fault(command: str, events: Events) -> str:
    return next((step.fault for step in decided(command, events) if step.fault is not None), "none")


def at(events: Events, command: str, type: str) -> int:
    return next(each.decided_at for each in events if (each.stream, each.type) == (command, type))


def test_a_command_that_expired_too_early_is_found(tmp_path: Path) -> None:
    command, events = one(tmp_path, "created", "expired")
    early = at(events, command, "expired") - 10

    assert "not at" in first_fault(command, altered(events, command, "expired", decided_at=early))


def test_a_result_timeout_that_fired_too_early_is_found(tmp_path: Path) -> None:
    command, events = one(tmp_path, "created", "published", "acknowledged", "timed_out")
    early = at(events, command, "acknowledged") + 1_000

    assert "not at" in first_fault(command, altered(events, command, "timed_out", decided_at=early))


def test_a_lease_that_ended_too_early_is_found(tmp_path: Path) -> None:
    async def world(loop: SimLoop) -> tuple[str, bytes]:
        async with on_virtual_time(loop, types=TYPES) as (bench, _):
            device = await bench.device(type="door", online=False)
            made = await bench.order(type="reboot", ttl_sec=None)
            caller = Caller(actor=f"device:{device.id}", project=PROJECT, device_id=device.id)
            await bench.core.pull.fetch(caller, "me", "heartbeat")
            await bench.becomes(made.id, "timed_out")
            return made.id, (await bench.writer.storage.read(plain(everything)))[made.id]

    made, content = simulated(world)
    command, events = read(content, tmp_path)
    early = at(events, command, "published") + 59_000

    assert command == made
    assert first_fault(command, events) == "none"
    assert "not at" in first_fault(command, altered(events, command, "timed_out", decided_at=early))


def test_an_end_before_the_last_attempt_is_found(tmp_path: Path) -> None:
    command, events = one(tmp_path, "created", *["published"] * 5, "timed_out")
    fifth = [each for each in events if (each.stream, each.type) == (command, "published")][-1]
    fewer = [each for each in events if each is not fifth]

    assert "attempt timer: attempt back_off" in first_fault(command, fewer)


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_the_decisions_of_a_random_history_are_repeated(tmp_path: Path, seed: int, *, embedded: bool) -> None:
    """Attempts end in every way: by timers, receipts, answers, presence, and new sessions of the link."""
    steps = [
        step
        for content in random_history(seed, embedded=embedded).values()
        for step in decided(*read(content, tmp_path))
    ]

    assert [step for step in steps if step.fault is not None] == []
    assert {step.recorded.type for step in steps} >= {"published", "timed_out", "executed", "failed"}


def random_history(seed: int, *, embedded: bool) -> dict[str, bytes]:
    draw = random.Random(seed)

    async def world(loop: SimLoop) -> dict[str, bytes]:
        async with on_virtual_time(loop, types=TYPES, embedded=embedded) as (bench, _):
            for name, kind in KINDS.items():
                await bench.device(name, kind, online=False)
            for _ in range(200):
                await asyncio.sleep(draw.choice((0.01, 0.1, 0.5, 2)))
                await something(bench, draw, draw.choice(list(KINDS)))
                while bench.wire.due and draw.random() < 0.7:
                    bench.wire.receipt(Receipt(written=True, reason=draw.choice(REASONS)))
            await asyncio.sleep(200)
            await bench.writer.barrier()
            return await bench.writer.storage.read(plain(everything))

    return simulated(world, seed)


async def something(bench: Bench, draw: random.Random, name: str) -> None:
    """One thing that happens to a device or to the link."""
    intake, wire = bench.core.intake, bench.wire
    match draw.choice(("order", "order", "presence", "presence", "answer", "link")):
        case "order":
            type = draw.choice(("open", "reboot"))
            await bench.order(name, type, ttl_sec=draw.choice((None, None, 5, 60)))
        case "presence" if bench.core.dispatch.embedded:
            draw.choice((intake.device_online, intake.device_offline))(name)
        case "presence":
            word, topic = draw.choice((b"online", b"offline")), f"iotee/dev/{name}/status"
            intake.message(Message(topic=topic, payload=word, retain=draw.random() < 0.2))
        case "answer" if wire.sent:
            last = wire.sent[-1]
            status = draw.choice(("acknowledged", "progress", "executed", "failed"))
            bench.answers((last.correlation or b"").decode(), status, last.topic.split("/")[-2])
        case "link" if draw.random() < 0.3:
            wire.up = False
            intake.link_down("lost")
            while wire.due:
                wire.receipt(UNKNOWN)
            await asyncio.sleep(draw.uniform(0.1, 5))
            wire.up = True
            intake.link_up()


@pytest.mark.parametrize(
    ("type", "event", "found"),
    [
        ("published", Published(attempt=2), "another event would be recorded"),
        ("published", Executed(), "unmatched never_handed_over"),
        ("published", Cancelled(by="key:key_1"), "answer acknowledged: unmatched promise_broken"),
        ("executed", Executed(late=True), "another event would be recorded"),
        ("executed", Expired(), "expires_at reached: nothing"),
        ("executed", TimedOut(reason="no_result"), "not at"),
        ("executed", Cancelled(by="key:key_1"), "conflict"),
    ],
)
def test_a_replaced_event_is_found(tmp_path: Path, type: str, event: Any, found: str) -> None:
    command, events = one(tmp_path, "created", "published", "acknowledged", "progressed", "executed")

    said = first_fault(command, altered(events, command, type, event=event))

    assert found in said


def test_a_hand_over_to_an_offline_device_is_found(tmp_path: Path) -> None:
    command, events = one(tmp_path, "created", "published", "failed")
    device = next(each for each in events if each.type == "online")
    offline = msgspec.structs.replace(device, event=Offline())

    said = first_fault(command, [offline if each is device else each for each in events])

    assert "not due" in said
    assert "offline" in said


def test_a_hand_over_beyond_the_window_is_found(tmp_path: Path) -> None:
    command, events = one(tmp_path, "created", "published", "failed")
    created = next(each for each in events if each.stream == command)
    published = next(each for each in events if (each.stream, each.type) == (command, "published"))
    other = [
        msgspec.structs.replace(created, stream="cmd_other", position=created.position),
        msgspec.structs.replace(published, stream="cmd_other", position=created.position),
    ]
    where = events.index(created)

    assert "not due" in first_fault(command, [*events[:where], *other, *events[where:]])


def test_an_answer_after_a_final_event_is_found(tmp_path: Path) -> None:
    command, events = one(tmp_path, "created", "published", "failed")
    last = next(each for each in events if (each.stream, each.type) == (command, "failed"))
    again = msgspec.structs.replace(last, version=4, event=Acknowledged())

    assert "nothing" in first_fault(command, [*events, again])
    error = Failed(error=msgspec.structs.replace(last.event.error, code="x"))  # type: ignore[union-attr]
    contradicting = msgspec.structs.replace(last, version=4, event=error)
    assert "contradiction" in first_fault(command, [*events, contradicting])


CHANGES: list[tuple[Callable[[list[bytes]], list[bytes]], str]] = [
    (lambda found: found[1:], "not an export of a log"),
    (lambda found: [found[0]], "has no event of"),
    (lambda found: [*found[:2], b"{}"], "missing required field"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_changed_file_is_refused(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    content = next(iter(exported().values())).splitlines()

    with pytest.raises(Refused, match=said):
        read(b"\n".join(change(content)), tmp_path)


def test_data_that_does_not_match_its_digest_is_refused(tmp_path: Path) -> None:
    content = next(iter(exported().values())).splitlines()
    row = lines.as_row(content[-1])
    content[-1] = lines.as_line(row._replace(data=b'{"late":true}'))

    with pytest.raises(Refused, match=f"position {row.position} was changed"):
        read(b"\n".join(content), tmp_path)
