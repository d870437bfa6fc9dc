"""A fleet of simulated devices: sends it commands and counts what was sent, executed, doubled and lost.

Each device has its own connection and a real `devices.core.Core`, so the simulation tests real device
behaviour; only the faults are simulated. It must use the broker only through its `Door`.
"""

from __future__ import annotations

import asyncio
import random
import resource
import secrets
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, NamedTuple, Protocol

import msgspec

from devices.fleet.bought import MODELS, BoughtDevice
from devices.fleet.device import COMMAND, TYPE, Device
from devices.fleet.faults import Faults
from devices.fleet.mqtt import BAD_CREDENTIALS, KEEPALIVE_SEC, Connection, Refused
from devices.fleet.summary import Acted, Ledger, Sent, Summary, View, summarise
from devices.tls import Tls

# Connections opened at once. More is not faster: Mosquitto accepts 5 a millisecond, amqtt one at a time.
OPENING = 20
OPEN_WITHIN_SEC = 10
# If no further device connects for this time, the MQTT server has a problem.
NOBODY_SEC = 5
BACKOFF_SEC = (0.2, 5.0)
PING_SEC = KEEPALIVE_SEC // 2
# HTTP requests at once.
SENDERS = 32
# The wait for a change before the run gives up. An open command that will still close changes within a result
# time-out (60 s) plus 15 s.
SILENCE_SEC = 90
LOOK_SEC = 0.5

Phase = Literal["registering", "connecting", "sending", "settling", "closing"]


class NoFleet(Exception):
    """The devices could not connect; the message says why."""


class Server(NamedTuple):
    """The address of the MQTT server. `tls` None: without TLS."""

    host: str
    port: int
    tls: Tls | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    devices: int
    faults: Faults
    send_rate: float
    duration_sec: float
    type: str = TYPE
    prefix: str = "iotee"

    @property
    def commands(self) -> int:
        return round(self.send_rate * self.duration_sec)


class Door(Protocol):
    """The broker's API, as the simulation uses it."""

    async def tokens(self, names: Sequence[str]) -> dict[str, str]:
        """The devices' tokens by name. Registers the devices that the broker does not know."""
        ...

    async def new_token(self, name: str) -> str:
        """A new token for a device whose token was refused."""
        ...

    async def send(self, name: str, command: str, params: object, key: str) -> str | None:
        """Sends a command and returns its id; None if the broker refuses it because a queue is full."""
        ...

    async def open(self) -> set[str]:
        """The ids of all open commands."""
        ...

    async def views(self, ids: set[str]) -> dict[str, View]:
        """The given commands by id; without those that the broker does not know."""
        ...


