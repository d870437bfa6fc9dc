"""Bought devices in the deterministic simulation: an id-less, a numbered and a state-only type, with a
network that delays, loses and doubles. Planted bugs must be found."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from broker.domain import answerable, lanes
from broker.engine.registry import NewDevice
from broker.engine.speech import reading
from broker.engine.speech.encoder import Encoder
from broker.seams import Message, Outgoing, Receipt
from devices.speech import rules
from devices.types import load_type
from tests.integration.core_support import ME, PROJECT, Bench, on_virtual_time, simulated
from tests.simulation.loop import SimLoop

BELL = load_type("""
name = "bell"
presence = "none"
command_topic = "bell/{hardware_id}/in"
answer_topics = ["bell/{hardware_id}/out"]
template = { do = "$type" }
ack_timeout_sec = 5
[[answers]]
when = "error"
status = "failed"
error = "error"
[[answers]]
status = "executed"
[commands.ring]
repeatable = true
""")
LAST_SEC = 240
COMMANDS = {"b1": ("ring",), "shelly": ("turn_on", "turn_off"), "lamp": ("turn_on", "turn_off")}
SEEDS = range(5)


class Deed(NamedTuple):
    """A device got a message of a command. `ok`: it did what was asked."""

    at: float
    ok: bool


class Far:
    """The network and the three devices. `sent`: when the bytes of each command first left. `deeds`: what the
    devices did, by command."""

    def __init__(self, bench: Bench, loop: SimLoop, seed: int) -> None:
        self.bench, self.loop, self.random = bench, loop, random.Random(seed)
        self.sent: dict[str, float] = {}
        self.deeds: dict[str, list[Deed]] = {}
        self.lamp = "OFF"
        bench.wire.on_publish = self.publish

    def publish(self, outgoing: Outgoing) -> None:
        if outgoing.correlation is not None:
            self.sent.setdefault(outgoing.correlation.decode(), self.loop.time())
        for _ in range(1 + (self.random.random() < 0.1)):
            if self.random.random() > 0.15:
                self.loop.call_later(self.random.uniform(0.001, 0.4), self.deliver, outgoing)

    def deliver(self, outgoing: Outgoing) -> None:
        said = json.loads(outgoing.payload)
        ok = self.random.random() > 0.3
        if outgoing.topic == "shelly/rpc":
            answer: dict[str, Any] = {"id": said["id"], "src": "shelly"}
            answer |= {"result": {"was_on": False}} if ok else {"error": {"code": -103, "message": "no"}}
            self.say("iotee/rpc/shelly/rpc", answer)
        elif outgoing.topic == "bell/b1/in":
            self.say("bell/b1/out", {"rung": True} if ok else {"error": "jammed"})
        else:
            ok = True
            self.lamp = said["state"] or self.lamp
            self.say("zigbee2mqtt/lamp", {"state": self.lamp})
        if outgoing.correlation is not None:
            self.deeds.setdefault(outgoing.correlation.decode(), []).append(Deed(self.loop.time(), ok))

    def say(self, topic: str, said: object) -> None:
        payload = json.dumps(said).encode()
        for _ in range(1 + (self.random.random() < 0.2)):
            if self.random.random() > 0.1:
                message = Message(topic=topic, payload=payload)
                later = self.random.uniform(0.001, 0.8)
                self.loop.call_later(later, self.bench.core.intake.message, message)


async def run(bench: Bench, loop: SimLoop, seed: int) -> list[str]:
    """Runs one world; returns what broke the rules."""
    far = Far(bench, loop, seed)
    await asyncio.sleep(2.5)
    for hardware_id, kind in (("b1", "bell"), ("shelly", "shelly_gen2"), ("lamp", "zigbee2mqtt")):
        await bench.core.registry.register(ME, NewDevice(hardware_id=hardware_id, type=kind, project=PROJECT))
    far.say("shelly/online", True)

    async def report() -> None:  # the lamp says its state all the time, whatever is asked of it
        while True:
            await asyncio.sleep(far.random.uniform(0.001, 0.05))
            message = Message(topic="zigbee2mqtt/lamp", payload=json.dumps({"state": far.lamp}).encode())
            bench.core.intake.message(message)

    async def receipts() -> None:
        while True:
            await asyncio.sleep(0.05)
            while bench.wire.due:
                bench.wire.receipt(Receipt(written=True, reason=0))

    reporting, taking = asyncio.create_task(report()), asyncio.create_task(receipts())
    ordered = []
    for _ in range(10):
        for device, names in COMMANDS.items():
            ordered.append((await bench.order(device, far.random.choice(names), ttl_sec=200)).id)
        await asyncio.sleep(far.random.uniform(0.1, 3))
    reporting.cancel()
    await asyncio.sleep(LAST_SEC)
    taking.cancel()
    return [fault for command_id in ordered for fault in judged(bench, far, command_id)]


def judged(bench: Bench, far: Far, command_id: str) -> list[str]:
    """What is wrong with the end of one command."""
    state = bench.live.command(command_id)
    assert state is not None
    start = bench.writer.now() / 1_000 - far.loop.time()  # of the loop's clock, in broker time
    ended = (state.closed_at or 0) / 1_000 - start
    deeds = [deed for deed in far.deeds.get(command_id, []) if deed.at <= ended + 0.002]
    found = []
    if not state.closed:
        found.append(f"{command_id} on {state.hardware_id} never ended")
    if state.state == "executed" and not any(deed.ok for deed in deeds) and state.hardware_id != "lamp":
        found.append(f"{command_id} on {state.hardware_id} is executed, but the device did not do it")
    if state.state == "failed" and all(deed.ok for deed in deeds):
        found.append(f"{command_id} on {state.hardware_id} is failed, but the device did not refuse it")
    if state.state == "executed" and ended + 0.002 < far.sent.get(command_id, ended + 1):
        found.append(f"{command_id} on {state.hardware_id} is executed before its bytes left")
    return found


def world(seed: int) -> list[str]:
    async def one(loop: SimLoop) -> list[str]:
        async with on_virtual_time(loop, types={"bell": BELL}, embedded=False) as (bench, _):
            return await run(bench, loop, seed)

    return simulated(one, seed)


def test_the_correct_version_breaks_no_rule() -> None:
    assert [fault for seed in SEEDS for fault in world(seed)] == []


def _same_number(self: Encoder, member: Any) -> int | None:
    speech = member.definition.speech
    return 7 if speech is not None and speech.numbered else None


def _any_state(lane: lanes.Lane, arrived_at: int) -> list[lanes.Member]:
    return [member for member in lane.members.values() if member.state.state == "published"]


def _last_rule_first(given: Any, *rest: Any) -> Any:
    return read(tuple(reversed(given)), *rest)


read = rules.read
BUGS: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("number reused", Encoder, "number", _same_number),
    ("state older than the command taken as done", answerable, "observable", _any_state),
    ("rule order ignored", reading, "read", _last_rule_first),
]


@pytest.mark.parametrize(("what", "place", "name", "bug"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, what: str, place: Any, name: str, bug: Callable[..., Any]
) -> None:
    monkeypatch.setattr(place, name, bug)
    assert any(world(seed) for seed in SEEDS), what
