"""Limits of projects, API keys and devices: queued commands, rates of commands, requests and device events.

One project, key or device cannot take the capacity of the others. Used rates are kept in memory only: after a
restart each rate is full again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from broker.domain.errors import Refusal, Unavailable
from broker.domain.events import DeviceEvent
from broker.domain.fleet import DeviceState, News, spend
from broker.domain.lanes import Lane, Member
from broker.domain.waiting import Room, Waiting
from broker.engine.live import Live
from broker.engine.writer import Writer
from broker.seams import Message
from broker.settings import Limits, ProjectLimits, limits_of
from devices.schema import holds_more

MINUTE_MS = 60_000
MOST_KEPT = 10_000  # buckets; beyond it those that are full again are dropped
FLUSH_SEC = 0.5  # how often waiting presence and attributes are recorded, within the devices' rates
FLUSH_DEVICES = 500

Record = Callable[[DeviceEvent, str, DeviceState, str, str], DeviceState]
Ready = Callable[[list[str]], Awaitable[None]]

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
    """The limits of every project: its own if the settings have a table for it, else the common ones."""

    def __init__(self, limits: Limits, projects: Mapping[str, ProjectLimits]) -> None:
        self.limits = limits
        self._own = {project: limits_of(limits, own) for project, own in projects.items()}
        # The time until which each rate is used up, in units of 1/rate ms (see `take`).
        self._taken: dict[Bucket, int] = {}

    def of(self, project: str) -> Limits:
        return self._own.get(project, self.limits)

    def check_params(self, project: str, params: Any, encoded: bytes) -> None:
        """Checks the size of a command's parameters.

        Raises:
            Refusal: too_large.
        """
        limits = self.of(project)
        if len(encoded) > limits.params_bytes:
            what = f"{len(encoded)} bytes; at most {limits.params_bytes} are allowed"
            raise Refusal("too_large", f"params: {what}")
        if holds_more(params, limits.params_values):
            what = f"more than {limits.params_values} values; send many values as one text"
            raise Refusal("too_large", f"params: {what}")

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


class Told:
    """Presence and attributes that devices report, recorded within a rate per device.

    Beyond the rate, the newest presence and the newest attributes wait in memory; older ones are not
    recorded. So a device that connects and disconnects all the time does not fill the log. Delivery uses the
    waiting values at once: `newest` contains them, and a hand-over records them first.

    `record(event, device_id, before, project, actor)` stages an event and returns the new state. `ready`: see
    `Commands.ready`. `settled(device_id)` is called after `run` has recorded what waited.
    """

    def __init__(self, writer: Writer, live: Live, limits: Limits, ready: Ready, record: Record) -> None:
        self.writer = writer
        self.live = live
        self._per_sec, self._burst = limits.device_events_per_sec, limits.device_events_burst
        self._ready = ready
        self.settled: Callable[[str], None] = lambda device_id: None
        self.on_folded: Callable[[], None] = lambda: None
        self._record = record
        self._news: dict[str, News] = {}  # device id: what is not recorded yet
        self._used_until: dict[str, int] = {}  # device id: see `spend`
        self._kept = MOST_KEPT
        self._wake = asyncio.Event()

    def __contains__(self, device_id: str) -> bool:
        return device_id in self._news

    def newest(self, name: str) -> DeviceState | None:
        """A device in memory, by id or hardware id, with the values that are not recorded yet."""
        device = self.live.device(name)
        news = None if device is None else self._news.get(device.id)
        return device if device is None or news is None else news.applied(device)

    def tell(self, device_id: str, news: News) -> None:
        """Takes in a report. Beyond the device's rate, `run` records its newest values later."""
        self._news[device_id] = self._news.get(device_id, News()).then(news)
        if not self._settle_in_time(device_id):
            self.on_folded()
            self._wake.set()

    def settle(self, device_id: str) -> bool:
        """Records the waiting values of a device. Returns False if the device is not in memory.

        Raises:
            Unavailable: the log cannot be written now.
        """
        news = self._news.get(device_id)
        if news is None:
            return True
        device = self.live.device(device_id)
        if device is None:
            return False
        for event, actor in news.events(device) if device.deleted_at is None else ():
            device = self._record(event, device_id, device, device.project, actor)
        del self._news[device_id]
        self.writer.then(lambda: None, lambda: self._tell_again(device_id, news))
        return True

    def _tell_again(self, device_id: str, news: News) -> None:
        """The commit of these events failed. The device will not report them again, so they wait again."""
        self._news[device_id] = news.then(self._news.get(device_id, News()))
        self._wake.set()

    def _settle_in_time(self, device_id: str) -> bool:
        """Calls `settle` if the device's rate allows it. Returns whether the values were recorded."""
        now = self.writer.now()
        until = spend(self._used_until.get(device_id, 0), now, self._per_sec, self._burst)
        if until is None or not self.settle(device_id):
            return False
        self._used_until[device_id] = until
        if len(self._used_until) > self._kept:
            self._used_until = {name: each for name, each in self._used_until.items() if each > now}
            self._kept = max(MOST_KEPT, 2 * len(self._used_until))
        return True

    def settle_all(self) -> None:
        """Records all waiting values, without regard to rates. Called at a clean stop."""
        for device_id in list(self._news):
            self.settle(device_id)

    async def run(self) -> None:
        """Records waiting values, for ever, as soon as each device's rate allows it."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._news:
                await asyncio.sleep(FLUSH_SEC)
                await self._flush()

    async def _flush(self) -> None:
        waiting = list(self._news)
        for first in range(0, len(waiting), FLUSH_DEVICES):
            some = waiting[first : first + FLUSH_DEVICES]
            await self.writer.opened()
            try:
                await self._ready(some)
            except Unavailable:
                return  # `run` tries again after `FLUSH_SEC`
            for device_id in some:
                if self.live.device(device_id) is None:
                    self._news.pop(device_id, None)  # its registration was never committed
                elif device_id in self._news and self._settle_in_time(device_id):
                    self.settled(device_id)
