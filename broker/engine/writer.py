"""The single writer of the log: group commit, the commit barrier, and the broker's clock.

Requests decide in memory and stage their events here. One task commits all staged events in one
transaction; their effects (answers, messages) follow only after the commit. A failed commit discards
everything that is staged, because later decisions depend on the lost events. The state is then read
from the log again.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from broker.domain.errors import Unavailable
from broker.domain.events import AUDIT, Caused, Event, Operated, Recorded, Via
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.log import sqlite as log
from broker.log.sqlite import Head
from broker.seams import Broken, Clock, Conflict, Entropy, Full, Sql, Storage
from projections import follower
from projections.follower import Touched

logger = structlog.get_logger()

# The HTTP request that is being served; None outside of one.
via: contextvars.ContextVar[Via | None] = contextvars.ContextVar("via", default=None)

BATCH_EVENTS = 1_000
RETRY_SEC = 1.0
CLOCK_STEP_MS = 5_000


class _Batch:
    """Events and rows of one commit, and the callbacks that run after it."""

    def __init__(self) -> None:
        self.events: list[Recorded] = []
        self.touched = Touched()
        self.rows: list[Callable[[Sql], object]] = []
        self.notes: list[Callable[[Sql], object]] = []
        self.done: list[Callable[[], None]] = []
        self.failed: list[Callable[[], None]] = []
        self.settled = asyncio.Event()
        self.ok = False

    @property
    def empty(self) -> bool:
        return not (self.events or self.rows or self.notes)


class Writer:
    """The only object that appends to the log.

    `reload` is called at the start and after a failed commit, before anything can be staged. `resumed`
    is called each time staging becomes possible.
    """

    def __init__(self, storage: Storage, clock: Clock, entropy: Entropy) -> None:
        self.storage = storage
        self.clock = clock
        self.entropy = entropy
        self.reload: Callable[[], Awaitable[None]] | None = None
        self.resumed: Callable[[], None] = lambda: None
        self.listeners: list[Callable[[list[Recorded]], None]] = []
        self.on_refused_note: Callable[[], None] = lambda: None
        self.fatal: BaseException | None = None
        self.open = False
        self._batch = _Batch()
        self._in_flight: _Batch | None = None
        self._wake = asyncio.Event()
        self._opened = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._head = Head()  # end of the committed log
        # The last durable position. Less than `_head` after a failed commit: rows read again from the
        # file may not be synced yet.
        self._durable = 0
        self._position = 0  # position of the last staged event
        self._operated = 0  # version of the last staged event of the stream audit
        self._recorded_at = 0
        self._anchor_wall = clock.wall_ms()
        self._anchor_monotonic = clock.monotonic_ms()

    @property
    def durable(self) -> int:
        """The last position that is durable."""
        return self._durable

    # --- the clock ---

    def now(self) -> int:
        """Broker time, Unix ms. It never goes back, and a step of the wall clock does not change it."""
        running = self._anchor_wall + self.clock.monotonic_ms() - self._anchor_monotonic
        return max(self._recorded_at, running)

    def wall_step_ms(self) -> int:
        """Wall clock minus broker clock, ms. More than 5 s means that the wall clock was stepped."""
        running = self._anchor_wall + self.clock.monotonic_ms() - self._anchor_monotonic
        return self.clock.wall_ms() - running

    def behind_log_ms(self) -> int:
        """How many ms the clock, counted on from the process start, is before the last recorded event."""
        running = self._anchor_wall + self.clock.monotonic_ms() - self._anchor_monotonic
        return self._recorded_at - running

    def tick(self) -> None:
        """Events staged after this call get a `recorded_at` at least 1 ms later than all earlier ones."""
        self._recorded_at += 1

    def reanchor(self) -> bool:
        """Reads the wall clock again, if the process started with a clock before the last event.

        Returns False, and changes nothing, if the wall clock is still more than 5 s before that event.
        """
        if self.clock.wall_ms() < self._recorded_at - CLOCK_STEP_MS:
            return False
        self._anchor_wall, self._anchor_monotonic = self.clock.wall_ms(), self.clock.monotonic_ms()
        return True

    # --- staging ---

    def stage(
        self, stream: str, version: int, event: Event, *, project: str, device_id: str | None, actor: str
    ) -> Recorded:
        """Queues one event for the next commit and gives it its position and `recorded_at`.

        An event of an actor that a request caused also says which request that was.

        Raises:
            Unavailable: the log cannot be written now.
        """
        if not self.open:
            raise Unavailable("the log cannot be written now")
        request = via.get()
        if request is not None and actor != "broker" and isinstance(event, Caused):
            event = msgspec.structs.replace(event, via=request)
        self._position += 1
        self._recorded_at = self.now()
        recorded = Recorded(
            position=self._position,
            stream=stream,
            version=version,
            recorded_at=self._recorded_at,
            project=project,
            device_id=device_id,
            actor=actor,
            event=event,
        )
        self._batch.events.append(recorded)
        self._rouse()
        return recorded

    def operated(self, actor: str, action: str, subject: str, project: str = "", **details: object) -> None:
        """Queues an event about a change of what lies beside the log; it must be queued with that change.

        Raises:
            Unavailable: the log cannot be written now.
        """
        event = Operated(action=action, subject=subject, details=details)
        version = self._operated + 1
        self.stage(AUDIT, version, event, project=project, device_id=None, actor=actor)
        self._operated = version

    def touch_command(self, state: CommandState) -> None:
        self._batch.touched.put(state)

    def touch_device(self, state: DeviceState, names: tuple[str, ...] = ()) -> None:
        self._batch.touched.devices[state.id] = state
        for name in names:
            self._batch.touched.names[name] = state.id

    def touch_definition(self, digest: str, body: dict[str, object]) -> None:
        self._batch.touched.definitions[digest] = body

    def also(self, work: Callable[[Sql], object]) -> None:
        """Queues other rows (such as idempotency keys) for the next commit's transaction.

        Raises:
            Unavailable: the log cannot be written now.
        """
        if not self.open:
            raise Unavailable("the log cannot be written now")
        self._batch.rows.append(work)
        self._rouse()

    def note(self, work: Callable[[Sql], object]) -> None:
        """Queues rows that nothing depends on (unmatched answers) for the same transaction.

        If their values cannot be written, they are left out, counted and logged; the batch is committed
        without them. A full or failing disk still fails the whole batch.

        Raises:
            Unavailable: the log cannot be written now.
        """
        if not self.open:
            raise Unavailable("the log cannot be written now")
        self._batch.notes.append(work)
        self._rouse()

    def then(self, done: Callable[[], None], failed: Callable[[], None] | None = None) -> None:
        """Calls `done` when everything staged so far is durable, or `failed` if that commit fails."""
        target = self._last()
        if target is None:
            done()
            return
        target.done.append(done)
        if failed is not None:
            target.failed.append(failed)

    def _last(self) -> _Batch | None:
        return self._in_flight if self._batch.empty else self._batch

    def _rouse(self) -> None:
        self._wake.set()
        if len(self._batch.events) >= BATCH_EVENTS:
            self._room.clear()

    async def opened(self) -> None:
        """Waits until the log can be written."""
        await self._opened.wait()

    async def space(self) -> None:
        """Waits while a full batch (`BATCH_EVENTS` events) is waiting for its commit."""
        await self._room.wait()

    async def room(self) -> None:
        """Like `space`, and refuses while the log cannot be written. Bounds the queue of staged events.

        Raises:
            Unavailable: the log cannot be written now.
        """
        await self.space()
        if not self.open:
            raise Unavailable("the log cannot be written now")

    async def barrier(self) -> None:
        """Waits until everything staged so far is durable. Every answer to the outside waits here first.

        Raises:
            Unavailable: the commit failed; whether the events were written is unknown.
        """
        if (batch := self._last()) is None:
            return
        await batch.settled.wait()
        if not batch.ok:
            raise Unavailable("the log could not be written")

    # --- committing ---

    async def start(self) -> None:
        """Reads the end of the log and allows staging."""
        await self._reread()
        self._open()

    async def _reread(self) -> None:
        self._head = await self.storage.read(log.head)
        self._position, self._recorded_at = self._head.position, self._head.recorded_at
        self._operated = await self.storage.read(lambda sql: log.last_version(sql, AUDIT))
        if self.reload is not None:
            await self.reload()

    def _open(self) -> None:
        self.open = True
        self._durable = self._head.position
        self._opened.set()
        self.resumed()

    async def run(self) -> None:
        """Commits staged events, for ever.

        Raises:
            Broken: the storage failed.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not self._batch.empty:
                batch, self._batch = self._batch, _Batch()
                self._in_flight = batch
                self._room.set()
                await self._commit(batch)

    async def drain(self) -> None:
        """Waits until everything staged is committed; used at a clean shutdown."""
        while (batch := self._last()) is not None and self.open:
            await batch.settled.wait()

    async def _commit(self, batch: _Batch) -> None:
        head, salts = self._head, self.entropy.token(16 * len(batch.events))

        refused: list[Exception] = []

        def work(sql: Sql) -> Head:
            after = log.append(sql, head, batch.events, salts)
            follower.write(sql, batch.touched)
            for row in batch.rows:
                row(sql)
            for note in batch.notes:
                try:
                    note(sql)
                except log.UNWRITABLE as error:
                    refused.append(error)
            return after

        try:
            self._head = await self.storage.write(work)
            self._durable = self._head.position
        except (Full, Conflict, Broken, *log.UNWRITABLE) as error:
            logger.error("log.commit_failed", error=str(error), events=len(batch.events))
            await self._recover(batch, error)
            return
        for unwritable in refused:
            logger.error("log.note_refused", error=str(unwritable))
            self.on_refused_note()
        self._in_flight = None
        batch.ok = True
        for listener in self.listeners:
            listener(batch.events)
        for done in batch.done:
            done()
        batch.settled.set()

    async def _recover(self, batch: _Batch, error: Exception) -> None:
        """Discards the failed batch and everything staged after it, and reads the log again.

        Then waits until the log can be written.
        """
        self.open = False
        self._opened.clear()
        discarded, self._batch = self._batch, _Batch()
        self._in_flight = None
        self._wake.clear()
        self._room.set()
        if isinstance(error, Broken):
            self.fatal = error
        # Newest batch first, last callback first: each callback puts its work back at the front of a queue.
        for lost in (discarded, batch):
            lost.settled.set()
            for failed in reversed(lost.failed):
                failed()
        if self.fatal is not None:
            raise self.fatal
        if isinstance(error, log.UNWRITABLE):
            await asyncio.sleep(RETRY_SEC)  # a value that can never be written must not keep the loop busy
        await self._reread()  # before the wait for space: readers must not see discarded events
        while True:
            try:
                await self.storage.write(_probe)
                break
            except Full:
                await asyncio.sleep(RETRY_SEC)
        self._open()
        logger.info("log.writable_again", position=self._head.position)


def _probe(sql: Sql) -> None:
    """Writes as many bytes as a small batch, so that success shows that there is space again."""
    sql.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", ("x" * 65_536,))
    sql.execute("DELETE FROM meta WHERE key = 'probe'")
