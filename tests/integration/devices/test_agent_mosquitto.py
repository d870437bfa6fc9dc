"""The reference device against a real Mosquitto: duplicates, restarts of either side, its status messages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import aiomqtt
import jwt
import msgspec
import pytest

from devices.agent import Agent, Call, CommandFailed
from devices.fleet.demo import run_demo
from devices.grant import TYPE, GrantVerifier, params_hash
from devices.memory import RamMemory, Remembered, SqliteMemory
from devices.types import load_type
from devices.wire import encode_command

WITHIN_SEC = 120
Seen = tuple[str, str]


class Server(Protocol):
    """The part of the `mosquitto` fixture that these tests use."""

    host: str
    port: int

    @property
    def url(self) -> str: ...

    def start(self) -> None: ...

    def kill(self) -> None: ...


class Broker:
    """Takes the broker's place: sends commands to one device and reads its messages."""

    def __init__(self, client: aiomqtt.Client, hardware_id: str) -> None:
        self._client, self._topic = client, f"iotee/dev/{hardware_id}/"

    async def send(self, payload: bytes) -> None:
        await self._client.publish(self._topic + "rls", payload, qos=1)

    async def command(self, command_id: str, command: str, params: Any = None, attempt: int = 1) -> None:
        message = {"id": command_id, "type": command, "params": params, "attempt": attempt, "grant": None}
        await self.send(json.dumps(message).encode())

    async def next(self, suffix: str) -> bytes:
        async for message in self._client.messages:
            if message.topic.value == self._topic + suffix:
                return bytes(message.payload)
        raise AssertionError("the connection ended")

    async def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await self.next("ack"))
        return answer

    async def answers_until(self, command_id: str, *ends: str) -> list[str]:
        seen = list[str]()
        while not seen or seen[-1] not in ends:
            answer = await self.answer()
            assert answer["id"] == command_id
            seen.append(answer["status"])
        return seen

    async def status(self, status: str) -> str:
        """Waits for this status and returns the session id in it."""
        while True:
            said = json.loads(await self.next("status"))
            if said["status"] == status:
                session: str = said["session"]
                return session


@contextlib.asynccontextmanager
async def broker(server: Server, hardware_id: str = "ABC") -> AsyncIterator[Broker]:
    async with asyncio.timeout(WITHIN_SEC), aiomqtt.Client(server.host, server.port) as client:
        topics = [(f"iotee/dev/{hardware_id}/{suffix}", 1) for suffix in ("ack", "status")]
        await client.subscribe(topics)
        yield Broker(client, hardware_id)


@contextlib.asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def new_agent(mosquitto: Server, tmp_path: Path) -> Callable[[list[Any]], Agent]:
    """A device process that always uses the same memory file. It appends each executed command to the
    list."""

    def new(executed: list[Any]) -> Agent:
        agent = Agent(
            "ABC", "token", mosquitto.url, memory=SqliteMemory(tmp_path / "device.sqlite3"), grants="none"
        )

        @agent.command("count")
        async def count(call: Call) -> dict[str, int]:
            executed.append(call.params)
            await call.progress(50, "half")
            return {"count": len(executed)}

        @agent.command("jam")
        async def jam(call: Call) -> None:
            raise CommandFailed("jammed", "the bolt is stuck", {"at": 3})

        @agent.command("break")
        async def break_(call: Call) -> None:
            raise RuntimeError("what nobody expected")

        @agent.command("hang")
        async def hang(call: Call) -> None:
            executed.append(call.id)
            await asyncio.Event().wait()

        return agent

    return new