class Fleet:
    """All devices. Each is kept connected, except during its faults."""

    def __init__(self, devices: Sequence[Device | BoughtDevice], server: Server, door: Door) -> None:
        self.devices = devices
        self._server, self._door = server, door
        self.why = "the MQTT server does not answer"
        self._opening = asyncio.Semaphore(OPENING)

    @property
    def online(self) -> frozenset[str]:
        return frozenset(device.name for device in self.devices if device.connection is not None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def all_online(self) -> None:
        """Waits until all devices are online.

        Raises:
            NoFleet: no further device connected within NOBODY_SEC.
        """
        known, since = 0, time.monotonic()
        while (online := len(self.online)) < len(self.devices):
            if online > known:
                known, since = online, time.monotonic()
            if time.monotonic() - since > NOBODY_SEC:
                raise NoFleet(f"{online} of {len(self.devices)} devices are connected: {self.why}")
            await asyncio.sleep(0.05)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for device in self.devices:
                    group.create_task(self._keep(device))
                group.create_task(self._ping())
        finally:
            for device in self.devices:
                device.leave()

    async def _keep(self, device: Device | BoughtDevice) -> None:
        failures = 0
        while True:
            try:
                async with self._opening:
                    connection = await self._open(device)
                failures = 0
                await connection.lost
            except (OSError, Refused) as error:  # OSError includes TimeoutError
                self.why = str(error) or f"no answer within {OPEN_WITHIN_SEC} s"
                failures += 1
                if isinstance(error, Refused) and error.code in BAD_CREDENTIALS and not device.token_is_new:
                    device.token, device.token_is_new = await self._door.new_token(device.name), True
            shortest, longest = BACKOFF_SEC
            ceiling = min(longest, shortest * 2 ** min(failures, 10))
            await asyncio.sleep(device.away_sec or random.uniform(shortest, ceiling))  # nosec B311

    async def _open(self, device: Device | BoughtDevice) -> Connection:
        connection = device.connect()
        host, port, tls = self._server
        try:
            async with asyncio.timeout(OPEN_WITHIN_SEC):
                # asyncio sets TCP_NODELAY on all its connections.
                await asyncio.get_running_loop().create_connection(lambda: connection, host, port, ssl=tls)
                await connection.ready
        except BaseException:
            connection.give_up()
            raise
        return connection

    async def _ping(self) -> None:
        """Sends a share of the pings each second, because a thousand at once would block amqtt."""
        second = 0
        while True:
            await asyncio.sleep(1)
            second += 1
            for device in self.devices[second % PING_SEC :: PING_SEC]:
                if device.connection is not None:
                    device.connection.ping()


class Simulation:
    """One run. Its attributes can be read while it runs."""

    def __init__(self, plan: Plan, server: Server, door: Door) -> None:
        self.plan, self._server, self._door = plan, server, door
        self.ledger = Ledger(plan.faults)
        self.phase: Phase = "registering"
        self.fleet: Fleet | None = None
        self.sent: dict[str, Sent] = {}
        self.refused = 0
        self.open = 0
        self.sending_sec = 0.0
        self._run = secrets.token_hex(6)

    async def run(self) -> Summary:
        """Runs until all commands are closed, or until SIGINT or SIGTERM. Returns the result so far.

        Raises:
            NoFleet: the devices could not connect.
            Exception: any exception of the door.
        """
        loop = asyncio.get_running_loop()
        work = asyncio.create_task(self._work())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, work.cancel)
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
            await asyncio.wait({work})
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        online = frozenset[str]() if work.cancelled() else work.result()
        self.phase = "closing"
        # Read only after the devices have stopped, so that no state is older than the devices' last action.
        views = await self._door.views(set(self.sent))
        return summarise(
            faults=self.plan.faults,
            devices=self.plan.devices,
            ledger=self.ledger,
            sent=self.sent,
            views=views,
            online=online,
            refused=self.refused,
            sending_sec=self.sending_sec,
            interrupted=work.cancelled(),
            bought=[]
            if self.fleet is None
            else [
                Acted(device.name, device.runs, device.refused, device.fates)
                for device in self.fleet.devices
                if isinstance(device, BoughtDevice)
            ],
        )

    async def _work(self) -> frozenset[str]:
        """Runs all phases. Returns the names of the devices that were online at the end."""
        _allow_connections(self.plan.devices)
        start = "sim" if self.plan.type == TYPE else f"sim-{self.plan.type}"
        names = [f"{start}-{number:04}" for number in range(1, self.plan.devices + 1)]
        tokens = await self._door.tokens(names)
        self.fleet = Fleet([self._device(*each) for each in tokens.items()], self._server, self._door)
        self.phase = "connecting"
        async with self.fleet.running():
            await self.fleet.all_online()
            self.phase = "sending"
            await self._send_all(names)
            self.phase = "settling"
            await self._settle()
            return self.fleet.online

    def _device(self, name: str, token: str) -> Device | BoughtDevice:
        plan = self.plan
        if plan.type in MODELS:
            return BoughtDevice(name, token, MODELS[plan.type], plan.faults)
        return Device(name, token, run=self._run, prefix=plan.prefix, ledger=self.ledger, now_ms=_now_ms)

    def _command(self, number: int) -> tuple[str, object]:
        """The name and the parameters of a command of the run."""
        if self.plan.type in MODELS:
            commands = MODELS[self.plan.type].commands
            return commands[number % len(commands)], {}
        return COMMAND, {"number": number}

    async def _send_all(self, names: list[str]) -> None:
        chooser = random.Random(self.plan.faults.seed)  # nosec B311
        orders = ((number, chooser.choice(names)) for number in range(self.plan.commands))
        start = time.monotonic()

        async def sender() -> None:
            for number, name in orders:
                await asyncio.sleep(start + number / self.plan.send_rate - time.monotonic())
                key = f"simulation-{self._run}-{number}"
                command_id = await self._door.send(name, *self._command(number), key)
                self.sending_sec = time.monotonic() - start
                if command_id is None:
                    self.refused += 1
                else:
                    self.sent[command_id] = Sent(name, number)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(SENDERS):
                    group.create_task(sender())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _settle(self) -> None:
        """Waits until all commands are closed, or until none has closed for SILENCE_SEC."""
        known, since = -1, time.monotonic()
        while time.monotonic() - since < SILENCE_SEC:
            self.open = len(self.sent.keys() & await self._door.open())
            if not self.open:
                return
            if self.open != known:
                known, since = self.open, time.monotonic()
            await asyncio.sleep(LOOK_SEC)


def _allow_connections(count: int) -> None:
    """Raises the limit of open files; each device needs one.

    Raises:
        NoFleet: the system's hard limit is too low.
    """
    needed = count + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise NoFleet(f"{count} devices need {needed} open files, and the system allows {hard} (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
