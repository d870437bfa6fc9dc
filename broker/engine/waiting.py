"""QoS 0 messages that wait to be taken in: each project gets its turn, and in it each device. Pure.

QoS 0 has no receive window, so one device may send any number of messages. Here it delays and displaces only
its own. What is beyond a bound is dropped, which QoS 0 allows.
"""

from __future__ import annotations

from collections import deque

from broker.seams import Message
from broker.settings import Limits


class _Project:
    def __init__(self) -> None:
        self.devices: dict[str, deque[Message]] = {}
        self.turns: deque[str] = deque()  # devices with messages; the first one is next
        self.count = 0
        self.size = 0


class Waiting:
    """Messages of one device keep their order."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._projects: dict[str, _Project] = {}
        self._turns: deque[str] = deque()
        self._size = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, project: str, device: str, message: Message) -> bool:
        """Returns False if there is no room: the message is dropped."""
        limits, size = self._limits, len(message.payload)
        room = self._projects.get(project)
        if room is not None:
            of_device = len(room.devices.get(device, ()))
            if (
                of_device >= limits.qos0_per_device
                or room.count >= limits.qos0_per_project
                or room.size + size > limits.qos0_bytes // 4
            ):
                return False
        if self._count >= limits.qos0_in_all or self._size + size > limits.qos0_bytes:
            return False
        if room is None:
            room = self._projects[project] = _Project()
            self._turns.append(project)
        if device not in room.devices:
            room.devices[device] = deque()
            room.turns.append(device)
        room.devices[device].append(message)
        room.count, room.size = room.count + 1, room.size + size
        self._count, self._size = self._count + 1, self._size + size
        return True

    def take(self, most: int) -> list[Message]:
        """Removes and returns up to `most` messages: one of each project in turn."""
        return [self._next() for _ in range(min(most, self._count))]

    def _next(self) -> Message:
        project = self._turns.popleft()
        room = self._projects[project]
        device = room.turns.popleft()
        queue = room.devices[device]
        message = queue.popleft()
        if queue:
            room.turns.append(device)
        else:
            del room.devices[device]
        size = len(message.payload)
        room.count, room.size = room.count - 1, room.size - size
        self._count, self._size = self._count - 1, self._size - size
        if room.count:
            self._turns.append(project)
        else:
            del self._projects[project]
        return message
