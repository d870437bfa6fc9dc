"""An MQTT server that drops, delays, repeats, changes and invents messages, together with one device that was
taken over, against a real broker and two honest devices.

Whatever those two do: no honest device executes anything that was not ordered from it, twice or after its
end, and the log never says that an honest device said something that it did not say. The server knows every
token, because tokens are MQTT passwords, and every message. It has the keys of the device that was taken
over. Both honest devices check grants and sign their answers, one with Ed25519 and one with HMAC.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.domain.errors import Refusal
from broker.domain.events import Acknowledged, Created, Executed, Failed, Progressed, Recorded
from broker.engine.commands import Caller
from broker.engine.registry import NewDevice
from broker.log import sqlite as log
from broker.operations.redecide import redecide
from broker.seams import Message, Receipt
from devices.core import Core, Effect, Send
from devices.grant import GrantVerifier, keys_from_jwks, secret_key
from devices.memory import RamMemory
from devices.speech.signing import sign
from devices.types import DeviceType, load_type
from devices.wire import CommandMessage, decode_answer
from tests.integration.core_support import ME, PROJECT, Bench, on_virtual_time, simulated
from tests.simulation.loop import SimLoop

PLAIN = 'name = "vault"\nopen = true\ntransports = ["mqtt", "relay"]\nmax_in_flight = 2\n'
TYPE = load_type(PLAIN + 'answers_signed = "required"\n')
TRUSTING = load_type(PLAIN)
HONEST, EVIL = ("lamp-1", "lamp-2"), "evil-1"
EVIL_KEY = Ed25519PrivateKey.from_private_bytes(b"e" * 32)
OWN_KEY = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
HANDLERS = {"open": False, "close": False}


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


class Carried(NamedTuple):
    """A message that went through the server."""

    topic: str
    payload: bytes


class Ran(NamedTuple):
    command: CommandMessage
    at: int


class Honest:
    """A device with its memory, and a record of what it truly did and said."""

    def __init__(self, make: Callable[[RamMemory], Core], now: Callable[[], int]) -> None:
        self._make, self._now, self._memory = make, now, RamMemory()
        self.ran: list[Ran] = []
        self.said: list[tuple[str | None, str, Any]] = []
        self.running: CommandMessage | None = None
        self.out: list[Carried] = []
        self.restart()

    def restart(self) -> None:
        self.running, self._core = None, self._make(self._memory)
        self._do(self._core.recover(self._now()))

    def receive(self, message: Carried) -> None:
        self._do(self._core.receive(self._now(), message.topic, message.payload))

    def progress(self, percent: int) -> None:
        if self.running is not None:
            self._do(self._core.progress(self._now(), self.running, percent, None))

    def finish(self, *, well: bool) -> None:
        if (command := self.running) is not None:
            self.running = None
            error = None if well else {"code": "jammed", "message": ""}
            self._do(self._core.finish(self._now(), command, {"n": len(self.ran)} if well else None, error))

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                answer = decode_answer(effect.payload, None, {})
                told = answer.progress.percent if answer.progress else answer.result or answer.error
                self.said.append((answer.id, answer.status, told))
                self.out.append(Carried(effect.topic, effect.payload))
            else:
                self.running = effect.command
                self.ran.append(Ran(effect.command, self._now()))


class Town:
    """The broker, the devices, and the server between them, which does what the test draws."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.devices: dict[str, Honest] = {}
        self.tokens: dict[str, Caller] = {}
        self.known: list[Carried] = []  # every message so far
        self.waiting: list[Carried] = []  # those that nobody got yet
        self.orders: dict[str, tuple[str, str, Any, int | None]] = {}
        bench.wire.on_publish = lambda sent: self.carry(Carried(sent.topic, sent.payload))

    async def open(self, kind: DeviceType, *, grants: bool = True) -> None:
        now = self.bench.writer.clock.wall_ms
        keys = keys_from_jwks(self.bench.core.grants.jwks())
        for name, own in ((HONEST[0], OWN_KEY), (HONEST[1], None), (EVIL, EVIL_KEY)):
            key = None if own is None else text(public(own))
            new = NewDevice(hardware_id=name, type=kind.name, project=PROJECT, answer_key=key)
            device, _, secret = await self.bench.core.registry.register(ME, new)
            self.tokens[name] = Caller(actor=f"device:{device.id}", project=PROJECT, device_id=device.id)
            signs = own if secret is None else secret_key(secret)
            if name != EVIL:
                verifier = GrantVerifier(keys, "ordain", name, lambda: now() / 1_000) if grants else None
                unsigned = kind.answers_signed == "none"

                def make(
                    memory: RamMemory,
                    name: str = name,
                    verifier: GrantVerifier | None = verifier,
                    signs: Any = None if unsigned else signs,
                ) -> Core:
                    return Core(name, kind, memory, HANDLERS, verifier=verifier, signs_with=signs)

                self.devices[name] = Honest(make, now)

    def carry(self, message: Carried) -> None:
        self.known.append(message)
        self.waiting.append(message)

    def deliver(self, message: Carried, *, retain: bool = False, dup: bool = False) -> None:
        owner, suffix = message.topic.split("/")[2:4]
        if suffix == "rls" and owner in self.devices:
            self.devices[owner].receive(message)
        elif suffix != "rls":
            self.bench.core.intake.message(
                Message(topic=message.topic, payload=message.payload, retain=retain, dup=dup, qos=1)
            )

    async def settle(self, pause_sec: float = 0.05) -> None:
        while self.bench.wire.due:
            self.bench.wire.receipt()
        await asyncio.sleep(pause_sec)
        await self.bench.writer.barrier()
        for device in self.devices.values():
            while device.out:
                self.carry(device.out.pop(0))

    async def order(self, name: str, kind: str, ttl_sec: int | None) -> None:
        params = {"n": len(self.orders)}
        command = await self.bench.order(name, kind, params=params, ttl_sec=ttl_sec)
        self.orders[command.id] = (name, kind, params, command.expires_at)

    async def over_http(self, name: str, command_id: str, status: str, signed: str | None) -> None:
        """The server uses the token that it was given as a password."""
        try:
            await self.bench.core.pull.report(self.tokens[name], name, command_id, status, signed=signed)
        except Refusal:
            return

    # --- the verdict ---

    def executed_wrongly(self) -> list[str]:
        found = []
        for name, device in self.devices.items():
            done = [ran.command.id for ran in device.ran]
            found += [f"{name} ran {each} twice" for each in {each for each in done if done.count(each) > 1}]
            for command, at in device.ran:
                *ordered, ends = self.orders.get(command.id, ("", "", None, None))
                if ordered != [name, command.type, command.params]:
                    found.append(f"{name} ran {command}, which was not ordered from it")
                elif ends is not None and at >= ends:
                    found.append(f"{name} ran {command.id} {at - ends} ms after its end")
        return found

    async def recorded_wrongly(self) -> list[str]:
        """What the log says that an honest device said, and it never did."""
        rows = await self.bench.rows()
        events = [log.recorded(row) for row in rows]
        owners = {each.stream: each.event.hardware_id for each in events if isinstance(each.event, Created)}
        found = []
        for name, device in self.devices.items():
            told = iter(device.said)
            for each in events:
                if owners.get(each.stream) != name or (claim := _claim(each)) is None:
                    continue
                if claim not in device.said:
                    found.append(f"{name} never said {claim}")
                elif isinstance(each.event, Progressed) and claim not in told:
                    found.append(f"{name} did not say {claim} after what was recorded before")
        return found + [fault for name in HONEST for fault in self._redecided(events, owners, name)]

    def _redecided(self, events: list[Recorded], owners: dict[str, str], name: str) -> list[str]:
        """Decisions about answers that are not repeated with the same result."""
        lane = [
            each
            for each in events
            if owners.get(each.stream, name) == name
            and each.device_id in (None, self.tokens[name].device_id)
            and each.stream != "audit"
        ]
        steps = [step for step in redecide(lane, 1) if _claim(step.recorded) is not None]
        return [step.fault for step in steps if step.fault is not None]