async def test_duplicates_are_executed_once_and_answered_again_after_a_restart_too(
    mosquitto: Server, new_agent: Callable[[list[Any]], Agent]
) -> None:
    executed = list[Any]()

    async with broker(mosquitto) as ours:
        async with running(new_agent(executed)):
            await ours.status("online")
            for attempt in (1, 2, 3):
                await ours.command("cmd_1", "count", "first", attempt)
            seen = await ours.answers_until("cmd_1", "executed")
            await ours.command("cmd_2", "count", "second")
            while (answer := await ours.answer())["id"] != "cmd_2" or answer["status"] != "executed":
                pass
        assert await ours.status("offline")

        async with running(new_agent(executed)):
            await ours.status("online")
            await ours.command("cmd_1", "count", "first", 4)
            again = await ours.answer()

    assert seen[0] == "acknowledged"
    assert "progress" in seen
    assert executed == ["first", "second"]
    assert (again["id"], again["status"], again["result"]) == ("cmd_1", "executed", {"count": 1})


async def test_a_command_sent_to_an_absent_device_is_executed_when_it_returns(
    mosquitto: Server, new_agent: Callable[[list[Any]], Agent]
) -> None:
    executed = list[Any]()

    async with broker(mosquitto) as ours:
        async with running(new_agent(executed)):
            await ours.status("online")
        await ours.status("offline")
        await ours.command("cmd_1", "count", 1)
        async with running(new_agent(executed)):
            assert "executed" in await ours.answers_until("cmd_1", "executed")

    assert executed == [1]


async def test_an_interrupted_command_is_reported_and_not_repeated(
    mosquitto: Server, new_agent: Callable[[list[Any]], Agent]
) -> None:
    executed = list[Any]()

    async with broker(mosquitto) as ours:
        async with running(new_agent(executed)):
            await ours.status("online")
            await ours.command("cmd_1", "hang")
            assert (await ours.answer())["status"] == "acknowledged"
        async with running(new_agent(executed)):
            report = await ours.answer()
            await ours.command("cmd_1", "hang", attempt=2)
            again = await ours.answer()

    assert report["error"]["code"] == "interrupted"
    assert again == report
    assert executed == ["cmd_1"]


async def test_a_command_that_could_not_be_stored_is_not_acknowledged_to_the_server(
    mosquitto: Server, new_agent: Callable[[list[Any]], Agent]
) -> None:
    class FullDisk(RamMemory):
        def put(self, command_id: str, remembered: Remembered) -> None:
            raise sqlite3.OperationalError("database or disk is full")

    executed = list[Any]()
    broken = Agent("ABC", "token", mosquitto.url, memory=FullDisk(), grants="none")

    @broken.command("count")
    async def count(call: Call) -> None:
        executed.append("before it was remembered")

    async with broker(mosquitto) as ours:
        ends = asyncio.create_task(broken.run())
        await ours.status("online")
        await ours.command("cmd_1", "count", 1)
        with pytest.raises(ExceptionGroup):
            await ends
        async with running(new_agent(executed)):
            assert "executed" in await ours.answers_until("cmd_1", "executed")

    assert executed == [1]


async def test_a_failing_handler_is_answered_and_the_device_goes_on(
    mosquitto: Server, new_agent: Callable[[list[Any]], Agent]
) -> None:
    async with broker(mosquitto) as ours, running(new_agent([])):
        await ours.status("online")
        errors = []
        for command in ("jam", "break", "unheard-of"):
            await ours.command(f"cmd_{command}", command)
            while (answer := await ours.answer())["status"] != "failed":
                pass
            errors.append(answer["error"])

    assert errors[0] == {"code": "jammed", "message": "the bolt is stuck", "details": {"at": 3}}
    assert errors[1] == {"code": "device_error", "message": "what nobody expected"}
    assert errors[2]["code"] == "unknown_command"


async def test_an_answer_given_without_a_connection_is_sent_when_it_returns(
    mosquitto: Server,
) -> None:
    agent = Agent("ABC", "token", mosquitto.url, grants="none")
    connection_lost = asyncio.Event()

    @agent.command("slow")
    async def slow(call: Call) -> str:
        await connection_lost.wait()
        return "done"

    async with broker(mosquitto) as ours, running(agent):
        first = await ours.status("online")
        await ours.command("cmd_1", "slow")
        assert (await ours.answer())["status"] == "acknowledged"
        # A second connection with the same client id closes the first without DISCONNECT, so the server sends
        # the will.
        async with aiomqtt.Client(mosquitto.host, mosquitto.port, identifier="ABC"):
            assert await ours.status("offline") == first
            connection_lost.set()
        answer = await ours.answer()

    assert (answer["status"], answer["result"]) == ("executed", {"value": "done"})


