"""The log as subscribers follow it: history first, then what is committed, without a gap or a double.

Entries come after their commit and never before. A subscriber that falls behind is not waited for:
what is kept for it is bounded, and it goes on from the log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from broker.domain.cloudevents import Entry, Wanted, entry, is_outward
from broker.domain.events import Erased, Recorded, subject_kind
from broker.engine.live import Live
from broker.engine.writer import Writer
from projections import outgoing

LOOKS = 20  # reads of one page: a filter that fits little must not walk a whole log in one request
QUEUED = 1_000  # positions that wait for one subscriber, and entries kept for all of them together
BATCH = 100  # what one subscriber takes at a time: a slow one must not hold on to more

Key = tuple[str | None, str | None]  # project, device by either name; None: any


class Subscription:
    """One subscriber's place in the log: everything wanted up to `reached` was given to it.

    What is committed comes as positions in a queue; up to `_since` the log itself is asked.
    """

    def __init__(self, feed: Feed, wanted: Wanted, after: int) -> None:
        self.wanted = wanted
        self.reached = after
        self.ended = False
        self._feed = feed
        self._since = feed.head
        self._erasures = feed.erasures
        self._queue: deque[int] = deque()
        self._wake = asyncio.Event()

    @property
    def stale(self) -> bool:
        """Whether something was erased since the last entries were looked up: they may hold it."""
        return self._erasures != self._feed.erasures

    def give_back(self, reached: int) -> None:
        """What was given after that position was not passed on, and is stale: it comes anew."""
        self.reached = reached

    @property
    def lag(self) -> int:
        """How many events of the log have not been looked at for it."""
        behind = self._queue or self.reached < self._since
        return self._feed.head - self.reached if behind else 0

    def put(self, position: int) -> None:
        """A wanted event became durable."""
        if position <= self._since:
            return
        self._queue.append(position)
        self._wake.set()
        if len(self._queue) > QUEUED:
            self.fall_behind()

    def fall_behind(self) -> None:
        """From here to the head the log is asked."""
        self._queue.clear()
        self._since = self._feed.head
        self._wake.set()

    def end(self) -> None:
        """Nothing more is given, and whoever waits is told."""
        self.ended = True
        self._wake.set()

    async def next(self, idle_sec: float | None = None) -> list[Entry] | None:
        """What comes next, in order; None if nothing wanted came for so long, or it was ended.

        Empty at times while history is read: none of what was looked at is wanted.
        """
        while not self.ended:
            self._erasures = self._feed.erasures
            if self.reached < self._since:
                entries, self.reached = await self._feed.read(self.wanted, self.reached, self._since, BATCH)
                return entries
            if entries := self._queued():
                return entries
            if self.reached < self._since:
                continue
            if self._feed.settled:
                self.reached = self._feed.head
            self._wake.clear()
            try:
                async with asyncio.timeout(idle_sec):
                    await self._wake.wait()
            except TimeoutError:
                break
        return None

    def _queued(self) -> list[Entry]:
        entries: list[Entry] = []
        while self._queue and len(entries) < BATCH:
            found = self._feed.recent.get(self._queue[0])
            if found is None:
                self.fall_behind()
                break
            self._queue.popleft()
            entries.append(found)
            self.reached = found.position
        return entries


class Feed:
    """`head` is the last durable position; every event after `kept_after` is still there."""

    def __init__(self, writer: Writer, live: Live) -> None:
        self.kept_after = 0
        self.recent: dict[int, Entry] = {}
        self.erasures = 0  # how many became durable
        self._writer = writer
        self._live = live
        # In order of their coming: one run of the simulation is one run, in every process.
        self._subscriptions: dict[Key, dict[Subscription, None]] = {}
        writer.listeners.append(self._committed)

    async def open(self) -> None:
        self.kept_after = await self._writer.storage.read(outgoing.kept_after)

    @property
    def head(self) -> int:
        return self._writer.durable

    @property
    def settled(self) -> bool:
        """Whether everybody was told of all up to the head. After a failed commit that takes a moment."""
        return self._writer.open

    def reread(self) -> None:
        """Everybody goes on from the log, as after a failed commit: what became of that nobody was told."""
        for subscription in self._all():
            subscription.fall_behind()

    def _all(self) -> list[Subscription]:
        return [subscription for found in self._subscriptions.values() for subscription in found]

    def _committed(self, events: list[Recorded]) -> None:
        if any(isinstance(recorded.event, Erased) for recorded in events):
            # What waits here may be what it takes away; in the log it is not shown any more.
            self.erasures += 1
            self.recent.clear()
            self.reread()
            return
        for recorded in events if self._subscriptions else ():
            if not is_outward(recorded):
                continue
            state = self._live.command(recorded.stream)
            device = state or self._live.devices.get(recorded.device_id or "")
            if device is None or (state is None and subject_kind(recorded.stream) == "command"):
                self.reread()  # memory has let go of the names: the log has them
                return
            found = self._interested(recorded.project, recorded.device_id, device.hardware_id)
            if not found:
                continue
            made = entry(recorded, device.hardware_id, None if state is None else state.type)
            self._keep(made)
            for subscription in found:
                if subscription.wanted.fits(made):
                    subscription.put(made.position)

    def _interested(self, project: str, device_id: str | None, hardware_id: str) -> list[Subscription]:
        find = self._subscriptions.get
        # A device may have one name for both.
        devices = dict.fromkeys((None, device_id, hardware_id))
        return [s for owner in (None, project) for device in devices for s in find((owner, device), ())]

    def _keep(self, made: Entry) -> None:
        self.recent[made.position] = made
        if len(self.recent) > QUEUED:
            del self.recent[next(iter(self.recent))]

    @contextmanager
    def subscribed(self, wanted: Wanted, after: int) -> Iterator[Subscription]:
        """A subscription to everything after a position."""
        key = wanted.project, wanted.device
        subscription = Subscription(self, wanted, after)
        found = self._subscriptions.setdefault(key, {})
        found[subscription] = None
        try:
            yield subscription
        finally:
            del found[subscription]
            if not found:
                del self._subscriptions[key]

    async def page(self, wanted: Wanted, after: int, limit: int) -> tuple[list[Entry], int]:
        """What is durable and wanted after a position, at most `limit`, ascending; and how far was looked:
        to the head, or as far as one request may."""
        until, entries = self.head, list[Entry]()
        for _ in range(LOOKS):
            if after >= until or len(entries) >= limit:
                break
            more, after = await self.read(wanted, after, until, limit - len(entries))
            entries += more
        return entries, after

    async def read(self, wanted: Wanted, after: int, until: int, limit: int) -> tuple[list[Entry], int]:
        """One bounded look at the log: what it found, and up to where it looked."""
        return await self._writer.storage.read(lambda sql: outgoing.page(sql, wanted, after, until, limit))

    async def follow(self, wanted: Wanted, after: int) -> AsyncIterator[tuple[list[Entry], int]]:
        """Entries after a position, for ever, in order: each time some, and the position reached."""
        with self.subscribed(wanted, after) as subscription:
            while True:
                entries = await subscription.next()
                yield entries or [], subscription.reached
