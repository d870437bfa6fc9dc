"""An event loop on a virtual clock that takes every choice from one seed, with its clock and entropy.

It never waits, opens a socket or starts a thread. Nothing in it may depend on real time, on hash seeds or on
the time of garbage collection: one seed gives one run. Different `trace` values show that two runs
differed. It is made of the times, the steps, the choices and the noted facts, not of what ran in each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import itertools
import random
import struct
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import msgspec

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
# Collect garbage after a fixed number of steps, not by allocation count, which differs between processes.
_STEPS_PER_COLLECTION = 1 << 16
# A coroutine that awaits in `finally` ignores its first GeneratorExit; each further one passes one more
# await.
_CLOSE_TRIES = 100
_packed = struct.Struct("<dq").pack
_copied, _push = contextvars.copy_context, heapq.heappush


class Livelock(Exception):
    """The step budget is spent without progress."""


class Deadlock(Exception):
    """No handle and no timer is left, or the budget of virtual time is spent."""


class Node:
    """One process of the simulated world. A Node dies only once; a restart creates a new Node with the same
    name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.on_kill: list[Callable[[], object]] = []
        self.held: deque[Any] | None = None  # while it is stopped: its handles that are due
        self.context = contextvars.copy_context()
        self.context.run(_NODE.set, self)


def current_node() -> Node | None:
    """The node whose handle is running; None outside of every node."""
    return _NODE.get()


class _Future(asyncio.Future[T]):
    """A future that hashes by its number. TaskGroup and `asyncio.wait` iterate over sets, and the default
    hash is a memory address, which differs between runs."""

    __slots__ = ("_number",)
    _number: int

    def __hash__(self) -> int:
        # Few futures are ever hashed: numbering all of them would cost a call for each.
        try:
            return self._number
        except AttributeError:
            loop: Any = self.get_loop()
            self._number = loop.number()
            return self._number


class _Task(asyncio.Task[T]):
    """A task that hashes by its number, for the same reason as `_Future`."""

    __slots__ = ("_number",)

    def __init__(self, coro: Coroutine[Any, Any, T], *, loop: SimLoop, **options: Any) -> None:
        self._number = loop.number()
        super().__init__(coro, loop=loop, **options)

    def __hash__(self) -> int:
        return self._number


class _Handle(msgspec.Struct, eq=False):
    """A call that is due, or a timer: asyncio's handles without their debug mode, which costs more than most
    calls. A Struct is made without a call of Python."""

    _loop: SimLoop
    _when: float
    _callback: Callable[..., object]
    _args: tuple[Any, ...]
    _context: contextvars.Context
    _cancelled: bool = False

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            if self._when > self._loop.now:  # it is still among the timers, and may stay there for long
                self._callback, self._args = _nothing, ()
                self._loop.cancelled += 1

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self._when


def _nothing() -> None:
    """The callback of a cancelled handle."""


