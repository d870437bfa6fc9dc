"""The network between the machines, the database and the MQTT server: delays and partitions."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable

from tests.simulation.loop import SimLoop

DATABASE, MQTT = "database", "mqtt"
LATENCY_SEC = (0.0002, 0.004)


class Net:
    """`slow`: by how much everything takes longer."""

    def __init__(self, loop: SimLoop) -> None:
        self.world = contextvars.Context()  # what is on its way outlives every process
        self.slow = 1.0
        self.loop, self._random = loop, loop.rng("net")
        self.waiting: list[Way] = []
        self._cut: set[frozenset[str]] = set()

    def reaches(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self._cut

    def cut(self, one: str, other: str) -> None:
        self._cut.add(frozenset((one, other)))

    def mend(self, one: str, other: str) -> None:
        self._cut.discard(frozenset((one, other)))
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            each.again()

    def delay(self) -> float:
        return self.slow * self._random.uniform(*LATENCY_SEC)


class Way:
    """One direction of a connection. What is sent arrives in order, in a process of its own (`context`) or in
    the world. What meets a cut arrives after it, like TCP that sends again."""

    def __init__(self, net: Net, one: str, other: str, context: contextvars.Context | None = None) -> None:
        self._net, self._ends, self._context = net, (one, other), context or net.world
        self._queue: deque[Callable[[], object]] = deque()
        self._last = 0.0

    def send(self, arrive: Callable[[], object]) -> None:
        self._queue.append(arrive)
        loop = self._net.loop
        self._last = max(self._last, loop.time() + self._net.delay())
        loop.call_at(self._last, self._arrive, context=self._context)

    def again(self) -> None:
        self._net.loop.call_soon(self._arrive, context=self._context)

    def _arrive(self) -> None:
        # The first handle of one instant takes the oldest message: such handles may run in any order.
        if self._net.reaches(*self._ends):
            self._queue.popleft()()
        else:
            self._net.waiting.append(self)
