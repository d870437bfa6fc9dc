"""Publishes command events over MQTT to `<prefix>/evt/<hardware_id>/<command_id>`, at least once.

Events are published with QoS 1, not retained, in order. A checkpoint beside the log records how far the MQTT
server has acknowledged them; after a failure or a restart publishing resumes there. Event publishes use no
send slot, so they never delay a command.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

from broker.domain.cloudevents import Entry, Wanted, encoded
from broker.domain.errors import Unavailable, not_found
from broker.engine.live import Recent
from broker.engine.writer import Writer
from broker.seams import Link, Outgoing, Put, Receipt, Sql
from broker.subscriptions.feed import Feed, Subscription

logger = structlog.get_logger()

IN_FLIGHT = 32
SAVE_SEC = 1.0
AGAIN_SEC = 1.0
LONGEST_PAUSE_SEC = 60.0
REFUSED = 0x80
# Reason codes about this one message: its topic, its size, its format. A retry would block all later events.
NEVER = frozenset({0x90, 0x95, 0x99})


class _Flight:
    """The publishes of one run that wait for a PUBACK, in order of position. `stop`: called when it fails."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.open: deque[int] = deque()
        self.failed: str | None = None
        self._taken: set[int] = set()
        self._news = asyncio.Event()

    def settle(self, position: int, receipt: Receipt) -> None:
        if receipt.reason is None:
            self.failed = self.failed or "no receipt"
        elif receipt.reason in NEVER:
            logger.error("mqtt.event_refused", position=position, reason=f"0x{receipt.reason:02x}")
            self._taken.add(position)
        elif receipt.reason >= REFUSED:
            self.failed = f"the MQTT server refused the publish (0x{receipt.reason:02x})"
        else:
            self._taken.add(position)
        while self.open and self.open[0] in self._taken:
            self._taken.discard(self.open.popleft())
        self._news.set()
        if self.failed is not None:
            self._stop()

    @property
    def full(self) -> bool:
        return len(self.open) >= IN_FLIGHT and self.failed is None

    async def room(self) -> None:
        """Waits until another event may be published."""
        while self.full:
            self._news.clear()
            await self._news.wait()