class SimLoop(asyncio.BaseEventLoop):
    """The loop. `kill` ends a process: its handles never run again, and its `finally` blocks do not run."""

    # Private attributes of BaseEventLoop; they are the same in Python 3.11 to 3.14.
    _ready: deque[_Handle]
    _scheduled: list[tuple[float, int, _Handle]]
    _closed: bool
    _stopping: bool
    _thread_id: int | None

    # asyncio asks for each future, and `bool()` returns False without running Python code.
    get_debug = bool

    def __init__(
        self,
        seed: int | str,
        *,
        max_steps: int = 1 << 40,
        max_idle_steps: int = 200_000,
        max_time: float = 1e9,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.steps = 0
        self.trace = 0
        self.unhandled: list[tuple[str, BaseException | None]] = []
        self.now = 0.0
        self.now_ms = 0
        self.cancelled = 0  # how many of the timers that are kept, about
        self._moved_at = 0
        self._max_steps = max_steps
        self._max_idle_steps = max_idle_steps
        self._max_time = max_time
        self._random = self.rng("scheduler")
        # The owner of each task. Tasks of killed nodes are kept: a collected coroutine would run its
        # `finally`.
        self._tasks: list[tuple[Node | None, asyncio.Task[Any]]] = []
        self._sweep_at = 64
        self.number = itertools.count(1).__next__
        self.create_future = partial(_Future, loop=self)  # type: ignore[method-assign]
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    # --- what the world uses ---------------------------------------------------------------------

    async def until(
        self, fact: Callable[[], bool], otherwise: str, within: float = 60, every: float = 0.1
    ) -> None:
        """Waits until the fact is true; looks each `every` seconds.

        Raises:
            AssertionError: it is not true within `within` seconds; the message is `otherwise`.
        """
        end = self.time() + within
        while not fact():
            assert self.time() < end, otherwise
            await asyncio.sleep(every)

    def rng(self, name: str) -> random.Random:
        """A separate random stream for each part, so that one more draw in one part changes nothing in the
        others."""
        return rng(self.seed, name)

    def spawn(self, node: Node, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self.create_task(coro, context=node.context.copy())

    def kill(self, node: Node) -> None:
        """Kill -9. Must be called from outside the node, because a running frame cannot be removed."""
        if _NODE.get() is node:
            raise RuntimeError(f"{node.name} cannot kill itself: call_soon it from outside")
        if not node.alive:
            return
        node.alive = False
        self.note(f"kill {node.name}")
        self._ready = deque(handle for handle in self._ready if handle._context.get(_NODE) is not node)
        self._keep_timers(lambda timer: timer._context.get(_NODE) is not node)
        for owner, task in self._tasks:
            if owner is node and task.done():
                task._log_traceback = False  # the code that would read its exception was killed too
        for tell in node.on_kill:
            tell()

    def hold(self, node: Node) -> None:
        """SIGSTOP: the node's handles wait until `go_on`; its timers run on."""
        if node.alive and node.held is None:
            node.held = deque()
            self.note(f"hold {node.name}")

    def go_on(self, node: Node) -> None:
        """SIGCONT: everything that came meanwhile is due now, in its order."""
        held, node.held = node.held, None
        if held is not None and node.alive:
            self.note(f"go on {node.name}")
            self._ready.extend(held)

    def note(self, what: str) -> None:
        """Mixes a fact into the trace."""
        self.trace = zlib.crc32(what.encode(), self.trace)

    # --- what asyncio uses -----------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def run_forever(self) -> None:
        with no_search():
            super().run_forever()

    def _run_once(self) -> None:
        choose = self._random.random
        while True:
            ready = self._ready  # a local name, because `kill` replaces the attribute
            if not ready:
                self._advance()
                ready = self._ready
            if len(ready) > 1 and choose() < 0.25:
                index = self._random.randrange(len(ready))
                handle = ready[index]
                del ready[index]
                self.trace ^= index
            else:
                handle = ready.popleft()
            if handle._cancelled:
                continue
            context = handle._context
            node = context.get(_NODE)
            if node is not None:
                if not node.alive:
                    continue
                if node.held is not None:
                    node.held.append(handle)
                    continue
            self.steps = steps = self.steps + 1
            try:
                context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": "a callback failed", "exception": error})
            if self._stopping:
                return
            if not steps % 1024:
                self._check_budget()

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = _Handle(self, self.now, callback, args, _copied() if context is None else context)
        self._ready.append(handle)
        return handle  # type: ignore[return-value]

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        # Most timers are set here: one call less than by `call_at`.
        when = self.now + delay
        timer = _Handle(self, when, callback, args, _copied() if context is None else context)
        _push(self._scheduled, (when, self.number(), timer))
        return timer  # type: ignore[return-value]

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Keeps timers as tuples: comparing two TimerHandles is slow Python code."""
        timer = _Handle(self, when, callback, args, _copied() if context is None else context)
        _push(self._scheduled, (when, self.number(), timer))
        return timer  # type: ignore[return-value]

    def _advance(self) -> None:
        """Nothing is ready: moves the clock to the next timer and makes all due timers ready."""
        timers, pop, ready = self._scheduled, heapq.heappop, self._ready
        if self.cancelled > 100 and self.cancelled * 2 > len(timers):
            self._keep_timers(lambda timer: not timer._cancelled)
            timers = self._scheduled
        while timers and timers[0][2]._cancelled:
            pop(timers)
            self.cancelled -= 1
        if not timers:
            raise Deadlock(f"at {self.now:.3f} s nothing is ready and no timer is set")
        self.now = now = timers[0][0] if timers[0][0] > self.now else self.now
        # A timer for 1.001 s must not be read as 1000 ms because of binary fractions.
        self.now_ms = int(now * 1000 + 1e-3)
        self._moved_at = self.steps
        if now > self._max_time:
            raise Deadlock(f"{self._max_time:.0f} s of virtual time are spent")
        self.trace = zlib.crc32(_packed(now, self.steps), self.trace)
        while timers and timers[0][0] <= now:
            ready.append(pop(timers)[2])

    def _keep_timers(self, keep: Callable[[Any], bool]) -> None:
        kept = [each for each in self._scheduled if not each[2]._cancelled and keep(each[2])]
        heapq.heapify(kept)
        self._scheduled = kept
        self.cancelled = 0

    def _check_budget(self) -> None:
        if self.steps > self._max_steps:
            raise Livelock(f"{self._max_steps} steps were used by {self.now:.3f} s")
        if self.steps - self._moved_at > self._max_idle_steps:
            raise Livelock(f"{self._max_idle_steps} steps without progress of the clock at {self.now:.3f} s")
        if not self.steps % _STEPS_PER_COLLECTION:
            gc.collect(1)

    def _make_task(
        self, _loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], **options: Any
    ) -> asyncio.Task[T]:
        """Creates a task and keeps it. asyncio holds tasks weakly, and the time of collection does not come
        from the seed."""
        task = _Task(coro, loop=self, **options)
        context = options.get("context")
        self._tasks.append((_NODE.get() if context is None else context.get(_NODE), task))
        if len(self._tasks) >= self._sweep_at:
            self.forget_done_tasks()
        return task

    def forget_done_tasks(self) -> None:
        self._tasks = [kept for kept in self._tasks if not kept[1].done()]
        self._sweep_at = 64 + 2 * len(self._tasks)

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Runs `func` at once in the loop's thread: the seed cannot control a second thread."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        if self._thread_id not in (None, threading.get_ident()):
            raise RuntimeError("a thread reached into the simulation")
        return self.call_soon(callback, *args, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.is_closed():
            self.unhandled.append((context["message"], context.get("exception")))

    def close(self) -> None:
        """Closes all pending coroutines, now that their `finally` blocks can affect nothing."""
        left, self._tasks = self._tasks, []
        super().close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _owner, task in left:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coro: Any = task.get_coro()
                for _ in range(_CLOSE_TRIES):
                    with contextlib.suppress(BaseException):
                        coro.close()
                        break


def rng(seed: int | str, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")


def run(main: Callable[[SimLoop], Awaitable[T]], seed: int | str = 0, **budgets: Any) -> T:
    """Runs a whole world from one seed. Raises RuntimeError for an exception that no code handled."""
    _set_aside()
    loop = SimLoop(seed, **budgets)
    try:
        result = loop.run_until_complete(main(loop))
        loop.forget_done_tasks()
        # A failed task whose exception was not read reports it when it is collected. The world of the run
        # before goes too.
        gc.collect()
        if loop.unhandled:
            message, error = loop.unhandled[0]
            raise RuntimeError(f"unhandled in the simulation: {message}") from error
        return result
    finally:
        loop.close()


@contextlib.contextmanager
def no_search() -> Iterator[None]:
    """Garbage is not searched for meanwhile, except where the code asks for it."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def _set_aside() -> None:
    """Only worlds are searched for garbage, not what modules and other tests left: that would take 0.4 s for
    each world. A world has about 20,000 objects."""
    if len(gc.get_objects(generation=2)) > 15_000:
        gc.collect()
        gc.freeze()


# The epoch is 5 minutes before midnight UTC, because purges count whole days. All clocks share it, so that a
# grant is valid for brokers and devices alike.
EPOCH_MS = 20_834 * 86_400_000 - 300_000


class SimClock:
    """A node's clock: `step` changes the wall time; the monotonic time never steps."""

    def __init__(self, loop: SimLoop, epoch_ms: int = EPOCH_MS) -> None:
        self._loop = loop
        self._epoch_ms = epoch_ms
        self.offset_ms = 0

    def true_ms(self) -> int:
        """The wall time without steps, in ms. Histories use this time."""
        return self._epoch_ms + self._loop.now_ms

    def wall_ms(self) -> int:
        return self._epoch_ms + self._loop.now_ms + self.offset_ms

    def monotonic_ms(self) -> int:
        return self._loop.now_ms

    def step(self, by_ms: int) -> None:
        self.offset_ms += by_ms


class SimEntropy:
    """Randomness for one part of the world, selected by its name."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self._random = loop.rng(f"entropy/{name}")

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)
