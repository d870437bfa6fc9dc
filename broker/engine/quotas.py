"""Limits of projects, API keys and devices: queued commands, and commands and requests per minute.

One project, key or device cannot flood the others. In memory only: after a restart everybody has their full
rate again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from broker.domain.errors import Refusal
from broker.domain.fleet import DeviceState
from broker.domain.lanes import Lane, Member
from broker.domain.waiting import Room, Waiting
from broker.seams import Message
from broker.settings import Limits, ProjectLimits, limits_of

MINUTE_MS = 60_000
MOST_KEPT = 10_000  # buckets; beyond it the full ones are forgotten

Policy = Literal["project", "key", "device", "requests"]
WHAT: dict[Policy, str] = {
    "project": "project {} may send {} commands a minute",
    "key": "this key may send {1} commands a minute",
    "device": "device {} may be sent {} commands a minute",
    "requests": "{} may make {} requests a minute",
}


def waiting_room(most: Limits) -> Waiting[Message]:
    """Where messages with QoS 0 wait that come through an external MQTT server."""
    return Waiting(Room(most.qos0_per_device, most.qos0_per_project, most.qos0_in_all, most.qos0_bytes))


class Bucket(NamedTuple):
    """A token bucket of one minute. `name`: whose it is; `rate`: how many a minute."""

    policy: Policy
    name: str
    rate: int


class Quotas:
    """The limits of every project: its own where the settings have a table for it, else the common ones."""

    def __init__(self, limits: Limits, projects: Mapping[str, ProjectLimits]) -> None:
        self.limits = limits
        self._own = {project: limits_of(limits, own) for project, own in projects.items()}
        # The time until which each rate is used up, in units of 1/rate ms (see `take`).
        self._taken: dict[Bucket, int] = {}

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

    def of_command(
        self, actor: str, own: int | None, project: str | None, device: DeviceState | None
    ) -> list[Bucket]:
        """The buckets that a command takes from. `own`: the limit of the actor's key; None: the settings'."""
        limits = self.limits if project is None else self.of(project)
        found = []
        if project is not None:
            found.append(Bucket("project", project, limits.commands_per_minute))
        if actor.startswith("key:"):
            found.append(Bucket("key", actor, limits.commands_per_minute_per_key if own is None else own))
        if device is not None:
            found.append(Bucket("device", device.hardware_id, limits.commands_per_minute_per_device))
        return [bucket for bucket in found if bucket.rate]

    def of_request(self, actor: str, own: int | None) -> list[Bucket]:
        """The bucket that a request takes from, if it is limited. `own`: as for `of_command`."""
        kind, limits = actor.partition(":")[0], self.limits
        usual = {"key": limits.requests_per_minute_per_key, "device": limits.requests_per_minute_per_device}
        rate = usual.get(kind, 0) if own is None else own
        return [Bucket("requests", actor, rate)] if rate else []

    def take_command(self, actor: str, own: int | None, device: DeviceState, now: int) -> Sequence[Bucket]:
        """Takes one command for a device from all its buckets; `own` as above, otherwise as `take`."""
        return self.take(self.of_command(actor, own, device.project, device), now)

    def take(self, buckets: Sequence[Bucket], now: int) -> Sequence[Bucket]:
        """Takes one (at `now`, ms) from each bucket, or, if one is empty, from none. Returns the buckets.

        Raises:
            Refusal: rate_limit_exceeded, with the seconds until the next is allowed.
        """
        taken = {bucket: self._used(bucket, now) + MINUTE_MS for bucket in buckets}
        for bucket, units in taken.items():
            rate = bucket.rate
            if (over := units - now * rate - MINUTE_MS * rate) > 0:
                wait_sec = -(-over // (rate * 1_000))
                said = WHAT[bucket.policy].format(bucket.name, rate)
                raise Refusal(
                    "rate_limit_exceeded",
                    f"{said}; the next is allowed in {wait_sec} s",
                    {"retry_after_sec": wait_sec},
                    retry_after_sec=wait_sec,
                )
        self._taken |= taken
        if len(self._taken) > MOST_KEPT:
            self._taken = {each: used for each, used in self._taken.items() if used > now * each.rate}
        return buckets

    def _used(self, bucket: Bucket, now: int) -> int:
        # Integers in units of 1/rate ms: one command costs MINUTE_MS units, so there is no rounding error.
        return max(self._taken.get(bucket, 0), now * bucket.rate)

    def left(self, bucket: Bucket, now: int) -> tuple[int, int]:
        """How many are left in a bucket now, and the seconds until it is full again."""
        used = self._used(bucket, now) - now * bucket.rate
        return (MINUTE_MS * bucket.rate - used) // MINUTE_MS, -(-used // (bucket.rate * 1_000))

    def give_back(self, buckets: Sequence[Bucket]) -> None:
        """Undoes one `take`: the commit of the command failed."""
        for bucket in buckets:
            if bucket in self._taken:
                self._taken[bucket] -= MINUTE_MS