def _claim(recorded: Recorded) -> tuple[str, str, Any] | None:
    match recorded.event:
        case Acknowledged():
            return recorded.stream, "acknowledged", None
        case Progressed(percent=percent):
            return recorded.stream, "progress", percent
        case Executed(result=result):
            return recorded.stream, "executed", msgspec.json.decode(result)
        case Failed(by="device", error=error):
            details = {} if error.details is None else {"details": error.details}
            return recorded.stream, "failed", {"code": error.code, "message": error.message, **details}
        case _:
            return None


# --- what the server and the device that was taken over can do -------------------------------------

STATUSES = ("acknowledged", "executed", "failed", "progress")


def invented_answer(form: int, status: str, command_id: str, name: str) -> bytes:
    """An answer for a command of another device."""
    said: dict[str, Any] = {"id": command_id, "status": status, "result": {"forged": 1}, "error": "forged"}
    said |= {"progress": {"percent": 99}, "seq": 2**50}
    plain = msgspec.json.encode(said)
    known = public(OWN_KEY)
    claims = msgspec.json.encode({"iss": name} | said)
    none = text(b'{"alg":"none","typ":"answer+jwt"}') + "." + text(claims) + "."
    confused = jwt.PyJWS().encode(claims, known, algorithm="HS256", headers={"typ": "answer+jwt"})
    forms = (
        plain,
        sign(plain, name, EVIL_KEY),
        sign(plain, EVIL, EVIL_KEY),
        none.encode(),
        confused.encode(),
        msgspec.json.encode({key: value for key, value in said.items() if key != "id"}),
        b"executed",
    )
    return forms[form % len(forms)]


