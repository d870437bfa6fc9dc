"""The device core without a network: executes once, in order, and never forgets."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.agent import Agent, Call
from devices.clock import rfc3339
from devices.core import MAX_WAITING, Core, Effect, Run, Send
from devices.grant import TYPE, GrantVerifier, params_hash
from devices.memory import Memory, RamMemory, Remembered, SqliteMemory
from devices.types import shipped_types
from devices.wire import Answer, CommandMessage
from tests.streams import stream_server

NOW = 1_800_000_000_000
HANDLERS = {"lock": True, "reboot": False}
TOPIC = "iotee/dev/ABC/rls"


def core(memory: Memory | None = None, verifier: GrantVerifier | None = None) -> Core:
    return Core("ABC", shipped_types()["generic"], memory or RamMemory(), HANDLERS, verifier=verifier)


def bare_core() -> Core:
    return Core("ABC", shipped_types()["iotee_device"], RamMemory(), HANDLERS)


def message(command_id: str = "cmd_1", command: str = "reboot", **more: Any) -> bytes:
    return json.dumps({"id": command_id, "type": command} | more).encode()


def said(effects: list[Effect]) -> list[tuple[str, str]]:
    """(id, status or error code) of each sent answer."""
    sent = [json.loads(effect.payload) for effect in effects if isinstance(effect, Send)]
    return [(answer["id"], answer.get("error", {}).get("code", answer["status"])) for answer in sent]


def to_run(effects: list[Effect]) -> list[CommandMessage]:
    return [effect.command for effect in effects if isinstance(effect, Run)]


def grant(private: Ed25519PrivateKey, command_id: str, command: str, seconds: int, lasts: int = 5) -> str:
    """A grant from a time on, with the key `k`, for a command without parameters."""
    claims = {"iss": "ordain", "aud": "ABC", "sub": command_id, "jti": command_id, "cmd": command}
    times = {"iat": seconds, "nbf": seconds, "exp": seconds + lasts, "phs": params_hash({})}
    return jwt.encode(claims | times, private, algorithm="EdDSA", headers={"typ": TYPE, "kid": "k"})


def begin(device: Core, *args: Any, **more: Any) -> CommandMessage:
    (command,) = to_run(device.receive(NOW, TOPIC, message(*args, **more)))
    return command


@pytest.fixture(params=["ram", "sqlite"])
def memories(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Memory]]:
    """Returns the same memory at each call, as a restarted process would find it."""
    ram, opened = RamMemory(keep=3), list[SqliteMemory]()

    def again() -> Memory:
        if request.param == "ram":
            return ram
        opened.append(SqliteMemory(tmp_path / "memory.sqlite3", keep=3))
        return opened[-1]

    yield again
    for memory in opened:
        memory.close()


def test_a_command_is_acknowledged_executed_and_answered() -> None:
    device = core()

    first = device.receive(NOW, TOPIC, message(params={"a": 1}))
    (command,) = to_run(first)
    last = device.finish(NOW + 5, command, result=[7])

    assert said(first) == [("cmd_1", "acknowledged")]
    assert command.params == {"a": 1}
    (answer,) = last
    assert isinstance(answer, Send)
    assert answer.topic == "iotee/dev/ABC/ack"
    assert json.loads(answer.payload) == {
        "id": "cmd_1",
        "status": "executed",
        "result": {"value": [7]},
        "at": rfc3339(NOW + 5),
    }


def test_a_repeated_id_is_answered_and_not_executed_again() -> None:
    device = core()

    command = begin(device)
    while_running = device.receive(NOW, TOPIC, message(attempt=2))
    last = device.finish(NOW, command, result={"n": 1})
    afterwards = device.receive(NOW + 9_000, TOPIC, message(attempt=3))

    assert said(while_running) == [("cmd_1", "acknowledged")]
    assert not to_run(while_running)
    assert afterwards == last


def test_commands_run_one_at_a_time_in_order_of_arrival() -> None:
    device = core()

    first = begin(device, "cmd_1")
    assert to_run(device.receive(NOW, TOPIC, message("cmd_2", "lock"))) == []
    assert to_run(device.receive(NOW, TOPIC, message("cmd_3"))) == []
    (second,) = to_run(device.finish(NOW, first))
    (third,) = to_run(device.finish(NOW, second))

    assert [second.id, third.id] == ["cmd_2", "cmd_3"]
    assert to_run(device.finish(NOW, third)) == []


def test_commands_beyond_the_queue_are_neither_remembered_nor_answered() -> None:
    memory = RamMemory()
    device = core(memory)
    for number in range(MAX_WAITING + 1):
        device.receive(NOW, TOPIC, message(f"cmd_{number}"))

    assert device.receive(NOW, TOPIC, message("one-more")) == []
    assert memory.get("one-more") is None


def test_an_impossible_command_is_refused_and_stays_refused() -> None:
    device = core()

    unknown = device.receive(NOW, TOPIC, message("a", "explode"))
    expired = device.receive(NOW, TOPIC, message("b", expires_at=rfc3339(NOW)))

    assert said(unknown) == [("a", "unknown_command")]
    assert said(expired) == [("b", "expired")]
    assert device.receive(NOW - 1, TOPIC, message("b", expires_at=rfc3339(NOW))) == expired


def test_a_command_that_expired_while_it_waited_is_not_executed() -> None:
    device = core()
    first = begin(device, "cmd_1")
    device.receive(NOW, TOPIC, message("cmd_2", expires_at=rfc3339(NOW + 10)))
    device.receive(NOW, TOPIC, message("cmd_3"))

    effects = device.finish(NOW + 10, first)

    assert said(effects) == [("cmd_1", "executed"), ("cmd_2", "expired")]
    assert [command.id for command in to_run(effects)] == ["cmd_3"]


def test_a_failure_is_reported_with_the_handlers_error() -> None:
    device = core()
    command = begin(device)

    (answer,) = device.finish(NOW, command, error={"code": "jam", "message": "m", "details": [1]})

    assert isinstance(answer, Send)
    assert json.loads(answer.payload)["error"] == {"code": "jam", "message": "m", "details": [1]}


@pytest.mark.parametrize("result", [object(), "x" * 70_000, "\ud800"])
def test_a_result_that_cannot_be_sent_does_not_repeat_the_execution(result: Any) -> None:
    device = core()
    command = begin(device)

    assert said(device.finish(NOW, command, result=result)) == [("cmd_1", "executed")]


def test_progress_is_reported_while_the_command_runs() -> None:
    device = core()
    command = begin(device)

    (report,) = device.progress(NOW, command, 50, "half")

    assert isinstance(report, Send)
    assert json.loads(report.payload)["progress"] == {"percent": 50, "note": "half"}
    for percent in (101, -1, float("nan")):
        with pytest.raises(ValueError):
            device.progress(NOW, command, percent, None)
    device.finish(NOW, command)
    assert device.progress(NOW, command, 60, None) == []


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("iotee/dev/XYZ/rls", message()),
        ("iotee/dev/ABC/ack", message()),
        ("x", message()),
        (TOPIC, b"1"),
        (TOPIC, b"{}"),
        (TOPIC, b""),
    ],
)
def test_messages_that_are_no_command_or_for_another_device_are_ignored(topic: str, payload: bytes) -> None:
    assert core().receive(NOW, topic, payload) == []


def test_after_a_crash_a_started_command_is_not_executed_again(memories: Callable[[], Memory]) -> None:
    begin(core(memories()), "cmd_1", "reboot")
    reborn = core(memories())

    recovered = reborn.recover(NOW + 1)

    assert said(recovered) == [("cmd_1", "interrupted")]
    assert not to_run(recovered)
    assert reborn.receive(NOW + 2, TOPIC, message("cmd_1")) == recovered
    assert core(memories()).recover(NOW + 3) == []


def test_after_a_crash_a_harmless_command_is_executed_again(memories: Callable[[], Memory]) -> None:
    begin(core(memories()), "cmd_1", "lock", params={"a": 1})

    (command,) = to_run(core(memories()).recover(NOW))

    assert (command.id, command.params) == ("cmd_1", {"a": 1})


async def test_after_a_crash_the_keys_are_read_before_a_started_command_is_judged(
    memories: Callable[[], Memory],
) -> None:
    private = Ed25519PrivateKey.generate()
    x = base64.urlsafe_b64encode(private.public_key().public_bytes_raw()).rstrip(b"=").decode()
    jwks = {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k", "x": x}]}
    token = grant(private, "cmd_1", "lock", int(time.time()), lasts=3_600)
    begin(core(memories()), "cmd_1", "lock", grant=token)
    ran = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(jwks).encode())
        writer.close()

    async with stream_server(answer) as port:
        memory = memories()
        agent = Agent("ABC", "token", "mqtt://127.0.0.1:1", memory=memory, jwks=f"http://127.0.0.1:{port}/")

        @agent.command("lock", idempotent=True)
        async def lock(call: Call) -> None:
            ran.set()

        running = asyncio.create_task(agent.run())
        try:
            async with asyncio.timeout(60):
                await ran.wait()
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def test_an_address_of_keys_that_does_not_answer_holds_up_one_command_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("devices.agent.LEARN_WITHIN_SEC", 0.05)
    asked, done = 0, asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await done.wait()
        writer.close()

    async with stream_server(silent) as port:
        agent = Agent("ABC", "token", "mqtt://127.0.0.1:1", jwks=f"http://127.0.0.1:{port}/")
        for number in range(3):
            command_id = f"cmd_{number}"
            forged = grant(Ed25519PrivateKey.generate(), command_id, "reboot", NOW // 1_000)
            await agent._learn_keys(TOPIC, message(command_id, grant=forged))
        done.set()
    assert asked == 1


def test_a_repeated_command_needs_no_keys() -> None:
    private = Ed25519PrivateKey.generate()
    verifier = GrantVerifier({"k": private.public_key()}, "ordain", "ABC", lambda: NOW / 1_000)
    device = core(verifier=verifier)
    sent = message("cmd_1", grant=grant(private, "cmd_1", "reboot", NOW // 1_000))
    [command] = to_run(device.receive(NOW, TOPIC, sent))
    device.finish(NOW, command)
    verifier.use({})

    assert not device.needs_keys(TOPIC, sent)
    assert device.needs_keys(TOPIC, message("cmd_2", grant=grant(private, "cmd_2", "reboot", NOW // 1_000)))


def test_after_a_crash_commands_not_started_run_in_order(memories: Callable[[], Memory]) -> None:
    device = core(memories())
    begin(device, "cmd_1")
    for command_id in ("cmd_2", "cmd_3"):
        device.receive(NOW, TOPIC, message(command_id))
    device.receive(NOW, TOPIC, message("cmd_4", expires_at=rfc3339(NOW + 1)))
    reborn = core(memories())

    recovered = reborn.recover(NOW + 1)
    (second,) = to_run(recovered)
    (third,) = to_run(reborn.finish(NOW, second))

    assert said(recovered) == [("cmd_1", "interrupted")]
    assert [second.id, third.id] == ["cmd_2", "cmd_3"]
    assert said(reborn.finish(NOW + 1, third)) == [("cmd_3", "executed"), ("cmd_4", "expired")]


def test_after_a_crash_the_last_answer_is_still_known(memories: Callable[[], Memory]) -> None:
    device = core(memories())
    last = device.finish(NOW, begin(device), result={"n": 1})

    assert core(memories()).receive(NOW + 60_000, TOPIC, message(attempt=2)) == last


def test_the_memory_forgets_the_oldest_finished_commands_only(memories: Callable[[], Memory]) -> None:
    memory = memories()
    open_ = Remembered(
        answer=Answer(id="open", status="acknowledged"), command=CommandMessage(id="open", type="lock")
    )
    memory.put("open", open_)
    for number in range(6):
        memory.put(f"cmd_{number}", Remembered(answer=Answer(id=f"cmd_{number}", status="executed")))

    assert memory.get("cmd_0") is None
    assert memory.get("cmd_5") is not None
    assert memories().unfinished() == [open_]


def test_a_device_with_a_verifier_executes_nothing_without_a_grant() -> None:
    private, clock = Ed25519PrivateKey.generate(), [NOW / 1000]
    device = core(verifier=GrantVerifier({"k": private.public_key()}, "ordain", "ABC", lambda: clock[0]))

    def granted(command_id: str) -> str:
        return grant(private, command_id, "reboot", NOW // 1000)

    without = device.receive(NOW, TOPIC, message("cmd_0"))
    foreign = device.receive(NOW, TOPIC, message("cmd_1", grant=granted("cmd_2")))
    running = begin(device, "cmd_2", grant=granted("cmd_2"))
    device.receive(NOW, TOPIC, message("cmd_3", grant=granted("cmd_3")))
    clock[0] += 5

    assert said(without) == [("cmd_0", "grant_refused")]
    assert said(foreign) == [("cmd_1", "grant_refused")]
    assert said(device.finish(NOW + 5_000, running)) == [("cmd_2", "executed"), ("cmd_3", "grant_refused")]


def test_a_bare_device_answers_with_its_types_texts() -> None:
    device = bare_core()

    first = device.receive(NOW, TOPIC, b"1")
    (command,) = to_run(first)
    last = device.finish(NOW, command)
    (failing,) = to_run(device.receive(NOW, "iotee/dev/ABC/rbt", b"1"))
    failed = device.finish(NOW, failing, error={"code": "x", "message": "y"})
    unknown = device.receive(NOW, TOPIC, b"0")

    assert device.command_topics == ["iotee/dev/ABC/rbt", TOPIC]
    assert (command.type, failing.type) == ("lock", "reboot")
    sent = [effect.payload for effect in (*first, *last, *failed, *unknown) if isinstance(effect, Send)]
    assert sent == [b"ack", b"ok", b"error", b"error"]
    assert device.receive(NOW, TOPIC, b"\xff") == []


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["publish", "end", "crash"]) | st.integers(0, 4), max_size=60))
def test_in_any_sequence_no_command_runs_twice_and_all_run_in_order(steps: list[str | int]) -> None:
    memory, ran, order = RamMemory(), list[str](), list[str]()
    device = Core("ABC", shipped_types()["generic"], memory, {"reboot": False})
    running: CommandMessage | None = None
    for step in steps:
        effects: list[Effect] = []
        if isinstance(step, int) or step == "publish":
            command_id = f"cmd_{len(order) if step == 'publish' else step}"
            if command_id not in order:
                order.append(command_id)
            effects = device.receive(NOW, TOPIC, message(command_id))
        elif step == "end" and running is not None:
            ended, running = running, None
            effects = device.finish(NOW, ended)
        elif step == "crash":
            device, running = Core("ABC", shipped_types()["generic"], memory, {"reboot": False}), None
            effects = device.recover(NOW)
        for command in to_run(effects):
            ran.append(command.id)
            running = command

    assert ran == order[: len(ran)]


def test_an_agent_without_keys_for_grants_refuses_to_start() -> None:
    with pytest.raises(ValueError, match="grants are required"):
        Agent("ABC", "token", "mqtt://127.0.0.1")
    with pytest.raises(ValueError, match="http or https"):
        Agent("ABC", "token", "mqtt://127.0.0.1", jwks="file:///etc/passwd")
    with pytest.raises(ValueError, match="takes no jwks"):
        Agent("ABC", "token", "mqtt://127.0.0.1", grants="none", jwks={"keys": []})
    with pytest.raises(ValueError, match="carry no grant"):
        Agent(
            "ABC", "token", "mqtt://127.0.0.1", device_type=shipped_types()["iotee_device"], jwks="http://a"
        )
    Agent("ABC", "token", "mqtt://127.0.0.1", grants="none")
    Agent("ABC", "token", "mqtt://127.0.0.1", jwks={"keys": []})
