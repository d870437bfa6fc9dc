"""The feed of the log for subscribers: history first, then new events, without gaps and without duplicates.

A subscriber gets an entry only after its commit. The feed does not wait for slow subscribers: the list of new
events is bounded, and a subscriber that falls behind continues from the log.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager

from broker.domain.cloudevents import Entry, Wanted, entry
from broker.domain.events import ERASURES, Pending, subject_kind
from broker.engine.live import Live
from broker.engine.writer import Writer
from broker.seams import Placed
from projections import outgoing

LOOKS = 20  # reads per page: a filter that matches few events must not scan a whole log in one request
LATE = 500  # after so many later events a subscriber is woken at once, before its events leave the cache
# Bound of the cache (entries) and of each filter's list (positions): LATE and two full commits.
QUEUED = 2_500
BATCH = 100  # entries that one subscriber gets at a time: bounds the memory that a slow one holds
WOKEN_AT_ONCE = 10  # in one turn of the loop; each may have a batch to encode

Key = tuple[str | None, str | None, str | None]  # project, device (id or hardware id), command id; None: any
Form = tuple[bool, bool, bool]  # which of the three a key has


class Channel:
    """The positions of the newest events that fit one filter, shared by all subscribers with that filter."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.newest = 0
        self.dropped = 0  # the last position that is no longer in the list
        self.subscriptions: dict[Subscription, None] = {}  # a set, but in the order of insertion

    def put(self, position: int) -> None:
        self.positions.append(position)
        self.newest = position
        if len(self.positions) >= QUEUED + BATCH:
            self.dropped = self.positions[BATCH - 1]
            del self.positions[:BATCH]


class Subscription:
    """One subscriber's position in the log: it was given every wanted event up to `reached`.

    Events up to `_since` are read from the log. The positions of later events are in the channel.
    """

    def __init__(self, feed: Feed, wanted: Wanted, after: int, channel: Channel) -> None:
        self.wanted = wanted
        self.reached = after
        self.ended = False
        self._feed = feed
        self._since = feed.head
        self._erasures = feed.erasures
        self._channel = channel
        self._wake = asyncio.Event()

    @property
    def stale(self) -> bool:
        """Whether an event was erased after the last entries were read: they may contain its data."""
        return self._erasures != self._feed.erasures

    def give_back(self, reached: int) -> None:
        """Moves back to a position, so that later entries are read again: the subscriber did not pass them
        on, and they are stale."""
        self.reached = reached

    @property
    def lag(self) -> int:
        """How many events of the log were not yet checked for this subscriber."""
        behind = self.reached < max(self._since, self._channel.newest)
        return self._feed.head - self.reached if behind else 0

    def fall_behind(self) -> None:
        """Everything up to the head is read from the log."""
        self._since = self._feed.head

    def wake(self) -> None:
        """Lets a waiting `next` look again."""
        self._wake.set()

    def end(self) -> None:
        """Ends the subscription: it gives no more entries, and a waiting `next` returns None."""
        self.ended = True
        self._wake.set()

    async def next(self, idle_sec: float | None = None) -> list[Entry] | None:
        """The next entries, in order; None after `idle_sec` without a wanted event, or after `end`.

        The list can be empty while history is read: no event of that part of the log was wanted.
        """
        while not self.ended:
            self._erasures = self._feed.erasures
            if self.reached < self._since:
                entries, self.reached = await self._feed.read(self.wanted, self.reached, self._since, BATCH)
                return entries
            if entries := self._newest():
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

    def _newest(self) -> list[Entry]:
        entries: list[Entry] = []
        if self.reached < self._channel.dropped:
            self.fall_behind()
            return entries
        positions = self._channel.positions
        start = bisect_right(positions, self.reached)
        for position in positions[start : start + BATCH]:
            found = self._feed.recent.get(position)
            if found is None:
                self.fall_behind()
                break
            entries.append(found)
            self.reached = position
        return entries


