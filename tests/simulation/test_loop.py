"""The simulated loop: one seed gives one run, the clock is virtual, and a killed node runs no more code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker.seams import Clock, Entropy
from tests.simulation.loop import Deadlock, Livelock, Node, SimClock, SimEntropy, SimLoop, current_node, run

ROOT = Path(__file__).parents[2]


async def busy_world(loop: SimLoop) -> tuple[int, list[str]]:
    """Uses everything of asyncio that the broker uses, while nodes are killed."""
    seen: list[str] = []
    queue: asyncio.Queue[str] = asyncio.Queue(3)
    opened = asyncio.Event()
    entropy = SimEntropy(loop, "world")

    async def producer(name: str) -> None:
        await opened.wait()
        for number in range(5):
            async with asyncio.timeout(entropy.uniform(0.1, 3)):
                await asyncio.sleep(entropy.uniform(0, 2))
                await queue.put(f"{name}{number}")

    async def consumer() -> None:
        while True:
            seen.append(await queue.get())

    nodes = [Node(name) for name in ("a", "b", "c")]
    reader = loop.spawn(nodes[0], consumer())
    tasks = [loop.spawn(node, producer(node.name)) for node in nodes]
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(opened.set))
    await fall_apart(seen)
    await asyncio.sleep(3)
    loop.kill(nodes[1])
    await asyncio.sleep(20)
    reader.cancel()
    await asyncio.gather(reader, tasks[0], tasks[2], return_exceptions=True)
    return loop.trace, seen


async def fall_apart(seen: list[str]) -> None:
    """A TaskGroup cancels its tasks in the order of a set, which must not depend on memory addresses."""

    async def child(name: str) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            seen.append(name)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1), asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(child(f"child{number}"))


def fingerprint(seed: int) -> str:
    trace, seen = run(busy_world, seed)
    return f"{trace:08x} {' '.join(seen)}"


def printed_elsewhere(module: str, name: str, seeds: int) -> list[str]:
    """The output of these runs in other processes, each with its own hash seed."""
    script = f"from {module} import {name}\nfor seed in range({seeds}): print({name}(seed))"
    return [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "4711")
    ]


def test_one_seed_gives_one_run_in_every_process_whatever_the_hash_seed() -> None:
    here = "".join(fingerprint(seed) + "\n" for seed in range(12))

    assert printed_elsewhere("tests.simulation.test_loop", "fingerprint", 12) == [here, here]
    assert len(set(here.splitlines())) == 12


def test_an_hour_of_sleep_takes_no_time_and_the_clock_shows_it() -> None:
    async def main(loop: SimLoop) -> tuple[float, int, int]:
        clock: Clock = SimClock(loop, epoch_ms=1_000_000)
        await asyncio.sleep(3600.001)
        return loop.time(), clock.monotonic_ms(), clock.wall_ms()

    assert run(main) == (3600.001, 3_600_001, 4_600_001)


def test_a_clock_step_changes_only_the_wall_time() -> None:
    async def main(loop: SimLoop) -> tuple[int, int, int]:
        clock = SimClock(loop, epoch_ms=0)
        clock.step(-86_400_000)
        await asyncio.sleep(1)
        return clock.wall_ms(), clock.monotonic_ms(), clock.true_ms()

    assert run(main) == (-86_399_000, 1000, 1000)


def test_entropy_of_one_name_does_not_depend_on_what_another_draws() -> None:
    async def main(loop: SimLoop) -> bytes:
        one: Entropy = SimEntropy(loop, "one")
        SimEntropy(loop, "two").token(99)
        return one.token(16)

    async def alone(loop: SimLoop) -> bytes:
        return SimEntropy(loop, "one").token(16)

    assert run(main, 7) == run(alone, 7) != run(alone, 8)


def test_the_order_of_ready_handles_is_drawn_from_the_seed() -> None:
    async def main(loop: SimLoop) -> tuple[int, ...]:
        seen: list[int] = []
        for number in range(5):
            loop.call_soon(seen.append, number)
        await asyncio.sleep(1)
        return tuple(seen)

    orders = {run(main, seed) for seed in range(50)}

    assert (0, 1, 2, 3, 4) in orders
    assert len(orders) > 10


def test_a_killed_node_runs_no_handle_and_no_finally() -> None:
    ran: list[str] = []

    async def main(loop: SimLoop) -> None:
        node, other = Node("victim"), Node("other")
        shared: asyncio.Future[None] = loop.create_future()
        beaten: asyncio.Queue[str] = asyncio.Queue()

        async def stream() -> None:
            try:
                await asyncio.sleep(3)
            finally:
                ran.append("inner finally")

        async def victim() -> None:
            assert current_node() is node
            loop.call_later(2, ran.append, "timer")
            shared.add_done_callback(lambda _: ran.append("callback of a future of another node"))
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(stream())
                    group.create_task(heart())
            finally:
                ran.append("finally")
                await asyncio.sleep(1)
                ran.append("after an await in finally")

        async def heart() -> None:
            while True:
                beaten.put_nowait("beat")
                await asyncio.sleep(0.5)

        async def waiter() -> None:
            await shared
            ran.append("other")

        loop.spawn(node, victim())
        waiting = loop.spawn(other, waiter())
        await asyncio.sleep(1.2)
        never_started = loop.spawn(node, stream())
        loop.kill(node)
        shared.set_result(None)
        await asyncio.sleep(10)
        await waiting
        gc.collect()
        assert beaten.qsize() == 3
        assert not never_started.done()
        assert ran == ["other"]

    run(main)
    gc.collect()  # no "never awaited" and no "destroyed but pending": warnings are errors here


def test_on_kill_callbacks_run_once() -> None:
    async def main(loop: SimLoop) -> list[str]:
        told: list[str] = []
        node = Node("victim")
        node.on_kill.append(lambda: told.append(node.name))
        loop.kill(node)
        loop.kill(node)
        return told

    assert run(main) == ["victim"]


def test_a_node_cannot_kill_itself() -> None:
    async def main(loop: SimLoop) -> None:
        node = Node("suicidal")

        async def suicide() -> None:
            loop.kill(node)

        with pytest.raises(RuntimeError, match="cannot kill itself"):
            await loop.spawn(node, suicide())

    run(main)


def test_waiting_without_any_timer_is_a_deadlock() -> None:
    async def main(_loop: SimLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="nothing is ready and no timer is set"):
        run(main)


def test_steps_without_progress_of_the_clock_are_a_livelock() -> None:
    async def main(_loop: SimLoop) -> None:
        while True:  # noqa: ASYNC110 - the mistake itself
            await asyncio.sleep(0)

    with pytest.raises(Livelock, match="steps without progress of the clock"):
        run(main, max_idle_steps=5000)


def test_the_step_and_time_budgets_end_a_run() -> None:
    async def main(_loop: SimLoop) -> None:
        for _ in range(10_000):
            await asyncio.sleep(1)

    with pytest.raises(Livelock, match="5000 steps were used"):
        run(main, max_steps=5000)
    with pytest.raises(Deadlock, match="60 s of virtual time"):
        run(main, max_time=60)


def test_an_unhandled_exception_fails_the_run() -> None:
    async def main(loop: SimLoop) -> None:
        loop.call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="unhandled in the simulation") as caught:
        run(main)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failed_task_whose_exception_is_not_read_fails_the_run() -> None:
    async def main(loop: SimLoop) -> None:
        async def fail() -> None:
            raise ValueError("lost")

        loop.spawn(Node("a"), fail())
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="never retrieved"):
        run(main)


def test_a_call_from_another_thread_is_refused() -> None:
    async def main(loop: SimLoop) -> list[str]:
        said: list[str] = []

        def intrude() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except RuntimeError as error:
                said.append(str(error))

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return said

    assert run(main) == ["a thread reached into the simulation"]


def test_cancelled_timers_do_not_pile_up() -> None:
    async def main(loop: SimLoop) -> int:
        for _ in range(5000):
            async with asyncio.timeout(3600):
                await asyncio.sleep(0.01)
        return len(loop._scheduled)

    assert run(main) < 500