class MqttEvents:
    """`wanted` returns whether a client may be subscribed; events committed while it is False are skipped.

    `sent` is called with the number of events that were published.
    """

    def __init__(self, writer: Writer, feed: Feed, prefix: str) -> None:
        self.link: Link
        self.log_id = ""
        self.wanted: Callable[[], bool] = lambda: True
        self.sent: Callable[[int], None] = lambda _: None
        # hardware id → project, id and hardware id, of recently published devices
        self.devices: Recent[str, tuple[str, str, str]] = Recent()
        self._writer = writer
        self._feed = feed
        self._prefix = prefix
        self._checkpoint = 0
        self._saved = 0
        self._flight = _Flight(lambda: None)
        self._live: Subscription | None = None  # while it waits for the next entries
        self._why: str | None = None
        self._pause_sec = AGAIN_SEC  # doubles while the MQTT server acknowledges nothing
        self._changed = asyncio.Event()  # there may be something to save
        self._changed.set()
        writer.listeners.append(lambda events, placed: self._changed.set() if events else None)

    @property
    def lag(self) -> int:
        return 0 if self._at_head else max(0, self._feed.head - self._checkpoint)

    @property
    def _at_head(self) -> bool:
        """Whether the MQTT server has taken every event up to the head that is to be published."""
        waits, flight = self._live, self._flight
        return waits is not None and waits.lag == 0 and not flight.open and flight.failed is None

    async def load(self, log_id: str) -> None:
        """Reads the checkpoint of the last process; without one, begins with events from now on."""

        async def work(sql: Sql) -> int | None:
            row = await sql.one("SELECT value FROM meta WHERE key = 'mqtt_events'")
            return int(row[0]) if row else None

        self.log_id = log_id
        saved = await self._writer.storage.read(work)
        self._checkpoint = self._feed.head if saved is None else min(saved, self._feed.head)
        self._saved = self._checkpoint if saved is not None else -1

    async def run(self) -> None:
        """Publishes committed events without end; after a failure, again from the checkpoint."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep())
            while True:
                if self.link.up:
                    await self._tell_all()
                await asyncio.sleep(self._pause_sec)
                self._pause_sec = min(2 * self._pause_sec, LONGEST_PAUSE_SEC) if self.link.up else AGAIN_SEC

    async def _tell_all(self) -> None:
        with self._feed.subscribed(Wanted(), self._checkpoint) as subscription:
            self._flight = flight = _Flight(subscription.end)
            while flight.failed is None:
                await self._tell(subscription, flight)
        if self.link.up and flight.failed != self._why:
            logger.warning("mqtt.events_not_taken", why=flight.failed, position=self._checkpoint)
        self._why = flight.failed

    async def _tell(self, subscription: Subscription, flight: _Flight) -> None:
        self._live = subscription
        try:
            entries = await subscription.next()
        finally:
            self._live = None
        for entry in entries or ():
            if (command_id := entry.command_id) is not None and self.wanted():
                if flight.full:
                    await flight.room()
                    if subscription.stale:
                        subscription.give_back(entry.position - 1)
                        return
                if flight.failed is not None or not self._publish(entry, command_id, flight):
                    flight.failed = flight.failed or "the link is down"
                    return
        self._looked(subscription.reached, flight)

    def message(self, entry: Entry, command_id: str) -> Outgoing:
        """The MQTT message of one command event."""
        self.devices.put(entry.hardware_id, (entry.project, entry.device_id, entry.hardware_id))
        return Outgoing(
            topic=f"{self._prefix}/evt/{entry.hardware_id}/{command_id}",
            payload=encoded(self.log_id, entry),
        )

    async def again(self, position: int) -> str | None:
        """Publishes one event once more. Returns its topic, or None if it is not a command event.

        Raises:
            Refusal: not_found.
            Unavailable: the MQTT server did not take it.
        """
        found, _ = await self._feed.page(Wanted(), position - 1, 1)
        if not found or found[0].position != position:
            raise not_found("event", str(position))
        if (command_id := found[0].command_id) is None:
            return None
        taken: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        message = self.message(found[0], command_id)
        sent = self.link.publish(message, taken.set_result)
        if not sent or (reason := (await taken).reason) is None or reason >= REFUSED:
            raise Unavailable("the MQTT server did not take the event")
        return message.topic

    def _publish(self, entry: Entry, command_id: str, flight: _Flight) -> bool:
        flight.open.append(entry.position)
        receipt = partial(self._receipt, flight, entry.position)
        if not self.link.publish(self.message(entry, command_id), receipt):
            return False
        self.sent(1)
        return True

    def _receipt(self, flight: _Flight, position: int, receipt: Receipt) -> None:
        flight.settle(position, receipt)
        if flight is self._flight and flight.failed is None:
            self._why, self._pause_sec = None, AGAIN_SEC
            self._checkpoint = flight.open[0] - 1 if flight.open else max(self._checkpoint, position)
            self._changed.set()

    def _looked(self, reached: int, flight: _Flight) -> None:
        if not flight.open and flight.failed is None:
            self._checkpoint = max(self._checkpoint, reached)
            self._changed.set()

    async def _keep(self) -> None:
        """Saves at most once a second, and sleeps while nothing changes."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(SAVE_SEC)
            self._changed.clear()
            self.save()

    def save(self) -> None:
        """Stages the checkpoint for the next commit. After a crash, events since the last saved checkpoint
        are published again."""
        if self._at_head:
            self._checkpoint = max(self._checkpoint, self._feed.head)
        checkpoint = self._checkpoint
        if checkpoint == self._saved:
            return
        try:
            self._writer.also(Put("meta", ("mqtt_events", str(checkpoint))))
        except Unavailable:
            self._changed.set()  # the log cannot be written now; the next save stages it again
            return
        self._saved = checkpoint
        self._writer.then(lambda: None, self._not_saved)

    def _not_saved(self) -> None:
        self._saved = -1
        self._changed.set()
