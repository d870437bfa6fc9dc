"""Who has what a client of the embedded server said: its PUBACK leaves when our own link has given one.

Bookkeeping only, in order of arrival: it never touches a socket and never answers for what the link has not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count


class Said:
    """One message of a client. `owed`: the links it was given to; `dup`: a link may have had it already."""

    __slots__ = ("by", "data", "dup", "owed", "packet_id", "qos", "taken", "topic")

    def __init__(self, by: Spoken, topic: str, data: bytes, qos: int = 0, packet_id: int = 0) -> None:
        self.by = by
        self.topic = topic
        self.data = data
        self.qos = qos
        self.packet_id = packet_id
        self.dup = False
        self.taken = False
        self.owed: set[Outbox] = set()

    def take(self) -> None:
        self.taken = True
        self.by.settle()


class Spoken:
    """What one client said and still waits for, in order; `answer` gives each its PUBACK."""

    def __init__(self, answer: Callable[[Said], None]) -> None:
        self.waiting: deque[Said] = deque()
        self._answer = answer

    def settle(self) -> None:
        while self.waiting and self.waiting[0].taken:
            self._answer(self.waiting.popleft())

    def adrift(self) -> list[Said]:
        """What no link has."""
        return [said for said in self.waiting if not said.taken and not said.owed]

    def end(self) -> set[int]:
        """The client is gone, and will send all this again. Returns the packet ids a link may have had."""
        for said in self.waiting:
            for outbox in list(said.owed):
                outbox.withdraw(said)
        had = {said.packet_id for said in self.waiting if said.qos and (said.taken or said.owed or said.dup)}
        self.waiting.clear()
        return had


class Outbox:
    """What goes to one link: in order, `window` at a time, each for as long as its commit takes."""

    def __init__(self, write: Callable[[int, Said], None], window: int) -> None:
        self._write = write
        self._window = window
        self._queue: dict[Said, None] = {}
        self._sent: dict[int, Said] = {}
        self._ids = count()

    def offer(self, said: Said) -> None:
        said.owed.add(self)
        self._queue[said] = None
        self._send()

    def withdraw(self, said: Said) -> None:
        """Unless it was sent."""
        if said in self._queue:
            del self._queue[said]
            said.owed.discard(self)

    def acknowledged(self, packet_id: int) -> None:
        said = self._sent.pop(packet_id, None)
        if said is not None:
            said.owed.discard(self)
            if not said.owed:
                said.take()
            self._send()

    def end(self) -> None:
        """The link is gone: what it did not acknowledge is for the next one."""
        for said in self._sent.values():
            said.dup = True
        for said in (*self._sent.values(), *self._queue):
            said.owed.discard(self)
        self._sent.clear()
        self._queue.clear()

    def _send(self) -> None:
        while self._queue and len(self._sent) < self._window:
            said = next(iter(self._queue))
            del self._queue[said]
            packet_id = next(each for each in (n % 0xFFFF + 1 for n in self._ids) if each not in self._sent)
            self._sent[packet_id] = said
            self._write(packet_id, said)
