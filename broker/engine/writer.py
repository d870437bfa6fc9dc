"""The one writer: group commit, the commit barrier, and the broker's clock.

Requests decide in memory and stage their events here; one task commits everything staged in one
transaction and only then lets anything follow from it. A failed commit discards all that was
staged, because every later decision stood on it; the state is then read anew from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from broker.domain.errors import Unavailable
from broker.domain.events import Event, Recorded
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.log import sqlite as log
from broker.log.sqlite import Head
from broker.seams import Broken, Clock, Conflict, Entropy, Full, Sql, Storage
from projections import follower
from projections.follower import Touched

logger = structlog.get_logger()

BATCH_EVENTS = 1_000
RETRY_SEC = 1.0
CLOCK_STEP_MS = 5_000


class _Batch:
    """What will be committed together, and what may follow once it is."""

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
    """Owns the end of the log.

    `reload` is called after a failed commit, before anything is staged again, and `resumed` whenever
    staging is possible again.
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
        self._head = Head()  # of what is committed
        self._durable = 0  # after a failed commit behind it: what was read anew may not be synced
        self._position = 0  # of what is staged
        self._recorded_at = 0
        self._anchor_wall = clock.wall_ms()
        self._anchor_monotonic = clock.monotonic_ms()

    @property
    def durable(self) -> int:
        """The last position that is durable."""
        return self._durable

    # --- the clock ---

    def now(self) -> int:
        """Broker time, ms: never falls, and a step of the wall clock does not move it."""
        running = self._anchor_wall + self.clock.monotonic_ms() - self._anchor_monotonic
        return max(self._recorded_at, running)

    def wall_step_ms(self) -> int:
        """How far the wall clock is from the broker's, ms; beyond 5 s something stepped it."""
        running = self._anchor_wall + self.clock.monotonic_ms() - self._anchor_monotonic
        return self.clock.wall_ms() - running

    def behind_log_ms(self) -> int:
        """How far the clock, as it was at the start, lies before the last recorded event, ms."""
        running = self._anchor_wall + self.clock.monotonic_ms() - self._anchor_monotonic
        return self._recorded_at - running

    def tick(self) -> None:
        """What is staged from here on is later, by a millisecond at least, than all that came before."""
        self._recorded_at += 1

    def reanchor(self) -> bool:
        """After a start before the last event: takes the wall clock as it is now, if it has been mended."""
        if self.clock.wall_ms() < self._recorded_at - CLOCK_STEP_MS:
            return False
        self._anchor_wall, self._anchor_monotonic = self.clock.wall_ms(), self.clock.monotonic_ms()
        return True

    # --- staging ---

    def stage(
        self, stream: str, version: int, event: Event, *, project: str, device_id: str | None, actor: str
    ) -> Recorded:
        """Queues one event for the next commit and gives it its place and time.

        Raises:
            Unavailable: the log cannot be written now.
        """
        if not self.open:
            raise Unavailable("the log cannot be written now")
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

    def touch_command(self, state: CommandState) -> None:
        self._batch.touched.put(state)

    def touch_device(self, state: DeviceState, names: tuple[str, ...] = ()) -> None:
        self._batch.touched.devices[state.id] = state
        for name in names:
            self._batch.touched.names[name] = state.id

    def touch_definition(self, digest: str, body: dict[str, object]) -> None:
        self._batch.touched.definitions[digest] = body

    def also(self, work: Callable[[Sql], object]) -> None:
        """Queues rows outside the log (idempotency keys, unmatched answers) for the same transaction."""
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
        """Calls `done` once everything staged so far is durable, or `failed` if it could not be made so."""
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
        """Waits while the log cannot be written."""
        await self._opened.wait()

    async def space(self) -> None:
        """Waits while a full batch is waiting."""
        await self._room.wait()

    async def room(self) -> None:
        """Waits while a full batch is waiting: the bound of the queue.

        Raises:
            Unavailable: the log cannot be written now.
        """
        await self.space()
        if not self.open:
            raise Unavailable("the log cannot be written now")

    async def barrier(self) -> None:
        """Waits until everything staged so far is durable. No answer leaves us before that.

        Raises:
            Unavailable: it could not be made durable; whether it was is unknown.
        """
        if (batch := self._last()) is None:
            return
        await batch.settled.wait()
        if not batch.ok:
            raise Unavailable("the log could not be written")

    # --- committing ---

    async def start(self) -> None:
        """Reads where the log ends and opens for staging."""
        await self._reread()
        self._open()

    async def _reread(self) -> None:
        self._head = await self.storage.read(log.head)
        self._position, self._recorded_at = self._head.position, self._head.recorded_at
        if self.reload is not None:
            await self.reload()

    def _open(self) -> None:
        self.open = True
        self._durable = self._head.position
        self._opened.set()
        self.resumed()

    async def run(self) -> None:
        """Commits what is staged, for ever. Ends by raising `Broken` when the storage has failed."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not self._batch.empty:
                batch, self._batch = self._batch, _Batch()
                self._in_flight = batch
                self._room.set()
                await self._commit(batch)

    async def drain(self) -> None:
        """Waits until nothing is staged any more; for a clean end."""
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
        """Discards everything speculative, waits until the log can be written, and reads it anew."""
        self.open = False
        self._opened.clear()
        discarded, self._batch = self._batch, _Batch()
        self._in_flight = None
        self._wake.clear()
        self._room.set()
        if isinstance(error, Broken):
            self.fatal = error
        # The newest first: each puts what it takes back in front of what is there already.
        for lost in (discarded, batch):
            lost.settled.set()
            for failed in reversed(lost.failed):
                failed()
        if self.fatal is not None:
            raise self.fatal
        if isinstance(error, log.UNWRITABLE):
            await asyncio.sleep(RETRY_SEC)  # a value that can never be written must not keep the loop busy
        await self._reread()  # at once: what was discarded must not be shown as fact
        while True:
            try:
                await self.storage.write(_probe)
                break
            except Full:
                await asyncio.sleep(RETRY_SEC)
        self._open()
        logger.info("log.writable_again", position=self._head.position)


def _probe(sql: Sql) -> None:
    """Needs as much new space as a small batch, so that success means something."""
    sql.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", ("x" * 65_536,))
    sql.execute("DELETE FROM meta WHERE key = 'probe'")
