"""Builders for the core's tests, and the real core on a real log without an MQTT server.

The test acts as the far end of the link: it sees every publish and decides its receipt. Nothing here replaces
a part of the broker, and nothing here knows the life-cycle table.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from broker.core import Core
from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Created,
    Error,
    Event,
    Executed,
    Expired,
    Failed,
    Published,
    Recorded,
    TimedOut,
)
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState, State, evolve
from broker.engine.commands import Accepted, Caller, Order
from broker.engine.registry import NewDevice
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.seams import Batch, Clock, Message, Outbound, Outgoing, Placed, Receipt, Sql, Sqlite, Storage
from broker.settings import Limits, Settings
from broker.world import SqliteStorage, SystemClock
from devices.types import Definition, DeviceType, shipped_types
from tests.reading import plain, tamper
from tests.simulation.disk import SimDisk, SimStorage
from tests.simulation.loop import SimClock, SimLoop
from tests.simulation.loop import run as simulation

R = TypeVar("R")

T = 1_800_000_000_000
COMMAND = "cmd_01h455vb4pex5vsknk084sn02q"
DEVICE = "dev_1"
PROJECT = "acme"
ME = Caller(actor="key:key_1", project=PROJECT)
TAKEN = Receipt(written=True, reason=0)
UNKNOWN = Receipt(written=True, reason=None)

# --- pure ------------------------------------------------------------------------------------------

PUBLISHED = Published(attempt=1)
WAYS: dict[State, tuple[Event, ...]] = {
    State.PENDING: (),
    State.PUBLISHED: (PUBLISHED,),
    State.ACKNOWLEDGED: (PUBLISHED, Acknowledged()),
    State.TIMED_OUT: (PUBLISHED, TimedOut(reason="no_answer")),
    State.EXECUTED: (PUBLISHED, Executed(result=msgspec.Raw(b'{"open":1}'))),
    State.FAILED: (PUBLISHED, Failed(error=Error(code="jammed", message="it is jammed"))),
    State.EXPIRED: (Expired(),),
    State.CANCELLED: (Cancelled(by="key:key_1"),),
}


def definition(**changes: Any) -> Definition:
    return Definition(**{"device_type": "generic", "command": "open"} | changes)


def created(**changes: Any) -> Created:
    fields: dict[str, Any] = {
        "hardware_id": "lamp-1",
        "type": "open",
        "device_type": "generic",
        "definition": "d1",
        "topic": "iotee/dev/lamp-1/rls",
        "params": msgspec.Raw(b"{}"),
    }
    if (ttl_ms := changes.pop("ttl_ms", None)) is not None:
        fields |= {"ttl_ms": ttl_ms, "expires_at": T + ttl_ms}
    return Created(**fields | changes)


def recorded(event: Event, version: int, at: int = T, stream: str = COMMAND) -> Recorded:
    return Recorded(
        position=version,
        stream=stream,
        version=version,
        recorded_at=at,
        decided_at=at,
        project=PROJECT,
        device_id=DEVICE,
        actor="key:key_1",
        event=event,
    )


def folded(
    *events: Event | tuple[Event, int], first: Created | None = None, id: str = COMMAND
) -> CommandState:
    """A command after `created` and these events. A tuple (event, ms) sets the event's time to T + ms."""
    state = evolve(None, recorded(first or created(), 1, stream=id))
    for entry in events:
        event, after = entry if isinstance(entry, tuple) else (entry, 0)
        state = evolve(state, recorded(event, state.version + 1, T + after, id))
    return state


def command_in(state: State, **first: Any) -> CommandState | None:
    """A command brought to a state by the shortest sequence of events; None for `none`."""
    return None if state is State.NONE else folded(*WAYS[state], first=created(**first))


# --- the world -------------------------------------------------------------------------------------


