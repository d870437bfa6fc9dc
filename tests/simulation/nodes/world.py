"""One simulated run of several nodes from one seed: machines, a database, an MQTT server, devices, clients.

The real nodes, log client, core and HTTP app run; what is behind the seams is simulated. After the faults
come a phase without faults, a last failover, and the checkers.
"""

from __future__ import annotations

import asyncio
import contextvars
import sqlite3
import time
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import msgspec
from litestar.types import ASGIApp

from broker.domain.errors import Unavailable
from broker.domain.events import subject_kind
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.log.postgresql import log as postgresql
from broker.log.postgresql.arguments import arguments
from broker.seams import Batch, Fenced, Outgoing, Unknown
from projections import follower
from tests.simulation.checkers.life import CHECKERS, s4
from tests.simulation.checkers.timing import FRESH
from tests.simulation.clients import Clients, Door
from tests.simulation.facts import Facts
from tests.simulation.fleet import COMMANDS, Device
from tests.simulation.history import History, Row
from tests.simulation.link import Client
from tests.simulation.loop import Node, SimClock, SimLoop, run
from tests.simulation.network import MOSQUITTO, Connection, SimMqttServer
from tests.simulation.nodes.checkers import FAILOVER_SEC, Acts, check_nodes
from tests.simulation.nodes.database import SimDatabase
from tests.simulation.nodes.nemesis import NodesNemesis
from tests.simulation.nodes.net import Net
from tests.simulation.nodes.process import Process
from tests.simulation.readers import READERS, Reader
from tests.simulation.receivers import URLS, Receivers
from tests.simulation.tide import Tide
from tests.simulation.world import AFTERWARDS, WRONG, quiet

KINDS = ("generic", "recorder", "iotee_device", "siren", "generic")
SPELL_SEC = (60, 140)
HEALED_WITHIN_SEC, LONGEST_SEC = 1_500, 6_000
RESTART_SEC = (0.2, 5.0)
KILLED = "coroutine ignored GeneratorExit"  # a killed process, at the end of the simulation
NOT_HERE = {"O2", "O4", "R7"}  # of one process and its disk


