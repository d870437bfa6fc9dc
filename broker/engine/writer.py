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
from broker.domain.events import AUDIT, Caused, Event, Operated, Pending, Via
from broker.domain.fleet import DeviceState
from broker.domain.lifecycle import CommandState
from broker.log import sqlite as log
from broker.log.rows import check
from broker.log.sqlite import Head
from broker.seams import (
    At,
    Batch,
    Broken,
    Clock,
    Conflict,
    Drop,
    Entropy,
    Fenced,
    Full,
    Newest,
    Placed,
    Put,
    SideRow,
    Storage,
    Unknown,
)

logger = structlog.get_logger()

# The HTTP request that is being served; None outside of one.
via: contextvars.ContextVar[Via | None] = contextvars.ContextVar("via", default=None)

BATCH_EVENTS = 1_000
RETRY_SEC = 1.0
CLOCK_STEP_MS = 5_000


Listener = Callable[[list[Pending], Placed], None]


class _Staged:
    """Events, states and rows of one commit, and the callbacks that run after it."""

    def __init__(self) -> None:
        self.events: list[Pending] = []
        self.states: dict[str, Newest] = {}  # by id; commands and devices have different ids
        self.rows: list[SideRow] = []
        self.done: list[Callable[[], None]] = []
        self.failed: list[Callable[[], None]] = []
        self.waiting: list[asyncio.Future[None]] = []
        self.ok = False

    @property
    def empty(self) -> bool:
        return not (self.events or self.rows)

    def settled(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Is done when the commit was made, or has failed. `asyncio.Event` would take twice as long."""
        self.waiting.append(waiter := loop.create_future())
        return waiter

    def settle(self) -> None:
        for waiter in self.waiting:
            if not waiter.done():  # else its task was cancelled
                waiter.set_result(None)


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
        self.listeners: list[Listener] = []
        self.on_refused_note: Callable[[], None] = lambda: None
        self.fatal: BaseException | None = None
        self.open = False
        self._batch = _Staged()
        self._in_flight: _Staged | None = None
        self._loop: asyncio.AbstractEventLoop
        self._wake = asyncio.Event()
        self._opened = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._head = Head()  # end of the committed log
        # The last durable position. Less than `_head` after a failed commit: rows read again from the
        # file may not be synced yet.
        self._durable = 0
        self._operated = 0  # version of the last staged event of the stream audit
        self._decided_at = 0  # of the last staged event
        self._since_ms = clock.wall_ms() - clock.monotonic_ms()  # the wall clock when the other one was 0

    @property
    def durable(self) -> int:
        """The last position that is durable."""
        return self._durable

    # --- the clock ---

    def now(self) -> int:
        """Broker time, Unix ms. It never goes back, and a step of the wall clock does not change it."""
        running = self._since_ms + self.clock.monotonic_ms()
        return running if running > self._decided_at else self._decided_at  # `max` takes longer

    def wall_step_ms(self) -> int:
        """Wall clock minus broker clock, ms. More than 5 s means that the wall clock was stepped."""
        return self.clock.wall_ms() - self._since_ms - self.clock.monotonic_ms()

    def behind_log_ms(self) -> int:
        """How many ms the clock, counted on from the process start, is before the last event."""
        return self._decided_at - self._since_ms - self.clock.monotonic_ms()

    def tick(self) -> None:
        """Events staged after this call get a time at least 1 ms later than all earlier ones."""
        self._decided_at += 1

    def reanchor(self) -> bool:
        """Reads the wall clock again, if the process started with a clock before the last event.

        Returns False, and changes nothing, if the wall clock is still more than 5 s before that event.
        """
        if self.clock.wall_ms() < self._decided_at - CLOCK_STEP_MS:
            return False
        self._since_ms = self.clock.wall_ms() - self.clock.monotonic_ms()
        return True

    # --- staging ---

    def stage(
        self, stream: str, version: int, event: Event, *, project: str, device_id: str | None, actor: str
    ) -> Pending:
        """Queues one event for the next commit and gives it its time. The log will give it its position.

        An event of an actor that a request caused also says which request that was.

        Raises:
            Unavailable: the log cannot be written now.
        """
        if not self.open:
            raise Unavailable("the log cannot be written now")
        request = via.get()
        if request is not None and actor != "broker" and isinstance(event, Caused):
            event = msgspec.structs.replace(event, via=request)
        self._decided_at = self.now()
        pending = Pending(
            stream=stream,
            version=version,
            decided_at=self._decided_at,
            project=project,
            device_id=device_id,
            actor=actor,
            event=event,
        )
        self._batch.events.append(pending)
        self._rouse()
        return pending

    @property
    def at(self) -> At:
        """The position that the last staged event will get, for a row of the same commit."""
        return At(len(self._batch.events) - 1)

    def operated(self, actor: str, action: str, subject: str, project: str = "", **details: object) -> None:
        """Queues an event about a change of keys, webhooks or other data beside the log. Queue both together.

        Raises:
            Unavailable: the log cannot be written now.
        """
        event = Operated(action=action, subject=subject, details=details)
        version = self._operated + 1
        self.stage(AUDIT, version, event, project=project, device_id=None, actor=actor)
        self._operated = version

    def touch(self, state: CommandState | DeviceState) -> None:
        """Queues the state after the last staged event."""
        batch = self._batch
        index = len(batch.events) - 1
        newest = batch.states.get(state.id)
        if newest is None:
            batch.states[state.id] = Newest(state, index, index, state.version - 1)
        else:
            newest.state, newest.last = state, index

    def also(self, *rows: SideRow) -> None:
        """Queues other rows (such as idempotency keys) for the next commit's transaction.

        Raises:
            Unavailable: the log cannot be written now.
            ValueError: no storage can store a value; nothing was queued.
        """
        if not self.open:
            raise Unavailable("the log cannot be written now")
        for row in rows:
            check(row)
        self._batch.rows.extend(rows)
        self._rouse()

    def note(self, *rows: SideRow) -> None:
        """Queues rows that nothing depends on (unmatched answers) for the same transaction.

        A row whose values cannot be stored is left out, counted and logged. A full or failing disk still
        fails the whole batch.

        Raises:
            Unavailable: the log cannot be written now.
        """
        for row in rows:
            try:
                self.also(row)
            except ValueError as error:
                logger.error("log.note_refused", error=str(error))
                self.on_refused_note()

    def then(self, done: Callable[[], None], failed: Callable[[], None] | None = None) -> None:
        """Calls `done` when everything staged so far is durable, or `failed` if that commit fails."""
        target = self._last()
        if target is None:
            done()
            return
        target.done.append(done)
        if failed is not None:
            target.failed.append(failed)

    def _last(self) -> _Staged | None:
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
        if not self._room.is_set():
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
        await batch.settled(self._loop)
        if not batch.ok:
            raise Unavailable("the log could not be written")

    # --- committing ---

    async def start(self) -> None:
        """Reads the end of the log and allows staging."""
        self._loop = asyncio.get_running_loop()
        await self._reread()
        self._open()

    async def prepare(self, *rows: SideRow) -> None:
        """Writes rows at once, before `start`."""
        await self.storage.append(self._next([], [], list(rows)))

    async def _reread(self) -> None:
        self._head = await self.storage.read(log.head)
        self._decided_at = self._head.decided_at
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
                batch, self._batch = self._batch, _Staged()
                self._in_flight = batch
                self._room.set()
                await self._commit(batch)

    async def drain(self) -> None:
        """Waits until everything staged is committed; used at a clean shutdown."""
        while (batch := self._last()) is not None and self.open:
            await batch.settled(self._loop)

    def _next(self, events: list[Pending], states: list[Newest], rows: list[SideRow]) -> Batch:
        salts = self.entropy.token(16 * len(events))
        return Batch(self.storage.number(), self.storage.term, events, salts, states, rows)

    async def _commit(self, batch: _Staged) -> None:
        recorded = self._next(batch.events, list(batch.states.values()), batch.rows)
        try:
            placed = await self.storage.append(recorded)
            self._durable = placed.last
        except (Full, Conflict, Broken, Fenced, Unknown, *log.UNWRITABLE) as error:
            logger.error("log.commit_failed", error=str(error), events=len(batch.events))
            await self._recover(batch, recorded.number, error)
            return
        self._in_flight = None
        batch.ok = True
        for listener in self.listeners:
            listener(batch.events, placed)
        for done in batch.done:
            done()
        batch.settle()

    async def _in_the_end(self, work: Callable[[], Awaitable[object]]) -> None:
        """Does something as soon as there is space, and the storage answers."""
        while True:
            try:
                await work()
                return
            except (Full, Unknown):
                await asyncio.sleep(RETRY_SEC)

    async def _recover(self, batch: _Staged, number: int, error: Exception) -> None:
        """Discards the failed batch and everything staged after it, and reads the log again.

        Then waits until the log can be written. A batch whose outcome is unknown is discarded too: if it was
        recorded after all, its events are among what is read.
        """
        self.open = False
        self._opened.clear()
        discarded, self._batch = self._batch, _Staged()
        self._in_flight = None
        self._wake.clear()
        self._room.set()
        if isinstance(error, Broken | Fenced):
            self.fatal = error
        # Newest batch first, last callback first: each callback puts its work back at the front of a queue.
        for lost in (discarded, batch):
            lost.settle()
            for failed in reversed(lost.failed):
                failed()
        if self.fatal is not None:
            raise self.fatal
        if isinstance(error, log.UNWRITABLE):
            await asyncio.sleep(RETRY_SEC)  # a value that can never be written must not keep the loop busy
        if isinstance(error, Unknown):
            await self._in_the_end(lambda: self.storage.landed(number))
        # Before the wait for space: readers must not see discarded events.
        await self._in_the_end(self._reread)
        # As many bytes as a small batch: success shows that there is space again.
        probe: list[SideRow] = [Put("meta", ("probe", "x" * 65_536)), Drop("meta", ("probe",))]
        await self._in_the_end(lambda: self.storage.append(self._next([], [], probe)))
        self._open()
        logger.info("log.writable_again", position=self._durable)