class ManualClock:
    """Wall and monotonic time change only when a test moves them."""

    def __init__(self, wall: int = T, monotonic: int = 50_000) -> None:
        self.wall, self.monotonic = wall, monotonic

    def wall_ms(self) -> int:
        return self.wall

    def monotonic_ms(self) -> int:
        return self.monotonic

    def pass_ms(self, ms: int) -> None:
        self.wall += ms
        self.monotonic += ms


STEP_MS = 5


@asynccontextmanager
async def by_turns() -> AsyncIterator[ManualClock]:
    """A clock that starts now and moves by the turns of the loop. On a machine so busy that the loop stands
    still for seconds, a real clock would bring a second attempt in the middle of a test."""
    clock = ManualClock(SystemClock().wall_ms())

    async def ticks() -> None:
        while True:
            await asyncio.sleep(STEP_MS / 1_000)
            clock.pass_ms(STEP_MS)

    ticking = asyncio.create_task(ticks())
    try:
        yield clock
    finally:
        ticking.cancel()


class SeededEntropy:
    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


class Wire:
    """A link whose far end is the test. It lists what was handed over, the receipts due, and the PUBACKs
    sent."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[Outgoing] = []
        self.due: list[tuple[Outgoing, Callable[[Receipt], None]]] = []
        self.pubacks: list[Message] = []
        self.said: list[int] = []  # the reasons of those
        self.direct = False
        self.unheard: set[str] = set()  # topics that nobody has subscribed to
        self.on_publish: Callable[[Outgoing], None] = lambda _: None

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        if self.up:
            self.on_publish(outgoing)
            self.sent.append(outgoing)
            self.due.append((outgoing, done))
        return self.up

    def listens(self, topic: str) -> bool:
        return topic not in self.unheard

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        self.said.append(reason)
        self.pubacks.append(msgspec.structs.replace(message, arrived_at=0))

    def receipt(self, receipt: Receipt = TAKEN) -> None:
        """Delivers a receipt for the oldest publish that has none."""
        _, done = self.due.pop(0)
        done(receipt)


class Bench:
    """A running core with the operations that tests need."""

    def __init__(self, core: Core, wire: Wire) -> None:
        self.core, self.wire = core, wire
        self.writer, self.live = core.writer, core.live

    async def device(
        self, hardware_id: str = "lamp-1", type: str = "generic", *, online: bool = True
    ) -> DeviceState:
        device, *_ = await self.core.registry.register(
            ME, NewDevice(hardware_id=hardware_id, type=type, project=PROJECT)
        )
        if online:
            self.core.intake.device_online(hardware_id)
            await until(lambda: self.live.presence.get(device.id) == "online")
            await self.writer.barrier()
        return device

    async def order(self, device: str = "lamp-1", type: str = "open", **fields: Any) -> CommandState:
        return (await self.accepted(device, type, **fields)).state

    async def accepted(self, device: str = "lamp-1", type: str = "open", **fields: Any) -> Accepted:
        return await self.core.commands.create(ME, Order(device=device, type=type, **fields))

    def says(self, payload: bytes, hardware_id: str = "lamp-1", **fields: Any) -> Message:
        """Sends an answer of the device to the core."""
        message = Message(topic=f"iotee/dev/{hardware_id}/ack", payload=payload, **fields)
        self.core.intake.message(message)
        return message

    def answers(
        self, command_id: str, status: str = "executed", hardware_id: str = "lamp-1", **said: Any
    ) -> Message:
        return self.says(msgspec.json.encode({"id": command_id, "status": status} | said), hardware_id)

    def state(self, command_id: str) -> str:
        found = self.live.command(command_id)
        return "forgotten" if found is None else found.state.value

    async def becomes(self, command_id: str, state: str, within_sec: float = 120) -> CommandState:
        await until(lambda: self.state(command_id) == state, within_sec)
        await self.writer.barrier()
        found = self.live.command(command_id)
        assert found is not None
        return found

    async def rows(self) -> list[Row]:
        return await self.writer.storage.read(log.all_rows)

    async def types(self, stream: str) -> list[str]:
        return [row.type for row in await self.writer.storage.read(lambda sql: log.stream(sql, stream))]

    async def unmatched(self) -> list[str]:
        def work(sql: Sqlite) -> list[str]:
            return [row[0] for row in sql.execute("SELECT reason FROM unmatched ORDER BY id").fetchall()]

        return await self.writer.storage.read(plain(work))


async def until(fact: Callable[[], bool], within_sec: float = 120) -> None:
    """Waits for a fact. Other tasks and the database's thread run meanwhile."""
    async with asyncio.timeout(within_sec):
        while not fact():  # noqa: ASYNC110 (facts are of many kinds)
            await asyncio.sleep(within_sec / 50_000)