class Feed:
    """`head` is the last durable position. The data of all events after `kept_after` is still in the log."""

    def __init__(self, writer: Writer, live: Live) -> None:
        self.kept_after = 0
        self.recent: dict[int, Entry] = {}
        self.erasures = 0  # durable commits that contained an erasure
        self._told = 0  # the last position that a commit told of
        self._writer = writer
        self._live = live
        # Dicts keep the order of insertion, so a simulation run is the same in every process.
        # By form first: few forms are in use at a time, mostly one, so an event is looked up with few keys.
        self._channels: dict[Form, dict[Key, dict[Wanted, Channel]]] = {}
        self._asleep: dict[Subscription, int] = {}  # those to be woken, with the head since then
        self._waking = False
        writer.listeners.append(self._committed)

    async def open(self) -> None:
        self.kept_after = await self._writer.storage.read(outgoing.kept_after)

    @property
    def head(self) -> int:
        return self._writer.durable

    @property
    def settled(self) -> bool:
        """Whether every subscriber was told of all events up to the head; False for a short time after a
        failed commit."""
        return self._writer.open

    def reread(self) -> None:
        """Makes every subscriber continue from the log, for example after a failed commit, whose outcome
        was not reported."""
        self._told = self.head
        keyed = (found for by_key in self._channels.values() for found in by_key.values())
        channels = [channel for found in keyed for channel in found.values()]
        for channel in channels:
            for subscription in channel.subscriptions:
                subscription.fall_behind()
        self._rouse(channels)

    def _committed(self, events: list[Pending], placed: Placed) -> None:
        gap, self._told = placed.first != self._told + 1, placed.last
        # After a gap only the log has all events: another node recorded some in between.
        if gap or ERASURES in {pending.stream for pending in events}:
            # Queued entries may contain the erased data; a read of the log leaves it out.
            self.erasures += 1
            self.recent.clear()
            self.reread()
            return
        told: dict[Channel, None] = {}
        for index, pending in enumerate(events) if self._channels else ():
            kind = subject_kind(pending.stream)
            if kind == "broker":
                continue  # such events are not published
            state = self._live.command(pending.stream) if kind == "command" else None
            device = state if kind == "command" else self._live.devices.get(pending.device_id or "")
            if device is None:
                self.reread()  # the device's names are no longer in memory; the log has them
                return
            found = self._interested(pending, device.hardware_id)
            if not found:
                continue
            name = None if state is None else state.type
            made = entry(pending, placed.first + index, placed.times[index], device.hardware_id, name)
            self._keep(made)
            for wanted, channel in found:
                if wanted.fits(made):
                    channel.put(made.position)
                    told[channel] = None
        self._rouse(told)

    def _rouse(self, channels: Iterable[Channel]) -> None:
        for channel in channels:
            for subscription in channel.subscriptions:
                self._asleep.setdefault(subscription, self.head)
        if self._asleep and not self._waking:
            self._wake_some()

    def _wake_some(self) -> None:
        """Wakes only some subscribers in each turn of the loop: a project may have thousands, and each of
        them then writes to its client. Late ones do not wait longer: their events would leave the cache."""
        for count, (subscription, since) in enumerate(list(self._asleep.items())):
            if count >= WOKEN_AT_ONCE and self.head - since < LATE:
                break
            del self._asleep[subscription]
            subscription.wake()
        self._waking = bool(self._asleep)
        if self._waking:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _interested(self, pending: Pending, hardware_id: str) -> list[tuple[Wanted, Channel]]:
        found: list[tuple[Wanted, Channel]] = []
        for (of_project, of_device, of_command), by_key in self._channels.items():
            project = pending.project if of_project else None
            command = pending.stream if of_command else None
            # The device id and the hardware id can be equal: the dict removes the duplicate.
            for device in dict.fromkeys((pending.device_id, hardware_id)) if of_device else (None,):
                found += by_key.get((project, device, command), {}).items()
        return found

    def _keep(self, made: Entry) -> None:
        self.recent[made.position] = made
        if len(self.recent) > QUEUED:
            del self.recent[next(iter(self.recent))]

    @contextmanager
    def subscribed(self, wanted: Wanted, after: int) -> Iterator[Subscription]:
        """A subscription to everything after a position."""
        key = wanted.project, wanted.device, wanted.command_id
        form = key[0] is not None, key[1] is not None, key[2] is not None
        by_key = self._channels.setdefault(form, {})
        channels = by_key.setdefault(key, {})
        channel = channels.setdefault(wanted, Channel())
        subscription = Subscription(self, wanted, after, channel)
        channel.subscriptions[subscription] = None
        try:
            yield subscription
        finally:
            del channel.subscriptions[subscription]
            if not channel.subscriptions:
                del channels[wanted]
            if not channels:
                del by_key[key]
            if not by_key:
                del self._channels[form]

    async def page(self, wanted: Wanted, after: int, limit: int) -> tuple[list[Entry], int]:
        """The durable and wanted entries after a position, ascending, at most `limit`; and the position up
        to which the log was read: the head, or the limit of reads for one request."""
        until, entries = self.head, list[Entry]()
        for _ in range(LOOKS):
            if after >= until or len(entries) >= limit:
                break
            more, after = await self.read(wanted, after, until, limit - len(entries))
            entries += more
        return entries, after

    async def read(self, wanted: Wanted, after: int, until: int, limit: int) -> tuple[list[Entry], int]:
        """One bounded read of the log: the entries found, and the position up to which it read."""
        return await self._writer.storage.read(lambda sql: outgoing.page(sql, wanted, after, until, limit))

    async def follow(self, wanted: Wanted, after: int) -> AsyncIterator[tuple[list[Entry], int]]:
        """Yields entries after a position, in order, without end: each time a list, and how far it read."""
        with self.subscribed(wanted, after) as subscription:
            while True:
                entries = await subscription.next()
                yield entries or [], subscription.reached
