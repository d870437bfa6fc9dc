"""The faults of several nodes: processes, machines, the network, the database and its standby."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tests.simulation.nodes.net import DATABASE, MQTT
from tests.simulation.nodes.process import Process

if TYPE_CHECKING:
    from tests.simulation.nodes.world import Machine, NodesWorld

PAUSE_SEC = 12.0
SESSIONS: tuple[Literal["kept", "emptied", "lost"], ...] = ("kept", "kept", "emptied", "lost")


class NodesNemesis:
    """`only`: the names of the faults that are drawn; empty: all."""

    def __init__(self, world: NodesWorld, only: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._world, self._loop = world, world.loop
        self._random = world.loop.rng("nemesis")
        self._levels = itertools.count(500_000)
        self._undo: dict[int, Callable[[], object]] = {}
        self._faults: dict[Callable[[], None], int] = {
            self._kill_owner: 3,
            self._kill_any: 1,
            self._stop_owner: 4,
            self._kill_amid_requests: 3,
            self._stop_amid_requests: 4,
            self._end_owner: 2,
            self._namesake: 2,
            self._part_from_database: 3,
            self._part_from_mqtt: 2,
            self._part_nodes: 2,
            self._slow_net: 1,
            self._end_backends: 2,
            self._cancel_backends: 2,
            self._kill_database: 2,
            self._take_standby: 3,
            self._fail_over: 2,
            self._lose_replies: 2,
            self._lose_notifications: 1,
            self._step_clock: 2,
            self._part_and_step_clock: 2,
            self._step_database_clock: 2,
            self._restart_mqtt: 2,
            self._drop_link: 2,
            self._slow_link: 2,
            self._drop_device: 2,
            self._reboot_device: 2,
        }
        if only:
            self._faults = {fault: 1 for fault in self._faults if fault.__name__ in only}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(1 / PAUSE_SEC))
            if self.stopped:
                return
            fault = self._random.choices(list(self._faults), list(self._faults.values()))[0]
            self._world.history.said(fault.__name__)
            self._disturbed(self._world.history.now_ms())
            fault()

    def heal(self) -> None:
        self.stopped = True
        for number in list(self._undo):
            self._end(number)
        world = self._world
        if not world.database.standby:
            world.database.return_standby()
        link = world.server.connection("ordain")
        if link is not None:
            link.close("cut")
        world.receivers.heal()
        for device in world.devices:
            device.drops = False
            device.start()
            if not device.port.up:
                device.connect()

    def _later(self, low: float, high: float, undo: Callable[[], object]) -> None:
        number, since = len(self._undo) and max(self._undo) + 1, self._world.history.now_ms()

        def done() -> None:
            undo()
            self._disturbed(since)

        self._undo[number] = done
        self._loop.call_later(self._random.uniform(low, high), self._end, number)

    def _end(self, number: int) -> None:
        if (undo := self._undo.pop(number, None)) is not None:
            undo()

    def _disturbed(self, since: int) -> None:
        """From then until now the checkers must not expect that anything is quick."""
        self._world.history.wrote(since, ok=False)

    # --- processes ---

    def _owner(self) -> Process | None:
        found = [m.process for m in self._world.machines if m.process is not None and m.process.owns]
        return found[0] if found else None

    def _machine(self) -> Machine:
        return self._random.choice(self._world.machines)

    def _kill_owner(self) -> None:
        if (owner := self._owner()) is not None:
            self._world.kill(owner)

    def _kill_any(self) -> None:
        if (process := self._machine().process) is not None:
            self._world.kill(process)

    def _stop_owner(self) -> None:
        """SIGSTOP, for less or more than a lease; maybe while its last messages are slow on their way."""
        if (owner := self._owner()) is None:
            return
        if self._random.random() < 0.4:
            self._slow_link()
        self._loop.hold(owner.node)
        self._later(*self._random.choice(((0.5, 4.0), (5.0, 7.0), (7.0, 25.0))), lambda: self._go_on(owner))

    def _go_on(self, process: Process) -> None:
        self._world.acts.woken.append((self._world.history.now_ms(), process.incarnation))
        self._loop.go_on(process.node)

    def _kill_amid_requests(self) -> None:
        self._request()
        self._loop.call_later(self._random.uniform(0, 0.05), self._kill_owner)

    def _stop_amid_requests(self) -> None:
        self._request()
        self._loop.call_later(self._random.uniform(0, 0.05), self._stop_past_lease)

    def _stop_past_lease(self) -> None:
        if (owner := self._owner()) is not None:
            self._loop.hold(owner.node)
            self._later(7, 12, lambda: self._go_on(owner))

    def _request(self) -> None:
        """Some creates without a key, at any of the doors. Each order has a level of its own."""
        for _ in range(6):
            body = {"type": "set", "params": {"level": next(self._levels)}, "ttl_sec": 300}
            device = self._random.choice([d for d in self._world.devices if d.kind == "generic"])
            path = f"/v1/devices/{device.hardware_id}/commands"
            self._loop.create_task(self._world.door.call("create", "POST", path, body))

    def _end_owner(self) -> None:
        if (owner := self._owner()) is not None:
            owner.stop.set()

    def _namesake(self) -> None:
        """A process is stopped, and its name and address are given to another one; then it goes on."""
        machine = self._machine()
        old = machine.process
        if old is None:
            return
        self._loop.hold(old.node)
        machine.process = machine.last = None
        self._world.start(machine)
        self._later(1, 12, lambda: self._go_on(old))
        self._later(14, 20, lambda: self._world.kill(old))

    # --- the network ---

    def _part(self, one: str, other: str) -> None:
        self._world.net.cut(one, other)
        self._later(1, 20, lambda: self._world.net.mend(one, other))

    def _part_from_database(self) -> None:
        owner = self._owner()
        machine = owner.machine if owner is not None and self._random.random() < 0.7 else self._machine()
        self._part(machine.name, DATABASE)

    def _part_from_mqtt(self) -> None:
        owner = self._owner()
        machine = owner.machine if owner is not None else self._machine()
        self._part(machine.name, MQTT)
        if owner is not None and owner.link is not None:
            owner.link.cut_off()

    def _part_nodes(self) -> None:
        one, other = self._random.sample([m.name for m in self._world.machines], 2)
        self._part(one, other)

    def _slow_net(self) -> None:
        self._world.net.slow = self._random.choice((10.0, 60.0))
        self._later(3, 20, lambda: setattr(self._world.net, "slow", 1.0))

    # --- the database ---

    def _end_backends(self) -> None:
        self._world.database.end_backends()

    def _cancel_backends(self) -> None:
        self._standby_away(2, 8)
        self._later(0.2, 4, lambda: self._world.database.end_backends(quietly=True))

    def _kill_database(self) -> None:
        self._world.database.kill(self._random.choice((0.3, 2.0, 8.0)))

    def _take_standby(self) -> None:
        self._standby_away(1, 15)
        if self._random.random() < 0.4:
            self._later(0.5, 6, self._world.database.end_backends)

    def _standby_away(self, low: float, high: float) -> None:
        database = self._world.database
        database.take_standby()
        self._later(low, high, lambda: None if database.standby else database.return_standby())

    def _fail_over(self) -> None:
        """The standby takes over; in half of the cases after it was away, and some stopped waiting for it."""
        database, down = self._world.database, self._random.uniform(0.3, 6)
        if self._random.random() < 0.5:
            database.take_standby()
            self._later(0.5, 3, lambda: database.end_backends(quietly=self._random.random() < 0.5))
            self._later(3.5, 6, lambda: None if database.standby else database.fail_over(down))
        else:
            database.fail_over(down)

    def _lose_replies(self) -> None:
        database = self._world.database
        database.lose_replies = self._random.choice((0.1, 0.5))
        self._later(2, 15, lambda: setattr(database, "lose_replies", 0.0))

    def _lose_notifications(self) -> None:
        database = self._world.database
        database.lose_notifications = 1.0
        self._later(10, 60, lambda: setattr(database, "lose_notifications", 0.0))

    # --- clocks ---

    def _step_clock(self) -> None:
        clock = self._machine().clock
        by = self._random.choice((-60_000, -8_000, -3_000, 3_000, 8_000, 60_000))
        clock.step(by)
        self._later(3, 20, lambda: clock.step(-by))

    def _part_and_step_clock(self) -> None:
        """The owner loses the database, and then its wall clock goes back."""
        if (owner := self._owner()) is None:
            return
        name, clock = owner.machine.name, owner.machine.clock
        self._world.net.cut(name, DATABASE)
        self._later(10, 20, lambda: self._world.net.mend(name, DATABASE))

        def step() -> None:
            clock.step(-60_000)
            self._later(12, 20, lambda: clock.step(60_000))

        self._loop.call_later(self._random.uniform(0.5, 3), lambda: None if self.stopped else step())

    def _step_database_clock(self) -> None:
        clock = self._world.database.clock
        by = self._random.choice((-5_000, 5_000, 600_000))
        clock.step(by)
        self._later(5, 30, lambda: clock.step(-by))

    # --- the MQTT server and devices ---

    def _restart_mqtt(self) -> None:
        self._world.server.restart(self._random.choice(SESSIONS), self._random.uniform(0.1, 10))

    def _drop_link(self) -> None:
        connection = self._world.server.connection("ordain")
        if connection is not None:
            connection.close("cut")

    def _slow_link(self) -> None:
        connection = self._world.server.connection("ordain")
        if connection is not None:
            connection.to_server.slow = self._random.choice((20.0, 400.0, 1_000.0))
            self._later(3, 20, lambda: connection.close("too slow"))

    def _drop_device(self) -> None:
        self._random.choice(self._world.devices).port.drop()

    def _reboot_device(self) -> None:
        device = self._random.choice(self._world.devices)
        device.die()
        self._later(0.5, 30, device.start)
