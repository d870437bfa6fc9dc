"""Limits of each project: queued commands, and commands per minute. One project cannot flood the others.

In memory only: after a restart every project has its full rate again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Lane, Member
from broker.domain.waiting import Room, Waiting
from broker.seams import Message
from broker.settings import Limits, ProjectLimits, limits_of

MINUTE_MS = 60_000


def waiting_room(most: Limits) -> Waiting[Message]:
    """Where messages with QoS 0 wait that come through an external MQTT server."""
    return Waiting(Room(most.qos0_per_device, most.qos0_per_project, most.qos0_in_all, most.qos0_bytes))


class Quotas:
    """The limits of every project: its own where the settings have a table for it, else the common ones."""

    def __init__(self, limits: Limits, projects: Mapping[str, ProjectLimits]) -> None:
        self.limits = limits
        self._own = {project: limits_of(limits, own) for project, own in projects.items()}
        # Per project: the time until which its rate is used up, in units of 1/rate ms (see `take`).
        self._taken: dict[str, int] = {}

    def of(self, project: str) -> Limits:
        return self._own.get(project, self.limits)

    def check_queue(self, device: DeviceState, lane: Lane, name: str, leaving: Sequence[Member]) -> None:
        """Checks that the lane has room for one more command of this name.

        `leaving`: commands that the new one replaces; they are not counted.

        Raises:
            Refusal: queue_full.
        """
        most = self.of(device.project)
        queued = len(lane.members) - len(leaving)
        same = sum(1 for member in lane.members.values() if member.state.type == name)
        same -= sum(1 for member in leaving if member.state.type == name)
        if queued >= most.queue_per_device or same >= most.queue_per_name:
            raise Refusal(
                "queue_full",
                f"device {device.hardware_id} has {queued} open commands, {same} of them {name}; "
                f"at most {most.queue_per_device} per device and {most.queue_per_name} per command name "
                "may be open",
            )

    def take(self, project: str, now: int) -> None:
        """Counts one command (at `now`, ms) against the project's rate, a token bucket of one minute.

        Raises:
            Refusal: rate_limit_exceeded, with the seconds until the next command is allowed.
        """
        rate = self.of(project).commands_per_minute
        if rate == 0:
            return
        # Integers in units of 1/rate ms: one command costs MINUTE_MS units, so there is no rounding error.
        taken = max(self._taken.get(project, 0), now * rate) + MINUTE_MS
        if (over := taken - now * rate - MINUTE_MS * rate) > 0:
            wait_sec = -(-over // (rate * 1_000))
            raise Refusal(
                "rate_limit_exceeded",
                f"project {project} may send {rate} commands a minute; the next is allowed in {wait_sec} s",
                {"retry_after_sec": wait_sec},
                retry_after_sec=wait_sec,
            )
        self._taken[project] = taken

    def give_back(self, project: str) -> None:
        """Undoes one `take`: the commit of the command failed."""
        if project in self._taken:
            self._taken[project] -= MINUTE_MS
