"""Subscribers get every event once, in order, after its commit, from the log or live."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import pytest

from broker.domain.cloudevents import Entry, Wanted, cloud_event
from broker.domain.errors import Unavailable
from broker.engine.commands import Caller, Order
from broker.engine.registry import NewDevice
from broker.seams import Batch, Full, Placed, Sql, Sqlite, Storage
from broker.subscriptions import feed
from broker.subscriptions.feed import Subscription
from broker.world import SqliteStorage
from devices.clock import rfc3339
from tests.integration.core_support import ME, PROJECT, Bench, running, until
from tests.reading import tamper

Follow = AsyncGenerator[tuple[list[Entry], int], None]

R = TypeVar("R")


def follow(bench: Bench, wanted: Wanted, after: int) -> Follow:
    return cast(Follow, bench.core.feed.follow(wanted, after))


async def take(stream: Follow, count: int) -> list[Entry]:
    found: list[Entry] = []
    while len(found) < count:
        entries, _ = await anext(stream)
        found += entries
    return found


async def test_a_stream_continues_from_history_into_live_events_without_gap_or_duplicate(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        first = await bench.order()
        async with aclosing(follow(bench, Wanted(project=PROJECT), 0)) as stream:
            history = await take(stream, 4)
            second = await bench.order()
            live = await take(stream, 1)
        assert [entry.type for entry in history] == ["registered", "online", "created", "published"]
        assert [entry.stream for entry in history[2:]] == [first.id] * 2
        assert (live[0].stream, live[0].type, live[0].command) == (second.id, "created", "open")


async def test_a_subscriber_that_fell_behind_continues_from_the_log(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        start = bench.core.feed.head
        async with aclosing(follow(bench, Wanted(event="created"), start)) as stream:
            made = [(await bench.order()).id]
            got = await take(stream, 1)
            made += [(await bench.order()).id for _ in range(20)]
            got += await take(stream, 20)
        assert [entry.stream for entry in got] == made


async def test_filters_select_by_project_device_command_name_and_event(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        lamp = await bench.device()
        other = Caller(actor="key:key_2", project="other")
        await bench.core.registry.register(
            other, NewDevice(hardware_id="door-1", type="generic", project="other")
        )
        command = await bench.order()
        await bench.core.commands.create(other, Order(device="door-1", type="open"))
        feed = bench.core.feed
        for wanted, types in (
            (Wanted(project="other"), ["registered", "created"]),
            (Wanted(device=lamp.id, event="created"), ["created"]),
            (Wanted(command_id=command.id), ["created", "published"]),
            (Wanted(command="open", project=PROJECT), ["created", "published"]),
            (Wanted(command="shut"), []),
        ):
            entries, reached = await feed.page(wanted, 0, 100)
            assert [entry.type for entry in entries] == types
            assert reached == feed.head
        entries, reached = await feed.page(Wanted(), 0, 2)
        assert reached == entries[-1].position < feed.head


async def test_a_cloud_event_names_its_command_and_never_shows_a_digest(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        device = await bench.device()
        command = await bench.order(params={"a": 1})
        entries, _ = await bench.core.feed.page(Wanted(), 0, 100)
        shown = [msgspec.json.decode(msgspec.json.encode(cloud_event("log_1", entry))) for entry in entries]
        assert "token_digest" not in shown[0]["data"]
        created = next(event for event in shown if event["type"] == "ordain.command.created.v1")
        assert created["source"] == "/ordain/log_1"
        assert created["subject"] == command.id
        assert created["time"] == rfc3339(command.created_at)
        assert created["data"]["device_id"] == device.id
        assert created["data"]["type"] == "open"
        assert created["data"]["params"] == {"a": 1}


class Doubtful:
    """A storage whose next write succeeds but reports a failure; later writes wait for `gate`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.term = storage.term
        self.doubt = False
        self.gate = asyncio.Event()
        self.gate.set()

    def number(self) -> int:
        return self.storage.number()

    async def append(self, batch: Batch) -> Placed:
        await self.gate.wait()
        found = await self.storage.append(batch)
        if self.doubt:
            self.doubt = False
            self.gate.clear()
            raise Full("no space left")
        return found

    async def landed(self, number: int) -> Placed | None:
        return await self.storage.landed(number)

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        await self.storage.prepare(log_id, cursor_key)

    async def write(self, work: Callable[[Sqlite], R]) -> R:
        return await tamper(self.storage, work)

    async def rebuild(self) -> None:
        await self.storage.rebuild()

    async def read(self, work: Callable[[Sql], Awaitable[R]]) -> R:
        return await self.storage.read(work)

    async def close(self) -> None:
        await self.storage.close()

    async def forget_old_pages(self) -> bool:
        return await self.storage.forget_old_pages()


