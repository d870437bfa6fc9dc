"""Authenticates clients: every CONNECT is judged in a task of its own, within a bounded time.

A refusal takes the same time for known and unknown names. An error of the broker must never be answered with
"not authorised": after that code some clients never try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

import structlog

from broker.mqtt.access import Access, Peer, Refused
from broker.mqtt.packets import Connect, Reason
from broker.mqtt.shell import Connection
from broker.often import shown
from broker.settings import MqttLimits

logger = structlog.get_logger()

REFUSED_AFTER_SEC = 0.25
RIVALS_WITHIN_SEC = 10.0
DAMPED_SEC = (0.1, 2.0)
UNDAMPED = 2  # takeovers in a row; a device that comes back after a broken connection is one

Judged = Callable[[Connection, Connect, Peer | Refused], None]


class Admission:
    """`damped` counts the times a client had to wait because another one uses its name."""

    def __init__(self, access: Access, bounds: MqttLimits) -> None:
        self.damped = 0
        self._access = access
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Semaphore(bounds.admitted_at_once)
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._users: dict[Connection, str] = {}
        self._rivals: dict[str, tuple[int, float]] = {}

    def begin(self, connection: Connection, connect: Connect, here: Container[str], judged: Judged) -> None:
        """Judges a CONNECT. `here`: the names of the connected clients.

        `judged` is called once, unless the connection or the broker ends before.
        """
        task = asyncio.create_task(self._admit(connection, connect, here, judged))
        self._tasks[connection] = task
        task.add_done_callback(lambda _: self._tasks.pop(connection, None))

    def left(self, connection: Connection) -> None:
        """The connection ended: its CONNECT must not use up a turn of others."""
        task = self._tasks.get(connection)
        if task is not None:
            task.cancel()

    def bar(self, user: str) -> None:
        """The token or certificate of a device is not valid any more. It may have been checked already."""
        for connection, claimed in self._users.items():
            connection.barred = connection.barred or claimed == user

    def peer(self, hardware_id: str) -> Peer:
        """A device as it is now, with all that it may say and hear."""
        return self._access.peer(hardware_id, self._access.own(hardware_id))

    def forget(self) -> None:
        now = self._loop.time()
        self._rivals = {
            name: rival for name, rival in self._rivals.items() if now < rival[1] + RIVALS_WITHIN_SEC
        }

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _admit(
        self, connection: Connection, connect: Connect, here: Container[str], judged: Judged
    ) -> None:
        self._users[connection] = connect.user or connection.certified or ""
        try:
            verdict = await self._judge(connection, connect, here)
            judged(connection, connect, verdict)
        finally:
            del self._users[connection]

    async def _judge(self, connection: Connection, connect: Connect, here: Container[str]) -> Peer | Refused:
        since = self._loop.time()
        try:
            async with asyncio.timeout(self._bounds.admit_within_sec):
                async with self._turn:
                    verdict = await self._access.judge(connect, connection.certified, connection.arrival)
                if isinstance(verdict, Peer):
                    if verdict.name in here:
                        await self._damp(verdict.name)
                elif verdict.reason == Reason.NOT_AUTHORIZED:
                    await asyncio.sleep(max(0.0, since + REFUSED_AFTER_SEC - self._loop.time()))
                return verdict
        except TimeoutError:
            return Refused(Reason.CONNECTION_RATE, "too many are connecting now; try again later")
        except Exception:
            logger.exception("mqtt.not_judged", address=connection.address)
            return Refused(Reason.UNAVAILABLE, "not available now; try again later")

    async def _damp(self, name: str) -> None:
        """Two clients with one name disconnect each other. Each time, the new one waits a little longer."""
        now = self._loop.time()
        times, last = self._rivals.get(name, (0, 0.0))
        times = times + 1 if now < last + RIVALS_WITHIN_SEC else 1
        self._rivals[name] = times, now
        if times > UNDAMPED:
            shortest, longest = DAMPED_SEC
            self.damped += 1
            if times == UNDAMPED + 1:
                logger.warning("mqtt.rivals", client_id=shown(name))
            await asyncio.sleep(min(longest, shortest * 2 ** min(times - UNDAMPED - 1, 10)))
