"""All faults of a simulated run, at moments drawn from the seed, and the healing at its end.

The nemesis acts only from outside: on processes, machines, the network, clocks and devices. `heal` ends all
faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from broker.seams import Outgoing
from tests.simulation.fleet import COMMANDS, Device
from tests.simulation.receivers import URLS

if TYPE_CHECKING:
    from tests.simulation.world import World

STATUSES = ("acknowledged", "progress", "executed", "failed")
REFUSALS = (0x80, 0x83, 0x87, 0x90, 0x95, 0x97, 0x99)
SESSIONS: tuple[Literal["kept", "emptied", "lost"], ...] = ("kept", "emptied", "lost")
Fault = Callable[[], None]


class Nemesis:
    def __init__(self, world: World, pause: float) -> None:
        self.stopped = False
        self._world, self._pause = world, pause
        self._loop, self._server, self._disk = world.loop, world.server, world.disk
        self._random = world.loop.rng("nemesis")
        self._faults: dict[Fault, int] = {
            self._kill: 3,
            self._cut_power: 3,
            self._stop_within_a_write: 4,
            self._restart_mqtt: 2,
            self._drop_link: 2,
            self._halve_link: 2,
            self._slow_link: 1,
            self._step_clock: 2,
            self._reboot_device: 4,
            self._drop_device: 2,
            self._halve_device: 4,
            self._device_away: 3,
            self._double: 2,
            self._delay: 2,
            self._forge: 4,
            self._kill_phone: 4,
            self._forge_report: 2,
            self._babble: 2,
            self._fill_disk: 2,
            self._call_on_a_full_disk: 3,
            self._refuse_publishes: 1,
            self._rotate_token: 2,
            self._delete_device: 1,
            self._deafen_receiver: 2,
            self._pause_webhook: 1,
            self._send_again: 1,
            self._stop_in_order: 2,
            self._stall: 4,
            self._slow_disk: 3,
            self._flood: 2,
        }

    async def run(self) -> None:
        while True:
            await self._world.tide.busy.wait()
            await asyncio.sleep(self._random.expovariate(1 / self._pause))
            if self.stopped:
                return
            fault = self._random.choices(list(self._faults), list(self._faults.values()))[0]
            if self._world.tide.allows(fault.__name__):
                self._world.history.said(fault.__name__)
                fault()

    def heal(self) -> None:
        """Stops new faults and ends all lasting ones."""
        self.stopped = True
        self._server.up = self._server.up or not self._world.embedded
        self._calm()
        self._drop("ordain")  # the connection may be slow or half-open
        self._disk.slow_sec = 0.0
        self._world.make_room()
        self._server.refuse = lambda client_id, outgoing: None
        self._world.receivers.heal()
        for phone in self._world.phones:
            phone.whims = False
            phone.start()
        for device in self._world.devices:
            device.drops = False
            device.start()
            if not device.port.up:
                device.connect()

    def _calm(self) -> None:
        faults = self._server.faults
        faults.duplicate = faults.late = faults.lose_while_away = 0.0
        faults.reorder_topics = False

    def _later(self, low: float, high: float, undo: Callable[[], object]) -> None:
        self._loop.call_later(self._random.uniform(low, high), lambda: None if self.stopped else undo())

    # --- the broker's process and machine ---

    def _kill(self) -> None:
        self._world.crash()

    def _cut_power(self) -> None:
        self._world.crash(power=True)

    def _stop_within_a_write(self) -> None:
        power = self._random.random() < 0.7
        self._disk.stop_after(self._random.randrange(8), lambda: self._world.crash(power=power))

    def _fill_disk(self) -> None:
        self._world.fill(self._random.randrange(40_000))
        self._later(2, 60, self._world.make_room)
        for _ in range(6):
            self._later(1, 60, self._world.clients.probe)

    def _call_on_a_full_disk(self) -> None:
        """A device comes online and leaves again while nothing can be recorded."""
        device = self._device()
        node = device.node
        if node is None or "mqtt" not in device.transports:
            return
        device.say_goodbye()

        def call() -> None:
            self._world.fill()
            for _ in range(3):
                self._later(0.5, 8, self._world.clients.probe)
            if device.node is node and not device.port.up:
                device.connect()
            self._later(1, 10, leave)

        def leave() -> None:
            if device.node is node:
                device.say_goodbye()
            self._later(0.1, 10, self._world.make_room)
            self._later(10, 60, come_back)

        def come_back() -> None:
            if device.node is node and not device.port.up:
                device.connect()

        self._later(5, 30, call)

    def _stop_in_order(self) -> None:
        self._world.clients.probe()
        self._later(0, 0.02, self._world.stop)

    def _stall(self) -> None:
        """The process stands still while answers wait: for less than an attempt takes, or for longer."""
        draw, world = self._random, self._world
        device = self._device()
        if draw.random() < 0.6 and world.core is not None:
            name, params = next(iter(COMMANDS[device.kind].items()))
            body = {"type": name, "params": params, "ttl_sec": draw.choice((5, 300))}
            path = f"/v1/devices/{device.hardware_id}/commands"
            self._loop.create_task(world.door.call("create", "POST", path, body))
        self._later(0, 0.03, lambda: world.hold(draw.choice((0.5, 3.0, 15.0, 70.0))))

    def _slow_disk(self) -> None:
        self._disk.slow_sec = self._random.choice((0.5, 3.0, 8.0))
        self._later(10, 90, lambda: setattr(self._disk, "slow_sec", 0.0))

    def _flood(self) -> None:
        """One device says much at once, and another project goes on working."""
        device = self._device()
        for _ in range(self._random.choice((40, 150))):
            device.babble(short=True)
        self._later(0, 3, self._world.stranger.order)
        self._later(0, 3, self._world.stranger.order)

    def _step_clock(self) -> None:
        far = 86_400_000 if self._random.random() < 0.1 else 300_000
        by = self._random.randint(-far, far)
        self._world.clock.step(by)
        if self._random.random() < 0.7:
            self._later(10, 300, lambda: self._world.clock.step(-by))

    # --- the MQTT server and the ways to it ---

    def _restart_mqtt(self) -> None:
        if self._world.embedded:
            self._world.crash()  # the embedded server runs in the broker's process
            return
        longest = self._random.choice((20, 20, 300))
        self._server.restart(self._random.choice(SESSIONS), self._random.uniform(0.1, longest))

    def _drop_link(self) -> None:
        self._drop("ordain")

    def _halve_link(self) -> None:
        self._halve("ordain")

    def _slow_link(self) -> None:
        connection = self._server.connection("ordain")
        if connection is not None:
            slow = self._random.choice((20.0, 100.0, 400.0))
            connection.to_server.slow = connection.to_client.slow = slow
            self._later(5, 60, lambda: connection.close("too slow"))

    def _double(self) -> None:
        self._server.faults.duplicate = self._random.choice((0.1, 0.5))
        self._server.faults.reorder_topics = self._random.random() < 0.5
        self._later(10, 120, self._calm)

    def _delay(self) -> None:
        self._server.faults.late = self._random.choice((0.05, 0.3))
        self._server.faults.lose_while_away = self._random.choice((0.0, 0.5))
        self._later(10, 120, self._calm)

    def _refuse_publishes(self) -> None:
        reason = self._random.choice(REFUSALS)

        def refuse(client_id: str, outgoing: Outgoing) -> int | None:
            return reason if client_id == "ordain" and outgoing.correlation else None

        self._server.refuse = refuse
        self._later(2, 60, lambda: setattr(self._server, "refuse", lambda client_id, outgoing: None))

    def _drop(self, client_id: str) -> None:
        connection = self._server.connection(client_id)
        if connection is not None:
            connection.close("cut")

    def _halve(self, client_id: str) -> None:
        connection = self._server.connection(client_id)
        if connection is not None:
            connection.go_half_open(self._random.uniform(5, 40))

    # --- devices ---

    def _device(self) -> Device:
        return self._random.choice(self._world.devices)

    def _reboot_device(self) -> None:
        device = self._device()
        device.die()
        self._later(0.5, 60, device.start)

    def _drop_device(self) -> None:
        self._drop(self._device().hardware_id)

    def _halve_device(self) -> None:
        self._halve(self._device().hardware_id)

    def _device_away(self) -> None:
        device = self._device()
        node = device.node
        if node is None:
            return
        leave = device.say_goodbye if self._random.random() < 0.5 else device.port.disconnect
        leave()

        def come_back() -> None:
            if device.node is node and not device.port.up:
                device.connect()

        self._later(5, 120, come_back)

    def _forge(self) -> None:
        device = self._device()
        sent = self._world.clients.sent
        known = self._random.choice(sent[-8:])[1] if sent else "cmd_none"
        own = [command_id for hardware_id, command_id in sent[-20:] if hardware_id == device.hardware_id]
        named = self._random.choice([known, "cmd_" + "0" * 26, own[-1] if own else known])
        device.forge(named, self._random.choice(STATUSES))

    def _babble(self) -> None:
        self._device().babble()

    # --- phones ---

    def _kill_phone(self) -> None:
        if self._world.phones:
            phone = self._random.choice(self._world.phones)
            phone.die()
            self._later(0.5, 60, phone.start)

    def _forge_report(self) -> None:
        """Reports a result for a command that the phone may never have fetched. For a command that did go to
        a phone the broker cannot detect the lie."""
        sent = self._world.clients.sent
        if sent:
            hardware_id, command_id = self._random.choice(sent[-8:])
            status = self._random.choice(("executed", "failed"))
            self._world.history.answered(hardware_id, command_id, status)
            path = f"{hardware_id}/commands/{command_id}/result"
            body = {"status": status}
            self._loop.create_task(self._world.door.call("report", "POST", f"/v1/devices/{path}", body))

    # --- what an operator does to them ---

    def _rotate_token(self) -> None:
        self._ask("rotate", "POST", f"{self._device().hardware_id}/token")

    def _delete_device(self) -> None:
        """Deletes a device in the broker, which ends its commands; the device itself goes on running."""
        self._ask("delete", "DELETE", f"{self._device().hardware_id}?force=true")

    def _ask(self, kind: str, method: str, path: str) -> None:
        self._loop.create_task(self._world.door.call(kind, method, f"/v1/devices/{path}"))

    # --- webhooks ---

    def _deafen_receiver(self) -> None:
        trouble, url = self._world.receivers.trouble, self._random.choice(URLS)
        trouble[url] = self._random.choice((0.5, 1.0))
        self._later(10, 200, lambda: trouble.update({url: 0.1}))

    def _pause_webhook(self) -> None:
        for webhook in self._world.webhooks[:1]:
            self._change(webhook, "PATCH", "", {"enabled": False})
            self._later(1, 60, partial(self._change, webhook, "POST", "/resume"))

    def _send_again(self) -> None:
        for webhook in self._world.webhooks[-1:]:
            position = self._random.randint(1, 1 + len(self._world.history.commits))
            self._change(webhook, "POST", "/redrive", {"from": position})

    def _change(self, webhook: str, method: str, more: str, body: dict[str, Any] | None = None) -> None:
        call = self._world.door.call("change", method, f"/v1/webhooks/{webhook}{more}", body)
        self._loop.create_task(call)
