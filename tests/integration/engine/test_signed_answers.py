"""Signed answers at the broker: what counts, what is recorded and explained, and what a replay changes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.domain.errors import Refusal
from broker.domain.events import Changed, Executed, Progressed, Recorded
from broker.domain.explain import Explanation
from broker.domain.lifecycle import CommandState
from broker.domain.said import with_answers
from broker.engine.intake import BATCH_BYTES
from broker.engine.registry import NewDevice
from broker.engine.speech.answers import SIGNED_BYTES, weight
from broker.http.v1.unmatched import of_command
from broker.log import sqlite as log
from broker.operations.redecide import redecide
from devices.grant import secret_key
from devices.speech.signing import SigningKey, sign
from devices.types import load_type
from tests.integration.core_support import ME, PROJECT, Bench, on_virtual_time, simulated, until
from tests.simulation.loop import SimLoop

PRIVATE = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"q" * 32)
TYPES = {
    rule: load_type(f'name = "{rule}"\nopen = true\nanswers_signed = "{rule}"\n')
    for rule in ("optional", "required")
}


def public(key: Ed25519PrivateKey) -> str:
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def story(part: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def world(loop: SimLoop) -> None:
        async with on_virtual_time(loop, types=TYPES, embedded=False) as (bench, _):
            await part(bench)

    simulated(world)


async def lamp(bench: Bench, rule: str = "required", key: str | None = public(PRIVATE)) -> str | None:
    """Registers an online device; returns its secret."""
    new = NewDevice(hardware_id="lamp-1", type=rule, project=PROJECT, answer_key=key)
    issued = await bench.core.registry.register(ME, new)
    bench.core.intake.device_online("lamp-1")
    await until(lambda: bench.live.presence.get(issued.device.id) == "online")
    return issued.secret


async def handed_over(bench: Bench, **fields: Any) -> CommandState:
    before = len(bench.wire.sent)
    command = await bench.order(**fields)
    await until(lambda: len(bench.wire.sent) > before)
    bench.wire.receipt()
    return command


async def said(bench: Bench, payload: bytes, hardware_id: str = "lamp-1") -> int:
    """Sends an answer; returns the reason code of its PUBACK, when it is taken in."""
    before = len(bench.wire.pubacks)
    bench.says(payload, hardware_id)
    await until(lambda: len(bench.wire.pubacks) > before)
    return bench.wire.said[-1]


def answer(command: CommandState, status: str = "executed", **fields: Any) -> bytes:
    return msgspec.json.encode({"id": command.id, "status": status} | fields)


def signed(
    of: CommandState, key: SigningKey = PRIVATE, status: str = "executed", by: str = "lamp-1", **more: Any
) -> bytes:
    return sign(answer(of, status, **more), by, key)


async def events(bench: Bench) -> list[Recorded]:
    await bench.writer.barrier()
    return [log.recorded(row) for row in await bench.rows()]


async def explained(bench: Bench, command: CommandState) -> Explanation:
    await bench.writer.barrier()
    state = bench.live.command(command.id) or command
    kept = await bench.writer.storage.read(lambda sql: of_command(sql, state))
    return with_answers(await bench.core.dispatch.explain(state), kept)


def test_a_signed_answer_counts_and_is_recorded_and_explained_as_signed() -> None:
    async def part(bench: Bench) -> None:
        assert await lamp(bench) is None, "a device with a public key needs no secret"
        command = await handed_over(bench)
        assert await said(bench, signed(command, status="acknowledged")) == 0
        assert (await explained(bench, command)).reasons[0]["signed"] is True
        assert await said(bench, signed(command, result={"open": 1})) == 0
        done = await bench.becomes(command.id, "executed")
        assert (bytes(done.result), done.signed) == (b'{"open":1}', True)
        found = await explained(bench, command)
        assert found.reasons[0]["signed"] is True
        assert found.summary.endswith("The device signed this answer.")

    story(part)


def test_a_device_without_a_public_key_signs_with_its_secret() -> None:
    async def part(bench: Bench) -> None:
        secret = await lamp(bench, key=None)
        assert secret is not None
        command = await handed_over(bench)
        assert await said(bench, signed(command, secret_key(secret))) == 0
        await bench.becomes(command.id, "executed")

    story(part)


@pytest.mark.parametrize(
    ("payload", "reason", "code"),
    [
        (answer, "unsigned", 0x87),
        (lambda command: signed(command, OTHER), "bad_signature", 0x87),
        (lambda command: signed(command, by="lamp-2"), "bad_signature", 0x87),
        (lambda command: signed(command, b"s" * 32), "bad_signature", 0x87),
        (lambda command: signed(command)[:-8] + b"AAAAAAAA", "bad_signature", 0x87),
        (lambda _: b'{"status":"executed"}', "unsigned", 0x87),
        (lambda command: answer(command, "failed", error="hot"), "unsigned", 0x87),
        (lambda command: answer(command, "acknowledged"), "unsigned", 0x87),
        (lambda command: answer(command, "progress", progress={"percent": 5}), "unsigned", 0x87),
        (lambda command: signed(command, status="progress", progress={"percent": 5}), "malformed", 0x99),
    ],
)
def test_where_signatures_are_required_another_answer_changes_nothing_and_explain_says_so(
    payload: Callable[[CommandState], bytes], reason: str, code: int
) -> None:
    async def part(bench: Bench) -> None:
        await lamp(bench)
        command = await handed_over(bench, ttl_sec=None)
        assert await said(bench, payload(command)) == code
        assert bench.state(command.id) == "published"
        assert await bench.types(command.id) == ["created", "published"]
        assert await bench.unmatched() == [reason]
        found = await explained(bench, command)
        assert {reason} & {each["code"] for each in found.reasons} or found.reasons[-1]["reason"] == reason
        assert await said(bench, signed(command)) == 0, "the true answer still counts"
        await bench.becomes(command.id, "executed")
        if reason != "malformed":
            late = await explained(bench, command)
            assert reason in {each["code"] for each in late.reasons}

    story(part)


def test_where_signatures_are_optional_an_unsigned_answer_counts_and_a_wrong_signature_does_not() -> None:
    async def part(bench: Bench) -> None:
        await lamp(bench, "optional")
        first = await handed_over(bench)
        await said(bench, signed(first, OTHER))
        assert (bench.state(first.id), await bench.unmatched()) == ("published", ["bad_signature"])
        await said(bench, answer(first))
        await bench.becomes(first.id, "executed")
        found = await explained(bench, first)
        assert found.reasons[0]["signed"] is False
        assert "The answer was not signed" in found.summary
        second = await handed_over(bench)
        await said(bench, signed(second))
        await bench.becomes(second.id, "executed")
        ends = [each.event for each in await events(bench) if isinstance(each.event, Executed)]
        assert [each.signed for each in ends] == [False, True]

    story(part)


def test_a_device_whose_type_has_no_signed_answers_sends_none() -> None:
    async def part(bench: Bench) -> None:
        await bench.device()
        command = await handed_over(bench)
        assert await said(bench, signed(command)) == 0x99
        assert await bench.unmatched() == ["malformed"]
        await said(bench, answer(command))
        await bench.becomes(command.id, "executed")
        assert all(getattr(each.event, "signed", None) is None for each in await events(bench))

    story(part)


def test_old_progress_sent_again_is_not_recorded_and_does_not_keep_the_command_open() -> None:
    async def part(bench: Bench) -> None:
        await lamp(bench)
        command = await handed_over(bench, ttl_sec=None)
        old = signed(command, status="progress", progress={"percent": 10}, seq=1)
        new = signed(command, status="progress", progress={"percent": 90}, seq=2)
        for payload in (old, new):
            await said(bench, payload)
            await asyncio.sleep(2)
        began = bench.writer.now()
        for _ in range(5):
            await asyncio.sleep(20)
            await said(bench, old)
            await said(bench, new)
        percents = [each.event.percent for each in await events(bench) if isinstance(each.event, Progressed)]
        assert percents == [10, 90]
        gone = await bench.becomes(command.id, "timed_out")
        assert (gone.reason, gone.closed_at is not None) == ("no_result", True)
        assert gone.closed_at is not None
        assert gone.closed_at - began < 62_000

    story(part)


def test_a_new_key_is_an_event_and_the_old_one_no_longer_signs() -> None:
    async def part(bench: Bench) -> None:
        await lamp(bench)
        command = await handed_over(bench, ttl_sec=None)
        device = await bench.core.registry.change(ME, "lamp-1", Changed(answer_key=public(OTHER)))
        assert device.answer_key == public(OTHER)
        await said(bench, signed(command, PRIVATE))
        assert bench.state(command.id) == "published"
        await said(bench, signed(command, OTHER))
        await bench.becomes(command.id, "executed")
        await bench.core.registry.change(ME, "lamp-1", Changed(answer_key=None))
        last = await handed_over(bench, ttl_sec=None)
        await said(bench, signed(last, OTHER))
        assert await bench.unmatched() == ["bad_signature", "no_key"]
        issued = await bench.core.registry.rotate_token(ME, "lamp-1")
        assert issued.secret is not None
        await said(bench, signed(last, secret_key(issued.secret)))
        await bench.becomes(last.id, "executed")
        assert all(step.fault is None for step in redecide(await lane_events(bench), 1))

    story(part)


async def lane_events(bench: Bench) -> list[Recorded]:
    return [each for each in await events(bench) if each.stream != "audit"]


@pytest.mark.parametrize("rule", ["optional", "required"])
def test_repeating_the_decisions_of_a_log_finds_an_answer_that_did_not_count(rule: str) -> None:
    """The verdict on the signature is in the event: keys are not needed to repeat the decision."""

    async def part(bench: Bench) -> None:
        await lamp(bench, rule)
        command = await handed_over(bench)
        for percent in (5, 50):
            progress = {"percent": percent}
            await said(bench, signed(command, status="progress", progress=progress, seq=percent))
            await asyncio.sleep(2)
        await said(bench, signed(command))
        recorded = await lane_events(bench)
        assert [step.fault for step in redecide(recorded, 1)] == [None] * 5
        unsigned = [
            msgspec.structs.replace(each, event=msgspec.structs.replace(each.event, signed=False))
            if isinstance(each.event, Executed)
            else each
            for each in recorded
        ]
        faults = [step.fault for step in redecide(unsigned, 1) if step.fault is not None]
        assert len(faults) == (1 if rule == "required" else 0)

    story(part)


@pytest.mark.parametrize("wrong", ["x", "A" * 43, "=" * 43])
def test_a_key_that_is_none_is_refused(wrong: str) -> None:
    async def part(bench: Bench) -> None:
        with pytest.raises(Refusal, match="answer_key"):
            await lamp(bench, key=wrong)
        await lamp(bench)
        with pytest.raises(Refusal, match="answer_key"):
            await bench.core.registry.change(ME, "lamp-1", Changed(answer_key=wrong))

    story(part)


def test_a_command_cannot_have_a_type_that_believes_more_than_the_devices_own() -> None:
    async def part(bench: Bench) -> None:
        await lamp(bench)
        for other in ("generic", "optional"):
            with pytest.raises(Refusal, match="must be one of required"):
                await bench.order(device_type=other)
        command = await bench.order(device_type="required")
        assert command.device_type == "required"

    story(part)


def test_a_device_whose_type_is_missing_gets_no_type_that_believes_more() -> None:
    async def part(bench: Bench) -> None:
        await lamp(bench)
        del bench.core.commands.types["required"]
        for other in (None, "required", "generic", "optional"):
            with pytest.raises(Refusal, match="own type required is not known to the broker: its file is"):
                await bench.order(device_type=other)

    story(part)


def test_a_retry_has_the_rule_that_the_devices_type_has_now() -> None:
    async def part(bench: Bench) -> None:
        await bench.device()
        await bench.core.registry.change(ME, "lamp-1", Changed(answer_key=public(PRIVATE)))
        old = await handed_over(bench)
        await said(bench, answer(old, "failed", error="jammed"))
        await bench.becomes(old.id, "failed")
        await bench.core.registry.change(ME, "lamp-1", Changed(device_type="required"))
        before = len(bench.wire.sent)
        new = (await bench.core.repairs.retry(ME, old.id)).state
        await until(lambda: len(bench.wire.sent) > before)
        assert (new.retry_of, new.device_type) == (old.id, "required")
        await said(bench, answer(new))
        assert await bench.unmatched() == ["unsigned"]
        await said(bench, signed(new))
        await bench.becomes(new.id, "executed")

    story(part)


def test_a_signature_is_counted_with_the_time_that_it_takes_also_behind_white_space() -> None:
    token = sign(b'{"status":"executed"}', "lamp-1", PRIVATE)
    for payload in (token, b" \n" + token):
        assert weight(payload) == SIGNED_BYTES < BATCH_BYTES
