"""What one project may have queued and send in a minute, so that its flood stays its own.

Memory only: after a restart every project has its whole minute again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Lane, Member
from broker.settings import Limits, ProjectLimits, limits_of

MINUTE_MS = 60_000


class Quotas:
    """The limits of every project: its own where the settings name it, else those of all."""

    def __init__(self, limits: Limits, projects: Mapping[str, ProjectLimits]) -> None:
        self.limits = limits
        self._own = {project: limits_of(limits, own) for project, own in projects.items()}
        self._taken: dict[str, int] = {}  # until when each project's minute is used up, in ms / its rate

    def of(self, project: str) -> Limits:
        return self._own.get(project, self.limits)

    def check_queue(self, device: DeviceState, lane: Lane, name: str, leaving: Sequence[Member]) -> None:
        """One more command of this name; those that are `leaving` make room for it.

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
                f"at most {most.queue_per_device} and {most.queue_per_name} are queued",
            )

    def take(self, project: str, now: int) -> None:
        """Takes one command (at `now`, ms) out of the project's minute, which fills up evenly again.

        Raises:
            Refusal: rate_limit_exceeded, saying when the next is allowed.
        """
        rate = self.of(project).commands_per_minute
        if rate == 0:
            return
        # Whole numbers in units of 1/rate ms, in which one command takes a minute: nothing is rounded away.
        taken = max(self._taken.get(project, 0), now * rate) + MINUTE_MS
        if (over := taken - now * rate - MINUTE_MS * rate) > 0:
            wait_sec = -(-over // (rate * 1_000))
            raise Refusal(
                "rate_limit_exceeded",
                f"project {project} may send {rate} commands a minute; the next one in {wait_sec} s",
                {"retry_after_sec": wait_sec},
                retry_after_sec=wait_sec,
            )
        self._taken[project] = taken
