"""The log as subscribers follow it: history first, then what is committed, without a gap or a double.

Entries come after their commit and never before. A subscriber that falls behind is not waited for:
its queue is bounded, and it goes on from the log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from broker.cloudevents import Entry, Wanted, entry, is_outward
from broker.events import Recorded
from broker.live import Live
from broker.writer import Writer
from projections import outgoing

QUEUED = 1_000
PAGE = 500

Key = tuple[str | None, str | None]  # project, device id; None: any


class Subscription:
    """Everything wanted that is committed from `since` (a position) on, unless it `overflowed`."""

    def __init__(self, wanted: Wanted, since: int) -> None:
        self.wanted = wanted
        self.since = since
        self.queue: deque[Entry] = deque()
        self.overflowed = False
        self.wake = asyncio.Event()

    def put(self, entry: Entry) -> None:
        if len(self.queue) >= QUEUED:
            self.overflow()
        elif not self.overflowed:
            self.queue.append(entry)
            self.wake.set()

    def overflow(self) -> None:
        self.overflowed = True
        self.queue.clear()
        self.wake.set()

    async def next(self, after: int) -> list[Entry] | None:
        """What has come after a position, once something has; None: it overflowed, ask the log."""
        await self.wake.wait()
        self.wake.clear()
        if self.overflowed:
            return None
        found = [entry for entry in self.queue if entry.position > after]
        self.queue.clear()
        return found


class Feed:
    """`head` is the last durable position."""

    def __init__(self, writer: Writer, live: Live) -> None:
        self._writer = writer
        self._live = live
        self._subscriptions: dict[Key, set[Subscription]] = {}
        writer.listeners.append(self._committed)

    @property
    def head(self) -> int:
        return self._writer.durable

    def reread(self) -> None:
        """A commit failed and the log was read anew: what became of it nobody was told."""
        for found in self._subscriptions.values():
            for subscription in found:
                subscription.overflow()

    def _committed(self, events: list[Recorded]) -> None:
        for recorded in events if self._subscriptions else ():
            project, device_id = recorded.project, recorded.device_id
            keys: tuple[Key, ...] = (
                (None, None),
                (project, None),
                (None, device_id),
                (project, device_id),
            )
            interested = [s for key in keys for s in self._subscriptions.get(key, ())]
            if not interested or not is_outward(recorded):
                continue
            made = self._entry(recorded)
            for subscription in interested:
                if made is None:
                    subscription.overflow()  # memory has let go of the names: the log has them
                elif subscription.wanted.fits(made):
                    subscription.put(made)

    def _entry(self, recorded: Recorded) -> Entry | None:
        state = self._live.command(recorded.stream)
        device = self._live.devices.get(recorded.device_id or "")
        if state is not None:
            return entry(recorded, state.hardware_id, state.type)
        return None if device is None else entry(recorded, device.hardware_id, None)

    def subscribe(self, wanted: Wanted) -> Subscription:
        subscription = Subscription(wanted, self.head)
        self._subscriptions.setdefault((wanted.project, wanted.device_id), set()).add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        key = subscription.wanted.project, subscription.wanted.device_id
        found = self._subscriptions.get(key, set())
        found.discard(subscription)
        if not found:
            self._subscriptions.pop(key, None)

    async def page(self, wanted: Wanted, after: int, limit: int) -> tuple[list[Entry], int]:
        """What is durable and wanted after a position, at most `limit`, ascending; and how far was looked:
        to the head, if there are fewer."""
        until, entries = self.head, list[Entry]()
        while after < until and len(entries) < limit:
            more, after = await self._read(wanted, after, until, limit - len(entries))
            entries += more
        return entries, after

    async def _read(self, wanted: Wanted, after: int, until: int, limit: int) -> tuple[list[Entry], int]:
        return await self._writer.storage.read(lambda sql: outgoing.page(sql, wanted, after, until, limit))

    async def follow(self, wanted: Wanted, after: int) -> AsyncIterator[tuple[list[Entry], int]]:
        """Entries after a position, for ever, in order: each time some, and the position reached.

        Without a gap or a double between history and what is committed now.
        """
        while True:
            subscription = self.subscribe(wanted)
            try:
                entries: list[Entry] | None = []
                while after < subscription.since:
                    history, after = await self._read(wanted, after, subscription.since, PAGE)
                    yield history, after
                while entries is not None:
                    if entries:
                        after = entries[-1].position
                        yield entries, after
                    entries = await subscription.next(after)
            finally:
                self.unsubscribe(subscription)