class Machine:
    """`clock`: its wall clock is a little off. A supervisor starts the process again when it has ended."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.name, self.runs = name, 0
        self.clock = SimClock(loop)
        self.clock.offset_ms = loop.rng(f"clock/{name}").randint(-300, 300)
        self.process: Process | None = None
        self.last: str | None = None  # the run that this machine knows to have ended


class Doors(Door):
    """HTTP to any of the nodes, as through a load balancer."""

    def __init__(self, loop: SimLoop, history: History, machines: list[Machine]) -> None:
        super().__init__(loop, history)
        self._machines = machines

    def _listening(self) -> tuple[Node, ASGIApp] | None:
        there = [m.process for m in self._machines if m.process is not None and m.process.listening]
        process = self._random.choice(there) if there else None
        return None if process is None else (process.node, process.app)

    def lose(self, node: Node) -> None:
        """The process died: its connections are reset."""
        for owner, exchange in self._open.values():
            if owner is node:
                exchange.over.set()

    async def quiet(self, node: Node) -> None:
        """What a server does when it ends: it waits for requests, and then closes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                while any(owner is node for owner, _ in self._open.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        self.lose(node)


class FencedServer(SimMqttServer):
    """Reads nothing more of a connection that it closes because its client id connects anew. `arrived`: the
    topic and the command of each message."""

    arrived: list[tuple[str, str]]

    def accept(self, client: Client) -> Connection | None:
        old = self.connection(client.client_id)
        if self.up and old is not None:
            old.to_server.lose_what_is_under_way()
        return super().accept(client)

    def received(self, connection: Connection, mid: int, outgoing: Outgoing, retain: bool) -> None:
        if outgoing.correlation is not None:
            self.arrived.append((outgoing.topic, outgoing.correlation.decode()))
        super().received(connection, mid, outgoing, retain)


class NodesWorld:
    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        draw = self._draw = loop.rng("world")
        self.clock = SimClock(loop)
        self.tide = Tide(loop)
        self.history = History(self.clock.true_ms, loop.note)
        self.acts = Acts(self.clock.true_ms)
        self.net = Net(loop)
        self.database = SimDatabase(loop, self.net)
        self.database.durable, self.database.claimed = self._durable, self._claimed
        self.database.appended = self.acts.appended
        self.server = FencedServer(loop, MOSQUITTO, history=self.history)
        self.server.arrived = self.acts.arrived
        self.machines = [Machine(loop, name) for name in "abc"[: draw.choice((2, 3, 3))]]
        self.devices = [
            Device(loop, self.server, self.history, self.tide, f"hw{number}", kind)
            for number, kind in enumerate(KINDS, 1)
        ]
        self.door = Doors(loop, self.history, self.machines)
        self.receivers = Receivers(loop, self.history)
        self.webhooks: list[str] = []
        self.readers = [Reader(loop, self.door, self.tide, self.history, name) for name in READERS]
        self.found: list[str] = []
        self.clients: Clients
        self.ending = False
        self._seen = 0

    # --- processes ---

    def start(self, machine: Machine) -> None:
        """Starts the broker of a machine, if none runs there."""
        if machine.process is None and not self.ending:
            machine.runs += 1
            process = machine.process = Process(self, machine, machine.last)
            self.acts.began[process.incarnation] = self.clock.true_ms()
            process.task.add_done_callback(
                lambda task: self._ended(machine, process, task), context=contextvars.Context()
            )

    def _ended(self, machine: Machine, process: Process, task: asyncio.Task[None]) -> None:
        """It ended by itself: in order, because it lost the log, or because the database lost events."""
        error = task.exception()
        self.history.said(f"{machine.name} ended: {error!r}")
        for cause in _leaves(error) if error is not None else ():
            # Its `started` event may get no answer just after the claim; then its supervisor starts it again.
            if not isinstance(cause, Fenced | Unknown | Unavailable):
                self.found.append(f"O3: {machine.name} ended by {cause!r}")
        self.kill(process)

    def kill(self, process: Process, *, again: bool = True) -> None:
        """Kill -9, or the end of a process; the supervisor starts it again, unless another took its place."""
        machine = process.machine
        self.acts.ended.setdefault(process.incarnation, self.clock.true_ms())
        if process.node.held is not None:
            self.acts.woken.append((self.clock.true_ms(), process.incarnation))
        self.door.lose(process.node)
        self.loop.kill(process.node)
        if machine.process is process:
            machine.process, machine.last = None, process.incarnation
            delay = self._draw.uniform(*RESTART_SEC) if again else FAILOVER_SEC
            self.loop.call_later(delay, self.start, machine, context=contextvars.Context())

    def listening(self, host: str) -> tuple[Node, ASGIApp] | None:
        process = next((m.process for m in self.machines if m.name == host), None)
        return (process.node, process.app) if process is not None and process.listening else None

    def owner(self) -> Process | None:
        """The process that owns the log, and can do all that an owner does."""
        return next((m.process for m in self.machines if m.process is not None and m.process.ready), None)

    # --- what the log and the owner do ---

    def acted(self, incarnation: str, what: str) -> None:
        self.acts.acted(incarnation, what)

    def _claimed(self, incarnation: str, position: int) -> None:
        self.acts.claimed(incarnation, position)
        self.history.lived("down")  # for the checkers of one process, each owner is a life of it

    def _durable(self, sql: sqlite3.Connection) -> None:
        new = "SELECT position, data FROM events WHERE position > ? ORDER BY position"
        for position, data in sql.execute(new, (self._seen,)).fetchall():
            if data is not None:
                self.history.recorded(position, data)
            self._seen = position
        self.history.committed(self._seen)

    def inspect(self) -> None:
        """Reads the log, and compares its projections with rebuilt ones."""
        sql = self.database.shown()
        rows = [_row(row) for row in read_now(sql, log.all_rows)]
        self.history.dumped(rows)
        if (fault := read_now(sql, log.verify).fault) is not None:
            self.found.append(f"S3: {fault}")
        kept = read_now(sql, follower.dump)
        sql.execute("BEGIN")
        follower.rebuild(sql)
        self.found += s4(kept, read_now(sql, follower.dump))
        sql.execute("ROLLBACK")

    # --- the run ---

    async def live_through(self, only: tuple[str, ...]) -> None:
        await self.furnish()
        self.clients = Clients(self.loop, self.door, self.tide, self.devices, 3, pause=5.0)
        nemesis = NodesNemesis(self, only)
        self.loop.create_task(nemesis.run())
        await asyncio.sleep(self._draw.uniform(*SPELL_SEC))
        self.history.said("heal")
        nemesis.heal()
        self.clients.stopped = True
        await self._heal()
        await self._fail_over_once_more()
        await self._end()

    async def furnish(self) -> None:
        for machine in self.machines:
            self.start(machine)
        owner = await self._owner()
        assert owner.core is not None
        made = owner.core.keys.create("acme", ("admin",), None)
        key, self.door.secret = await self.loop.spawn(owner.node, made)
        self.history.secret("acme", self.door.secret, key.actor)
        for device in self.devices:
            body = {"hardware_id": device.hardware_id, "type": device.kind}
            call = await self.door.call("register", "POST", "/v1/devices", body)
            assert call.status == 201, call
            device.jwks = owner.core.grants.jwks()
            device.door, device.token = self.door, call.answer["device_token"]
            self.history.secret(f"{device.hardware_id}'s token", device.token)
            device.start()
        for url in URLS[:1]:
            hook: dict[str, Any] = {"url": url, "events": [], "project": "acme"}
            call = await self.door.call("webhook", "POST", "/v1/webhooks", hook)
            assert call.status == 201, call
            self.webhooks.append(call.answer["id"])
        for reader in self.readers:
            reader.start()

    async def _heal(self) -> None:
        await self._owner()
        self.history.healed_at = self._now()
        with suppress(AssertionError):  # the checkers judge the commands that are still open
            await self.loop.until(lambda: not self._open_commands(), "", HEALED_WITHIN_SEC, every=5)
        for webhook in self.webhooks:
            path = f"/v1/webhooks/{webhook}/resume"
            # A node that was stopped and finds the log taken refuses with 503 and ends; another one answers.
            while (call := await self.door.call("change", "POST", path)).status == 503:  # noqa: ASYNC110
                await asyncio.sleep(1)
            assert call.status == 200, call

    async def _fail_over_once_more(self) -> None:
        """N3: the owner is killed while nothing else is wrong; how long until a create is answered?"""
        owner = await self._owner()
        since = self.loop.time()
        self.kill(owner, again=False)
        for attempt in range(100):
            answered = await self._fresh(f"owner-{attempt}")
            if answered:
                break
        self.acts.failed_over = self.loop.time() - since
        await self._owner()
        with suppress(AssertionError):
            await self.loop.until(lambda: not self._open_commands(), "", HEALED_WITHIN_SEC, every=5)
        await self.loop.until(self._all_sent, "the webhooks were not sent", HEALED_WITHIN_SEC, every=1)
        for reader in self.readers:
            reader.heal()
        head = self._seen
        await asyncio.sleep(15)
        self.history.hooked_until = head
        for reader in self.readers:
            reader.stop()

    async def _fresh(self, why: str) -> bool:
        device = self.devices[0]
        name, params = next(iter(COMMANDS[device.kind].items()))
        body: dict[str, Any] = {"type": name, "params": params, "ttl_sec": 100}
        path = f"/v1/devices/{device.hardware_id}/commands"
        call = await self.door.call("create", "POST", path, body, key=f"{FRESH}{why}", patience=1.0)
        return call.status == 201

    async def _end(self) -> None:
        owner = await self._owner()
        self._compare_live_state(owner)
        await self._list_everywhere()
        self.history.ended_at = self._now()
        self.ending = True
        for machine in self.machines:
            if machine.process is not None:
                self.acts.ended[machine.process.incarnation] = self.clock.true_ms()
                machine.process.stop.set()
        await self.loop.until(lambda: all(m.process is None for m in self.machines), "a node did not end")
        self.inspect()

    async def _list_everywhere(self) -> None:
        """N4: all events, page by page, as each node lists them."""
        for machine in self.machines:
            door = Doors(self.loop, self.history, [machine])
            door.secret, listed, after = self.door.secret, list[tuple[int, str]](), "0"
            while after:
                call = await door.call("list", "GET", f"/v1/events?limit=1000&after={after}")
                if call.status != 200:
                    await asyncio.sleep(1)
                    continue
                listed += [(int(each["id"].rpartition(":")[2]), each["type"]) for each in call.answer["data"]]
                after = call.answer["next_cursor"] if call.answer["has_more"] else ""
            self.acts.listed[machine.name] = listed

    async def _owner(self) -> Process:
        await self.loop.until(lambda: self.owner() is not None, "no node owns the log")
        owner = self.owner()
        assert owner is not None
        return owner

    def _now(self) -> int:
        owner = self.owner()
        assert owner is not None
        assert owner.core is not None
        return owner.core.writer.now()

    def _open_commands(self) -> int:
        owner = self.owner()
        if owner is None or owner.core is None:
            return 1
        return sum(len(lane.members) for lane in owner.core.live.lanes.values())

    def _all_sent(self) -> bool:
        owner = self.owner()
        if owner is None or owner.core is None:
            return False
        return owner.core.webhooks.lag() == 0 and owner.core.webhooks.stopped() == 0

    def _compare_live_state(self, owner: Process) -> None:
        """L6: the state in memory equals the fold of the log."""
        assert owner.core is not None
        folded = follower.Fold()
        for row in read_now(self.database.shown(), log.all_rows):
            if row.data is not None or subject_kind(row.stream) != "command":
                folded.fold(log.recorded(row))
        for command_id, state in folded.commands.items():
            known = owner.core.live.command(command_id)
            if known is not None and msgspec.json.encode(known) != msgspec.json.encode(state):
                self.found.append(f"L6: {command_id} is {known} in memory and {state} by the log")
            if known is None and not state.closed:
                self.found.append(f"L6: {command_id} is open and not in memory")


def as_data(batch: Batch, incarnation: str, of_tables: str) -> list[Any]:
    """The arguments of `append` as the simulated database takes them: the batch is not made into columns."""
    real = arguments(batch, incarnation, of_tables)
    return [*real[:5], batch]


def judged(world: NodesWorld, logged: list[str]) -> list[str]:
    """All violations of a run, as sentences that begin with the invariant's name."""
    world.history.lines = logged
    facts = Facts(world.history)
    found = [*world.found, *world.door.failures, *check_nodes(world.acts, facts)]
    for name, checker in CHECKERS.items():
        if name not in NOT_HERE:
            found += [f"{name}: {sentence}" for sentence in checker(facts)]
    found += [
        f"LOG: {line}"
        for line in logged
        if line.startswith(WRONG) and not any(each in line for each in (AFTERWARDS, KILLED))
    ]
    found += [
        f"HTTP: {call.kind} was answered {call.status}: {call.answer}"
        for call in world.history.calls
        if call.status is not None and call.status >= 500 and call.status != 503
    ]
    return list(dict.fromkeys(found))


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Two runs whose `trace` differs were not the same."""

    seed: int
    found: list[str]
    trace: int
    history: History
    acts: Acts
    log: list[str]
    virtual_sec: float
    cpu_sec: float


def simulate_nodes(seed: int, only: tuple[str, ...] = ()) -> Ran:
    """One whole run. `only`: the names of the faults that are drawn; empty: all."""
    logged: list[str] = []

    async def main(loop: SimLoop) -> NodesWorld:
        world = NodesWorld(loop)
        try:
            await world.live_through(only)
        except AssertionError as error:
            world.found.append(f"L4: {error}")
            world.inspect()
        return world

    began = time.process_time()
    with quiet(logged), patch.object(postgresql, "arguments", as_data):
        world = run(main, f"nodes/{seed}", max_time=LONGEST_SEC)
    return Ran(
        seed=seed,
        found=judged(world, logged),
        trace=world.loop.trace,
        history=world.history,
        acts=world.acts,
        log=logged,
        virtual_sec=world.loop.time(),
        cpu_sec=time.process_time() - began,
    )


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _row(row: Any) -> Row:
    """A row for the checkers: its time is that of the clock by which it was decided."""
    found: Row = row._asdict()
    found["data"] = None if row.data is None else msgspec.json.decode(row.data)
    found["recorded_at"] = row.decided
    return found