def invented_command(form: int, payload: bytes, other: bytes) -> bytes:
    """A command made from two that the server has seen."""
    command, grant = msgspec.json.decode(payload), msgspec.json.decode(other).get("grant")
    own = jwt.encode({"iss": "ordain"}, EVIL_KEY, "EdDSA", headers={"typ": "grant+jwt", "kid": "key"})
    changes: tuple[dict[str, Any], ...] = (
        {"id": command["id"][:-1] + "0"},
        {"params": {"n": 1_000}},
        {"type": "close"},
        {"grant": grant},
        {"grant": None},
        {"grant": own},
        {"expires_at": None},
        {"attempt": 9},
        {"id": msgspec.json.decode(other)["id"]},
    )
    return msgspec.json.encode(command | changes[form % len(changes)])


Move = tuple[str, int, int, int]


async def make(town: Town, move: Move) -> None:
    word, a, b, c = move
    everyone = (*HONEST, EVIL)
    name, victim = everyone[a % 3], HONEST[a % 2]
    commands = [each for each in town.known if each.topic.endswith("/rls")]
    match word:
        case "order":
            await town.order(name, ("open", "close")[b % 2], (1, 30, 300, None)[c % 4])
        case "pass":
            waiting, town.waiting = town.waiting, []
            for message in waiting:
                town.deliver(message)
        case "lose":
            town.waiting = []
        case "wait":
            await asyncio.sleep((1, 11, 70, 400)[a % 4])
        case "repeat" if town.known:
            message = town.known[a % len(town.known)]
            suffix = ("ack", "rls")[b % 2]
            topic = (message.topic, f"iotee/dev/{everyone[b % 3]}/{suffix}")[c % 2]
            town.deliver(Carried(topic, message.payload), dup=bool(c & 2), retain=bool(c & 4))
        case "answer" if town.orders:
            command_id = list(town.orders)[b % len(town.orders)]
            payload = invented_answer(c, STATUSES[a % 4], command_id, victim)
            town.deliver(Carried(f"iotee/dev/{victim}/ack", payload))
        case "command" if commands:
            one, two = commands[a % len(commands)], commands[b % len(commands)]
            town.deliver(Carried(f"iotee/dev/{victim}/rls", invented_command(c, one.payload, two.payload)))
        case "report" if town.orders:
            command_id = list(town.orders)[b % len(town.orders)]
            status = STATUSES[c % 3]
            stolen = [each.payload.decode() for each in town.known if each.payload.startswith(b"eyJ")]
            forged = invented_answer(c, status, command_id, victim).decode()
            signed = (None, forged, stolen[b % len(stolen)] if stolen else None)[a % 3]
            await town.over_http(victim, command_id, status, signed)
        case "steal":
            for fetched in await town.bench.core.pull.fetch(town.tokens[name], name, "relay"):
                town.known.append(_as_message(fetched.state, fetched.grant))
        case "status":
            word = ("online", "offline")[b % 2]
            topic = f"iotee/dev/{name}/status"
            town.deliver(Carried(topic, word.encode()), retain=bool(c & 1))
        case "receipt" if town.bench.wire.due:
            reason = (0, 0x10, 0x87, None)[a % 4]
            town.bench.wire.receipt(Receipt(written=True, reason=reason))
        case "progress":
            town.devices[victim].progress(b % 101)
        case "work":
            town.devices[victim].finish(well=b % 4 > 0)
        case "restart":
            town.devices[victim].restart()