def new_core(
    storage: Storage,
    clock: Clock | None = None,
    limits: Limits | None = None,
    seed: int = 1,
    types: dict[str, DeviceType] | None = None,
    outbound: Outbound | None = None,
    *,
    mqtt_events: bool = False,
) -> Core:
    settings = Settings(limits=limits or Limits(), mqtt_events=mqtt_events)
    known = shipped_types() | (types or {})
    return Core(storage, clock or SystemClock(), SeededEntropy(seed), known, settings, outbound)


@asynccontextmanager
async def running(
    place: Path | Storage,
    clock: Clock | None = None,
    limits: Limits | None = None,
    seed: int = 1,
    types: dict[str, DeviceType] | None = None,
    outbound: Outbound | None = None,
    *,
    mqtt_events: bool = False,
    embedded: bool = True,
) -> AsyncIterator[Bench]:
    """A core with its link up, on a directory or on a storage that the test owns. `clock`: by default one
    that moves by the turns of the loop."""
    async with AsyncExitStack() as stack:
        storage = await SqliteStorage.open(place) if isinstance(place, Path) else place
        if isinstance(place, Path):
            stack.push_async_callback(storage.close)
        clock = clock or await stack.enter_async_context(by_turns())
        core = new_core(storage, clock, limits, seed, types, outbound, mqtt_events=mqtt_events)
        await core.open(embedded=embedded)
        wire = Wire()
        core.attach(wire)
        await stack.enter_async_context(core.running("embedded" if embedded else "external"))
        core.intake.link_up()
        yield Bench(core, wire)


class Held:
    """A storage whose commits wait until the test opens `gate`. Reads are not delayed."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.gate = asyncio.Event()
        self.gate.set()
        self.commits = 0
        self.waiting = 0
        self.term = storage.term

    def number(self) -> int:
        return self.storage.number()

    async def append(self, batch: Batch) -> Placed:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        self.commits += 1
        return await self.storage.append(batch)

    async def landed(self, number: int) -> Placed | None:
        return await self.storage.landed(number)

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        await self.storage.prepare(log_id, cursor_key)

    async def write(self, work: Callable[[Sqlite], R]) -> R:
        return await tamper(self.storage, work)

    async def rebuild(self) -> None:
        await self.storage.rebuild()

    async def read(self, work: Callable[[Sql], Awaitable[R]]) -> R:
        return await self.storage.read(work)

    async def forget_old_pages(self) -> bool:
        return await self.storage.forget_old_pages()

    async def close(self) -> None:
        await self.storage.close()


def simulated(world: Callable[[SimLoop], Coroutine[Any, Any, R]], seed: int = 0) -> R:
    """Runs a world on the virtual clock, where waiting takes no real time."""
    return simulation(world, seed)


@asynccontextmanager
async def on_virtual_time(
    loop: SimLoop,
    limits: Limits | None = None,
    outbound: Outbound | None = None,
    types: dict[str, DeviceType] | None = None,
    *,
    embedded: bool = True,
    disk: SimDisk | None = None,
) -> AsyncIterator[tuple[Bench, SimDisk]]:
    """`disk`: one that an earlier core has used."""
    disk = disk or SimDisk(loop)
    storage = SimStorage(loop, disk)
    clock = SimClock(loop)
    async with running(storage, clock, limits, types=types, outbound=outbound, embedded=embedded) as bench:
        yield bench, disk