async def test_events_of_a_commit_with_unknown_outcome_are_shown_after_the_next_commit(
    tmp_path: Path,
) -> None:
    storage = Doubtful(await SqliteStorage.open(tmp_path))
    async with running(storage) as bench:
        await bench.device(online=False)
        head = bench.core.feed.head
        async with aclosing(follow(bench, Wanted(), head)) as stream:
            coming = asyncio.ensure_future(anext(stream))
            storage.doubt = True
            with pytest.raises(Unavailable):
                await bench.order()
            await until(lambda: bench.live.epoch == 2)
            shown = bench.core.feed.head, coming.done()
            storage.gate.set()  # set before any assertion: otherwise the broker could not end after a failure
            entries, _ = await coming
            assert shown == (head, False)
            assert [entry.type for entry in entries] == ["created"]
    await storage.close()


async def test_events_queued_for_a_slow_reader_lose_their_data_when_erased(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device(online=False)
        start = bench.core.feed.head
        with bench.core.feed.subscribed(Wanted(), start) as subscription:
            command = await bench.order(params={"pin": "1234"})
            await bench.core.erasures.delete(ME, command.id)
            entries = await subscription.next() or []
            assert [entry.type for entry in entries] == ["created", "cancelled"]
            assert [entry.event for entry in entries] == [None, None]


async def test_of_many_subscribers_only_some_are_woken_in_one_turn_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as bench, AsyncExitStack() as opened:
        await bench.device()
        loop, turn, woken = asyncio.get_running_loop(), 0, Counter[int]()

        def next_turn() -> None:
            nonlocal turn
            turn += 1
            if len(reading) != sum(task.done() for task in reading) or not reading:
                loop.call_soon(next_turn)

        def wake(self: Subscription) -> None:
            woken[turn] += 1
            self._wake.set()

        monkeypatch.setattr(Subscription, "wake", wake)
        reading = list[asyncio.Task[list[str]]]()
        loop.call_soon(next_turn)
        after = bench.core.feed.head
        subscribers = [
            opened.enter_context(bench.core.feed.subscribed(Wanted(event="created"), after))
            for _ in range(50)
        ]

        async def types(subscriber: Subscription) -> list[str]:
            found = list[str]()
            while len(found) < 2:
                found += [entry.type for entry in await subscriber.next() or []]
            return found

        reading += [asyncio.create_task(types(subscriber)) for subscriber in subscribers]
        await bench.order()
        await bench.order()
        assert [await each for each in reading] == [["created", "created"]] * 50

    assert max(woken.values()) <= feed.WOKEN_AT_ONCE


async def test_many_subscribers_of_many_events_get_all_in_order_before_they_leave_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "QUEUED", 50)
    monkeypatch.setattr(feed, "LATE", 10)
    monkeypatch.setattr(feed, "WOKEN_AT_ONCE", 0)  # only those that are late
    async with running(tmp_path) as bench, AsyncExitStack() as opened:
        await bench.device(online=False)
        known, start = bench.core.feed, bench.core.feed.head
        read = known.read
        from_log = list[int]()

        async def counted(wanted: Wanted, after: int, until: int, limit: int) -> tuple[list[Entry], int]:
            from_log.append(after)
            return await read(wanted, after, until, limit)

        monkeypatch.setattr(known, "read", counted)

        async def streams(subscriber: Subscription) -> list[str]:
            found = list[str]()
            while len(found) < 100:
                found += [entry.stream for entry in await subscriber.next() or []]
            return found

        wanted = [Wanted(project=PROJECT), Wanted(event="created"), Wanted()]
        subscribers = [
            opened.enter_context(known.subscribed(wanted[number % 3], start)) for number in range(300)
        ]
        reading = [asyncio.create_task(streams(subscriber)) for subscriber in subscribers]
        made = list[str]()
        for _ in range(5):
            made += [command.id for command in await asyncio.gather(*(bench.order() for _ in range(20)))]
            assert len(known.recent) <= 50
        monkeypatch.setattr(feed, "WOKEN_AT_ONCE", 10)
        for each in reading:
            assert await each == made
        assert from_log == []


async def test_a_subscriber_that_left_more_events_unread_than_are_listed_reads_them_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "QUEUED", 10)
    async with running(tmp_path) as bench:
        await bench.device(online=False)
        start = bench.core.feed.head
        with bench.core.feed.subscribed(Wanted(), start) as subscriber:
            made = [(await bench.order()).id for _ in range(7)]
            found = await subscriber.next() or []
            made += [(await bench.order()).id for _ in range(25)]
            assert subscriber.lag == 25
            while subscriber.lag:
                found += await subscriber.next() or []
        assert [entry.stream for entry in found] == made


async def test_no_subscriber_seems_to_have_read_all_while_an_event_waits_for_it(tmp_path: Path) -> None:
    async with running(tmp_path) as bench, AsyncExitStack() as opened:
        await bench.device(online=False)
        known, lags = bench.core.feed, set[int]()
        subscribers = [
            opened.enter_context(known.subscribed(Wanted(event="created"), known.head)) for _ in range(1_100)
        ]
        bench.core.writer.listeners.append(lambda *_: lags.update(each.lag for each in subscribers))
        await bench.order()
        assert len(lags) == 1
        assert 0 not in lags
