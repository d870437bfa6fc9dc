"""One simulated run from one seed: a broker process on a simulated machine, devices, clients and a nemesis.

The broker is the real `Core` under the real HTTP app; only what is behind the seams is simulated. After the
faults comes a phase without faults. Then the log is read from the disk and the checkers judge the history.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal

import apsw
import msgspec
import structlog

from broker.control import services
from broker.core import Core
from broker.domain.errors import Unavailable
from broker.domain.events import subject_kind
from broker.domain.fleet import DeviceState
from broker.http.app import create_app
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.seams import Broken, Full, Sqlite
from broker.settings import Limits, Settings
from projections import follower
from tests.reading import plain
from tests.simulation.checkers.life import check, s4
from tests.simulation.checkers.timing import FRESH
from tests.simulation.clients import Clients, Door
from tests.simulation.disk import FLAGS, SimDisk, SimStorage
from tests.simulation.fleet import COMMANDS, ISSUER, PREFIX, TYPES, Device
from tests.simulation.history import History
from tests.simulation.link import SimLink
from tests.simulation.loop import EPOCH_MS, Node, SimClock, SimEntropy, SimLoop, no_search, run
from tests.simulation.nemesis import Nemesis
from tests.simulation.network import LATEST_WILL_SEC, MOSQUITTO, ServerKind, SimMqttServer
from tests.simulation.pairs import Pairs
from tests.simulation.phones import Phone
from tests.simulation.pipes import LISTENER, PipeNet
from tests.simulation.readers import READERS, Reader
from tests.simulation.receivers import URLS, Receivers
from tests.simulation.strangers import Stranger
from tests.simulation.tide import ALL, LONGEST_QUIET_SEC, SPELL_SEC, SPELLS, Parts, Tide

SUBSCRIPTIONS = (f"{PREFIX}/dev/+/ack", f"{PREFIX}/dev/+/status")
# Bounds that a run of this size comes near to.
NARROW = Limits(send_slots=2, queue_per_name=2, queue_per_device=5)
LATENCIES = ((0.0002, 0.004), (0.0002, 0.004), (0.003, 0.03), (0.02, 0.2))
FAULT_EVERY_SEC = 40.0
WITH_PAIRS = 0.25  # of the runs
UP_WITHIN_SEC, LONGEST_HEAL_SEC = 60, 7_200
GRACE_SEC = 8  # as `ordain serve` gives open requests
ALL_SCOPES = ("devices:read", "devices:write", "events:read")
FOREVER_SEC = 1e8
# All spells, all quiet stretches and the healing.
LONGEST_SEC = SPELLS[1] * (SPELL_SEC[1] + LONGEST_QUIET_SEC) + 2 * LONGEST_HEAL_SEC
READ_WITHIN_SEC = 5
COPY = "file:/backup?vfs=memdb"  # there as long as it is open
BACKED_UP = 0.01  # of the commits
# Log events that show a bug under any fault.
WRONG = ("intake.failed", "http.unexpected", "webhook.failed")
AFTERWARDS = "Event loop is closed"  # the error of tasks that are still running when the simulation ends

Synchronous = Literal["FULL", "NORMAL"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one run. Two runs whose `trace` differs were not the same."""

    seed: int
    found: list[str]
    trace: int
    steps: int
    history: History
    log: list[str]
    asked: tuple[str, ...]  # names of its parts, for `Parts.only`
    virtual_sec: float
    cpu_sec: float