def _as_message(state: Any, grant: str | None) -> Carried:
    message = CommandMessage(
        id=state.id, type=state.type, params=msgspec.json.decode(state.params), grant=grant
    )
    return Carried(f"iotee/dev/{state.hardware_id}/rls", msgspec.json.encode(message))


async def played(
    loop: SimLoop, moves: Sequence[Move], kind: DeviceType = TYPE, *, grants: bool = True
) -> tuple[Town, list[str]]:
    async with on_virtual_time(loop, types={kind.name: kind}, embedded=False) as (bench, _):
        town = Town(bench)
        await town.open(kind, grants=grants)
        await asyncio.sleep(3)  # the first 2 s of a session are its backlog
        for name in (*HONEST, EVIL):
            town.deliver(Carried(f"iotee/dev/{name}/status", b"online"))
        await town.settle()
        for move in moves:
            await make(town, move)
            await town.settle()
        await town.settle(1)
        return town, town.executed_wrongly() + await town.recorded_wrongly()


ALL = ("order", "pass", "lose", "wait", "repeat", "answer", "command", "report", "steal", "status", "receipt")
# Most of the time something happens at all: orders are made, carried and done.
LIKELY = ("order", "pass", "pass", "work", "repeat", "repeat", "answer", "command")
WORDS = (*LIKELY, *ALL, "progress", "work", "restart")
MOVES = st.lists(
    st.tuples(st.sampled_from(WORDS), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)),
    min_size=5,
    max_size=40,
)
GOOD: tuple[Move, ...] = (
    ("order", 0, 0, 3), ("order", 1, 1, 2), ("pass", 0, 0, 0), ("progress", 0, 10, 0), ("pass", 0, 0, 0),
    ("work", 0, 1, 0), ("work", 1, 1, 0), ("pass", 0, 0, 0),
)  # fmt: skip


@settings(max_examples=60)
@given(moves=MOVES)
def test_a_bad_server_and_a_bad_device_make_no_other_device_act_and_nothing_is_recorded_of_it(
    moves: list[Move],
) -> None:
    assert simulated(lambda loop: played(loop, [*GOOD[:3], *moves]))[1] == []


def test_without_attacks_both_devices_do_what_was_ordered_and_the_log_says_so() -> None:
    async def world(loop: SimLoop) -> None:
        town, faults = await played(loop, GOOD)
        assert faults == []
        assert [len(device.ran) for device in town.devices.values()] == [1, 1]
        assert [town.bench.state(each) for each in town.orders] == ["executed", "executed"]

    simulated(world)


@pytest.mark.parametrize("status", [1, 2, 3])  # the devices have acknowledged, so that is no lie
def test_the_checks_find_an_invented_answer_where_answers_are_not_signed(status: int) -> None:
    invented: Move = ("answer", status, status % 2, 0)
    _, faults = simulated(lambda loop: played(loop, [*GOOD[:3], invented], TRUSTING))
    assert any("never said" in fault for fault in faults)


@pytest.mark.parametrize("form", [0, 1, 2, 8])
def test_the_checks_find_an_invented_command_where_grants_are_not_checked(form: int) -> None:
    attack: list[Move] = [*GOOD[:2], ("work", 0, 1, 0), ("command", 0, 1, form)]
    more: list[Move] = [("work", 0, 1, 0), ("work", 0, 1, 0)]
    _, faults = simulated(lambda loop: played(loop, [*attack, *more], grants=False))
    assert any("not ordered" in fault for fault in faults)