async def test_the_device_reconnects_to_a_restarted_server(
    mosquitto: Server, new_agent: Callable[[list[Any]], Agent]
) -> None:
    executed = list[Any]()

    async with running(new_agent(executed)):
        async with broker(mosquitto) as ours:
            before = await ours.status("online")
            await ours.command("cmd_1", "count", 1)
            await ours.answers_until("cmd_1", "executed")
        mosquitto.kill()
        mosquitto.start()
        async with broker(mosquitto) as ours:
            after = await ours.status("online")
            await ours.command("cmd_1", "count", 1, attempt=2)
            assert await ours.answers_until("cmd_1", "executed") == ["executed"]

    assert before != after
    assert executed == [1]


async def test_a_msgpack_device_with_a_secret_executes_only_commands_with_its_grant(
    mosquitto: Server,
) -> None:
    kind = load_type('name = "small"\npayload = "msgpack"\ngrants = "HS256"\nopen = true\n')
    secret, executed = bytes(range(32)), list[Any]()
    verifier = GrantVerifier({"dev_1": secret}, "ordain", "ABC", time.time)
    agent = Agent("ABC", "token", mosquitto.url, device_type=kind, verifier=verifier)

    @agent.command("count")
    async def count(call: Call) -> datetime:
        executed.append(call.params)
        return datetime(2026, 1, 1, tzinfo=UTC)

    def told(command_id: str, signed_with: bytes) -> bytes:
        now, params = int(time.time()), {"n": 1.5}
        claims: dict[str, Any] = {
            "iss": "ordain",
            "aud": "ABC",
            "sub": command_id,
            "jti": command_id,
            "cmd": "count",
        }
        claims |= {"iat": now, "nbf": now, "exp": now + 60, "phs": params_hash(params)}
        grant = jwt.encode(claims, signed_with, "HS256", {"typ": TYPE, "kid": "dev_1"})
        definition = kind.definition("count")
        return encode_command(
            definition,
            command_id=command_id,
            command="count",
            params=params,
            attempt=1,
            expires_at=None,
            grant=grant,
        )

    async with broker(mosquitto) as ours, running(agent):
        await ours.status("online")
        await ours.send(told("cmd_1", secret))
        answers = [msgspec.msgpack.decode(await ours.next("ack")) for _ in range(2)]
        await ours.send(told("cmd_2", b"o" * 32))
        refused = msgspec.msgpack.decode(await ours.next("ack"))

    assert [answer["status"] for answer in answers] == ["acknowledged", "executed"]
    assert answers[1]["result"] == {"value": "2026-01-01T00:00:00Z"}
    assert refused["error"]["details"] == {"reason": "bad_signature"}
    assert executed == [{"n": 1.5}]


async def test_the_demo_devices_execute_their_commands(mosquitto: Server) -> None:
    async def ask(hardware_id: str, payload: bytes, count: int) -> list[str]:
        async with broker(mosquitto, hardware_id) as ours:
            await ours.status("online")
            await ours.send(payload)
            answers = [(await ours.next("ack")).decode() for _ in range(count)]
            return [json.loads(said)["status"] if said.startswith("{") else said for said in answers]

    devices = [("ABC", "t", "recorder"), ("DEF", "t", "generic"), ("GHI", "t", "iotee_device")]
    demo = asyncio.create_task(run_demo(mosquitto.url, devices, work_sec=0))
    recorded = await ask("ABC", b'{"id":"a","type":"start_recording","params":{"max_duration_sec":5}}', 2)
    unlocked = await ask("DEF", b'{"id":"b","type":"unlock"}', 3)
    locked = await ask("GHI", b"1", 2)
    demo.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await demo

    assert recorded == ["acknowledged", "executed"]
    assert unlocked == ["acknowledged", "progress", "executed"]
    assert locked == ["ack", "ok"]
