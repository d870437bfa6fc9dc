"""QoS 0 messages that wait to be handled: projects take turns, and so do the devices of each project. Pure.

QoS 0 has no receive window, so one device may send any number of messages. Here they delay and displace only
messages of the same device. Messages beyond a bound are dropped, which QoS 0 allows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Room(NamedTuple):
    """How many messages may wait: of a device, of a project, in all. `size`: bytes in all; of a project a
    quarter."""

    per_device: int
    per_project: int
    in_all: int
    size: int


def first(queue: Iterable[T], most: int, size: int, size_of: Callable[[T], int]) -> list[T]:
    """The first messages of a queue: at most `most`, with at most `size` bytes in all, but at least one."""
    found: list[T] = []
    for message in queue:
        size -= size_of(message)
        if found and (size < 0 or len(found) == most):
            break
        found.append(message)
    return found


class _Project(Generic[T]):
    def __init__(self) -> None:
        self.devices: dict[str, deque[tuple[T, int]]] = {}
        self.turns: deque[str] = deque()  # devices with messages; the first one is next
        self.count = 0
        self.size = 0


class Waiting(Generic[T]):
    """Messages of one device keep their order."""

    def __init__(self, most: Room) -> None:
        self._most = most
        self._projects: dict[str, _Project[T]] = {}
        self._turns: deque[str] = deque()
        self._size = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, project: str, device: str, message: T, size: int) -> bool:
        """Returns False if there is no room: the message is dropped."""
        most = self._most
        room = self._projects.get(project)
        if room is not None:
            of_device = len(room.devices.get(device, ()))
            if (
                of_device >= most.per_device
                or room.count >= most.per_project
                or room.size + size > most.size // 4
            ):
                return False
        if self._count >= most.in_all or self._size + size > most.size:
            return False
        if room is None:
            room = self._projects[project] = _Project()
            self._turns.append(project)
        if device not in room.devices:
            room.devices[device] = deque()
            room.turns.append(device)
        room.devices[device].append((message, size))
        room.count, room.size = room.count + 1, room.size + size
        self._count, self._size = self._count + 1, self._size + size
        return True

    def take(self, most: int) -> list[T]:
        """Removes and returns up to `most` messages: one of each project in turn."""
        return [self._next() for _ in range(min(most, self._count))]

    def _next(self) -> T:
        project = self._turns.popleft()
        room = self._projects[project]
        device = room.turns.popleft()
        queue = room.devices[device]
        message, size = queue.popleft()
        if queue:
            room.turns.append(device)
        else:
            del room.devices[device]
        room.count, room.size = room.count - 1, room.size - size
        self._count, self._size = self._count - 1, self._size - size
        if room.count:
            self._turns.append(project)
        else:
            del self._projects[project]
        return message