class World:
    """The parts of one run, and the starts and ends of the broker's process."""

    def __init__(
        self,
        loop: SimLoop,
        synchronous: Synchronous = "FULL",
        kind: ServerKind | None = None,
        parts: Parts = ALL,
    ) -> None:
        self.loop = loop
        draw = loop.rng("world")
        self.clock = SimClock(loop)
        self.tide = Tide(loop, parts)
        self.history = History(self.clock.true_ms, loop.note)
        self.disk = SimDisk(loop)
        kind = draw.choice((LISTENER, MOSQUITTO)) if kind is None else kind
        self.server = (
            PipeNet(loop, history=self.history)
            if kind is LISTENER
            else SimMqttServer(loop, kind, history=self.history)
        )
        self.embedded = not self.server.kind.keeps_sessions
        kinds = ["generic", "recorder", "iotee_device", "tag", "siren"]
        kinds += [draw.choice(["generic", "recorder", "tag"]) for _ in range(3)]
        self.devices = [
            Device(loop, self.server, self.history, self.tide, f"hw{number}", kind)
            for number, kind in enumerate(kinds[: min(parts.devices, draw.randint(4, 8))], 1)
        ]
        self.door = Door(loop, self.history)
        self.receivers = Receivers(loop, self.history)
        self.webhooks: list[str] = []
        # Not every run has everything: fewer parts give more runs, and other mixtures.
        names = list(READERS)[: draw.choice((0, 1, 2, 2))]
        self.readers = [
            Reader(loop, self.door, self.tide, self.history, name)
            for name in names
            if self.tide.allows(f"reader of {name}")
        ]
        self.clients: Clients
        self.phones: list[Phone] = []
        self.core: Core | None = None
        self.found: list[str] = []
        self._node: Node | None = None
        self._lives = 0
        self._seen = 0  # the last position whose data this process recorded in the history
        self._rows: dict[Row, dict[str, Any]] = {}  # of the last dump: most are the same in the next one
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._latency = draw.choice(LATENCIES)
        self._synchronous: Synchronous = synchronous
        self.limits = draw.choice((Limits(), NARROW))
        self.history.most = self.limits.queue_per_device, self.limits.queue_per_name
        self._mqtt_events = not self.embedded and draw.random() < 0.4
        self.history.mqtt_events = self._mqtt_events
        self._backups = loop.rng("backups")
        self._ending = False  # the next end of the process is the last
        self.stranger: Stranger
        self._draw = draw
        self.server.up = not self.embedded

    # --- the broker's process ---

    def start(self) -> None:
        if self._node is not None:
            return
        self._lives += 1
        self._node = Node("broker")
        task = self.loop.spawn(self._node, self._live(self._node))
        task.add_done_callback(self._process_ended, context=contextvars.Context())

    async def _live(self, node: Node) -> None:
        storage = SimStorage(
            self.loop,
            self.disk,
            synchronous=self._synchronous,
            latency=self._latency,
            checkpoint_pages=100,
            on_commit=self._committed,
            on_write=lambda began, ok: self.history.wrote(EPOCH_MS + began, ok=ok),
        )
        self._seen = 0
        entropy = SimEntropy(self.loop, f"broker/{self._lives}")
        settings = Settings(prefix=PREFIX, issuer=ISSUER, mqtt_events=self._mqtt_events, limits=self.limits)
        core = Core(storage, self.clock, entropy, TYPES, settings, self.receivers)
        # Small batches and pauses, so that many faults come in the middle of a purge.
        core.tick_sec = self._draw.choice((1.0, 4.0, 4.0))
        core.erasures.batch, core.erasures.pause_sec = 4, self._draw.uniform(0, 20)
        await core.open(embedded=self.embedded)
        async with core.running("embedded" if self.embedded else "external") as group:
            close = await self._linked(core, group)
            parts = services(core)
            self.core, self.door.listening = core, (node, create_app(parts))
            self.history.lived("up")
            await self._stop.wait()
            self.history.lived("stopping")
            self.door.listening = None  # like a server that takes no new connection
            parts.streams.close()
            parts.waits.close()
            await self.door.answered(GRACE_SEC)
            await close()
        await storage.close()

    async def _linked(self, core: Core, group: asyncio.TaskGroup) -> Callable[[], Awaitable[None]]:
        """Connects the core to its MQTT server, or lets devices connect to it; returns how that ends."""
        if isinstance(self.server, PipeNet):
            listener = self.server.listen(core, PREFIX)
            core.attach(listener)

            def entitled(device: DeviceState) -> None:
                if device.version > 1:
                    listener.disconnect(device.hardware_id)

            core.registry.entitled = entitled
            listener.start()
            self.history.linked(True)
            self.server.open()
            return listener.close
        link = SimLink(self.server, core.intake, SUBSCRIPTIONS)
        link.most = self.limits.send_slots
        core.attach(link)
        group.create_task(link.run())

        async def close() -> None:
            link.close()

        return close

    def _committed(self, connection: apsw.Connection) -> None:
        new = "SELECT position, data FROM events WHERE position > ? ORDER BY position"
        rows: Any = connection.execute(new, (self._seen,)).fetchall()
        for position, data in rows:
            if data is not None:
                self.history.recorded(position, data)
            self._seen = position
        self.history.committed(self._seen)
        if self._backups.random() < BACKED_UP:
            self.history.backed_up(backup(connection))

    def _process_ended(self, task: asyncio.Task[None]) -> None:
        """The process ended by itself: on request, or because its storage failed."""
        error = task.exception()
        if error is None:
            self.history.lived("ended")
            if self._ending:
                self._ended.set()
            else:
                self._stop.clear()
                self.crash()
            return
        self.history.said(f"the broker ended: {error!r}")
        for cause in _leaves(error):
            full = isinstance(cause, (Full, Unavailable)) and self.disk.capacity is not None
            if not full and not (isinstance(cause, Broken) and self.disk.stopped):
                self.found.append(f"O3: the broker ended by {cause!r}")
        if not self.disk.stopped:  # otherwise the stop of the disk kills the process anyway
            self.crash()

    def crash(self, *, power: bool = False) -> None:
        """Kill -9 or a power cut, and a restart 0.1 to 10 s later."""
        node, self._node, self.core = self._node, None, None
        if node is None:
            return
        self.door.reset()
        self.history.lived("down")
        self._stop.clear()
        self.loop.kill(node)
        self.disk.lose_process()
        if power:
            self.disk.lose_power()
        if self.embedded:
            self.server.restart("lost", FOREVER_SEC)
            self.history.linked(False)
        self.inspect()
        self.loop.call_later(self._draw.uniform(0.1, 10), self.start, context=contextvars.Context())

    def stop(self) -> None:
        """SIGTERM, and a restart."""
        if self.core is not None:
            self._stop.set()

    def hold(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after some time."""
        node = self._node
        if node is None or node.held is not None:
            return
        self.history.lived("paused")
        self.loop.hold(node)

        def go_on() -> None:
            if node.alive and node.held is not None:
                self.history.lived("resumed")
            self.loop.go_on(node)

        self.loop.call_later(seconds, go_on, context=contextvars.Context())

    def fill(self, room: int = 0) -> None:
        """The disk has room for this many bytes more."""
        self.disk.capacity = sum(len(file.data) for file in self.disk.files.values()) + room
        self.history.lived("full")

    def make_room(self) -> None:
        if self.disk.capacity is not None:
            self.disk.capacity = None
            self.history.lived("room")

    def inspect(self) -> None:
        """Reads the log from the disk of a stopped machine: checks the chain and compares the projections
        with rebuilt ones."""
        capacity, self.disk.capacity = self.disk.capacity, None
        sql = self.disk.connect()
        try:
            if sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'commands'").fetchone() is None:
                return
            rows = read_now(sql, log.all_rows)
            self._rows = {row: self._rows.get(row) or _row(row) for row in rows}
            self.history.dumped([*self._rows.values()])
            fault = read_now(sql, log.verify).fault
            if fault is not None:
                self.found.append(f"S3: {fault}")
            kept = read_now(sql, follower.dump)
            sql.execute("BEGIN")
            try:
                follower.rebuild(sql)
                self.found += s4(kept, read_now(sql, follower.dump))
            except ValueError as error:
                self.found.append(f"S4: the log cannot be folded: {error}")
            sql.execute("ROLLBACK")
        finally:
            sql.close()
            self.disk.capacity = capacity

    # --- the run ---

    async def live_through(self) -> None:
        await self.furnish()
        clients = min(self.tide.parts.clients, self._draw.randint(1, 4))
        self.clients = Clients(self.loop, self.door, self.tide, self.devices, clients, pause=8.0 * clients)
        self.clients.stranger = self.stranger
        nemesis = Nemesis(self, FAULT_EVERY_SEC)
        self.loop.create_task(nemesis.run())
        pairs = Pairs(self)
        if self.loop.rng("parts").random() < WITH_PAIRS:
            self.loop.create_task(pairs.run())
        await self.tide.run()
        self.history.said("heal")
        self.tide.end()
        nemesis.heal()
        pairs.heal()
        self.clients.stopped = True
        await self.end()

    async def end(self) -> None:
        """Waits until all commands are closed, stops the broker in order and reads its log."""
        await self._heal()
        await self._core().storage.read(plain(self._compare_live_state))
        self.history.ended_at = self._core().writer.now()
        self._ending = True
        self._stop.set()
        async with asyncio.timeout(UP_WITHIN_SEC):
            await self._ended.wait()
        self._node = None
        self.inspect()

    async def furnish(self) -> None:
        """Starts the broker and creates keys, devices and webhooks, before any fault."""
        self.start()
        await self.loop.until(lambda: self.core is not None and self.core.link.up, "the broker did not start")
        core, node = self._core(), self._node
        assert node is not None
        key, self.door.secret = await self.loop.spawn(node, core.keys.create("acme", ("admin",), None))
        self.history.secret("acme", self.door.secret, key.actor)
        rival, secret = await self.loop.spawn(node, core.keys.create("rival", ALL_SCOPES, None))
        self.history.secret("rival", secret, rival.actor)
        self.stranger = Stranger(self.loop, self.door, secret)
        await self.stranger.furnish()
        for device in self.devices:
            body = {"hardware_id": device.hardware_id, "type": device.kind}
            call = await self.door.call("register", "POST", "/v1/devices", body)
            assert call.status == 201, call
            device.jwks = core.grants.jwks()
            device.door, device.token = self.door, call.answer["device_token"]
            self.history.secret(f"{device.hardware_id}'s token", device.token)
            device.start()
        hooks = list(zip(URLS, ([], ["created", "executed", "online"]), strict=True))
        for url, events in hooks[: self._draw.choice((0, 1, 2, 2))]:
            if not self.tide.allows(f"webhook of {url}"):
                continue
            call = await self.door.call(
                "webhook", "POST", "/v1/webhooks", {"url": url, "events": events, "project": "acme"}
            )
            assert call.status == 201, call
            self.webhooks.append(call.answer["id"])
        for reader in self.readers:
            reader.start()
        self.phones = [
            Phone(self.loop, self.door, self.tide, self.devices, number)
            for number in range(self._draw.randint(0, 2))
            if self.tide.allows(f"phone {number}")
        ]
        for phone in self.phones:
            phone.start()

    async def _heal(self) -> None:
        """Waits until the broker is healthy, then until all commands are closed (at most
        LONGEST_HEAL_SEC)."""
        if self.disk.armed:
            self.crash()
        await self.loop.until(
            lambda: self._node is not None and self.core is not None, "the broker did not start"
        )
        self.clock.offset_ms = max(0, self._core().writer.now() - self.clock.true_ms())
        await self.loop.until(self._healthy, "the broker did not get ready")
        self.history.healed_at = self._core().writer.now()
        self._core().erasures.pause_sec = 0
        with suppress(AssertionError):  # the checkers judge the commands that are still open
            await self.loop.until(lambda: not self._open_commands(), "", LONGEST_HEAL_SEC, every=5)
        await self._refresh()
        await asyncio.sleep(130)  # longer than the longest delay of a late message (120 s)
        for webhook in self.webhooks:
            call = await self.door.call("change", "POST", f"/v1/webhooks/{webhook}/resume")
            assert call.status == 200, call
        await self.loop.until(self._all_sent, "the webhooks were not sent", LONGEST_HEAL_SEC, every=1)
        for reader in self.readers:
            reader.heal()
        head = self._core().feed.head
        await asyncio.sleep(READ_WITHIN_SEC)
        self.history.hooked_until = head
        for reader in self.readers:
            reader.stop()

    async def _refresh(self) -> None:
        """Now that all is well: every device connects again and gets a command, and then the broker does."""
        for device in self.devices:
            if "mqtt" in device.transports:
                device.port.drop()
        await self._fresh("device")
        await asyncio.sleep(LATEST_WILL_SEC + 60)
        link = self.server.connection("ordain")
        if link is not None:
            link.close("cut")
        await self._fresh("link")

    async def _fresh(self, why: str) -> None:
        for device in self.devices:
            name = next(iter(COMMANDS[device.kind]))
            body = {
                "type": name,
                "params": COMMANDS[device.kind][name],
                "ttl_sec": 100 if "mqtt" in device.transports else 900,
            }
            path = f"/v1/devices/{device.hardware_id}/commands"
            await self.door.call("create", "POST", path, body, key=f"{FRESH}{why}-{device.hardware_id}")

    def _healthy(self) -> bool:
        core, node = self.core, self._node
        runs = node is not None and node.held is None
        return runs and core is not None and core.writer.open and core.link.up and not core.dispatch.halted

    def _all_sent(self) -> bool:
        webhooks = self._core().webhooks
        return webhooks.lag() == 0 and webhooks.stopped() == 0

    def _open_commands(self) -> int:
        return sum(len(lane.members) for lane in self._core().live.lanes.values())

    def _core(self) -> Core:
        assert self.core is not None
        return self.core

    def _compare_live_state(self, sql: Sqlite) -> None:
        """L6: the state in memory equals the fold of the log."""
        live, folded = self._core().live, follower.Fold()
        try:
            for row in read_now(sql, log.all_rows):
                if row.data is not None or subject_kind(row.stream) != "command":
                    folded.fold(log.recorded(row))
        except ValueError as error:
            self.found.append(f"L6: the log cannot be folded: {error}")
        for command_id, state in folded.commands.items():
            known = live.command(command_id)
            if known is not None and msgspec.json.encode(known) != msgspec.json.encode(state):
                self.found.append(f"L6: {command_id} is {known} in memory and {state} by the log")
            if known is None and not state.closed:
                self.found.append(f"L6: {command_id} is open and not in memory")


def backup(connection: apsw.Connection) -> list[dict[str, Any]]:
    """The log in a copy that is made as `ordain backup` does. The copy is in memory, so it fills no disk."""
    with closing(apsw.Connection(COPY, flags=FLAGS)) as copy:
        log.copy(connection, COPY)
        return [_row(row) for row in read_now(copy, log.all_rows)]


def simulate(
    seed: int,
    *,
    synchronous: Synchronous = "FULL",
    kind: ServerKind | None = None,
    parts: Parts = ALL,
) -> Outcome:
    """One whole run. The result lists violations as sentences that start with the invariant's name."""
    logged: list[str] = []

    async def main(loop: SimLoop) -> World:
        world = World(loop, synchronous, kind, parts)
        try:
            await world.live_through()
        except AssertionError as error:
            world.found.append(f"L4: {error}")
            world.inspect()
        return world

    began = time.process_time()
    with quiet(logged), no_search():
        world = run(main, seed, max_time=LONGEST_SEC)
        world.history.lines = logged
        found = [*world.found, *world.door.failures, *check(world.history)]
    if isinstance(world.server, PipeNet):
        found += world.server.still_half_open()
    found += [f"LOG: {line}" for line in logged if line.startswith(WRONG) and AFTERWARDS not in line]
    found += [
        f"HTTP: {call.kind} was answered {call.status}: {call.answer}"
        for call in world.history.calls
        if call.status is not None and call.status >= 500 and call.status != 503
    ]
    return Outcome(
        seed=seed,
        found=list(dict.fromkeys(found)),
        trace=world.loop.trace,
        steps=world.loop.steps,
        history=world.history,
        log=logged,
        asked=tuple(world.tide.asked),
        virtual_sec=world.loop.time(),
        cpu_sec=time.process_time() - began,
    )


@contextmanager
def quiet(logged: list[str]) -> Iterator[None]:
    """Collects log lines in a list, because they are part of the observations."""

    def keep(_logger: Any, level: str, event: MutableMapping[str, Any]) -> str:
        logged.append(f"{event.pop('event')} {event}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[structlog.processors.format_exc_info, keep])
    try:
        yield
    finally:
        structlog.configure(**before)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _row(row: Row) -> dict[str, Any]:
    found = row._asdict()
    found["data"] = None if row.data is None else msgspec.json.decode(row.data)
    return found
