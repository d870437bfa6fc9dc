"""What every log promises, on SQLite and on PostgreSQL; and the same histories give both the same bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from broker.domain.events import (
    Acknowledged,
    Cancelled,
    Event,
    Executed,
    Offline,
    Online,
    Progressed,
    Published,
    TimedOut,
)
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.postgresql.log import PostgresLog
from broker.log_url import address
from broker.seams import (
    Batch,
    Change,
    Conflict,
    Drop,
    Erase,
    Fenced,
    New,
    Purge,
    Put,
    Sql,
    Storage,
    Unmatched,
)
from broker.world import SqliteStorage
from projections import devices as devices_view
from projections import follower
from projections import lanes as lanes_view
from tests.integration.core_support import DEVICE, PROJECT, T
from tests.integration.log.author import Author

ONE, TWO = "cmd_00000000000000000000000001", "cmd_00000000000000000000000002"
SIDE = ("idempotency", "key_terms", "purges", "names", "definitions")
CLOCK = """CREATE TABLE IF NOT EXISTS public.clock (now bigint);
    DELETE FROM public.clock; INSERT INTO public.clock VALUES ({});
    CREATE OR REPLACE FUNCTION ordain.now_ms() RETURNS bigint LANGUAGE sql
        AS 'SELECT now FROM public.clock'"""


async def _postgresql(url: str) -> tuple[PostgresLog, asyncpg.Connection[asyncpg.Record]]:
    storage = PostgresLog(address(url), "node_1")
    await storage.prepare("log_1", "00" * 32)
    admin = await asyncpg.connect(url)
    await admin.execute(CLOCK.format(T))
    return storage, admin


@pytest.fixture(params=["sqlite", "postgresql"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    if request.param == "sqlite":
        made = await SqliteStorage.open(tmp_path)
        await made.prepare("log_1", "00" * 32)
        yield made
        await made.close()
        return
    remote, admin = await _postgresql(request.getfixturevalue("database"))
    yield remote
    await admin.close()
    await remote.close()


async def read(storage: Storage, text: str) -> list[tuple[Any, ...]]:
    async def work(sql: Sql) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await sql.all(text)]

    return await storage.read(work)


async def events(storage: Storage) -> list[Row]:
    return await storage.read(log.all_rows)


async def sound(storage: Storage) -> None:
    assert (await storage.read(log.verify)).fault is None


async def test_events_get_positions_and_a_chain_that_verifies(storage: Storage) -> None:
    author = Author(storage.term)
    author.register("dev_grüße")
    author.command(ONE, Published(attempt=1))
    author.note()
    first = await storage.append(author.batch())
    author.command(ONE, Executed(result=msgspec.Raw('{"text": "Größe \\u0000 😀"}'.encode())))
    second = await storage.append(author.batch())

    assert (first.first, list(first.times)) == (1, [T] * 4)
    assert (second.first, list(second.times)) == (5, [T])
    found = await events(storage)
    assert [(row.position, row.stream, row.version) for row in found] == [
        (1, "device/dev_grüße", 1), (2, ONE, 1), (3, ONE, 2), (4, "audit", 1), (5, ONE, 3),
    ]  # fmt: skip
    await sound(storage)


async def test_texts_are_stored_as_they_are(storage: Storage) -> None:
    author = Author(storage.term)
    texts = ["", " ", "NULL", "null", 'a "b"', "a\\", '\\"', "{a,b}", "'", "\n\t\r", "ß 😀", "a\\nb"]
    names = [f"dev_{text}" for text in texts]
    plain = [f"plain_{text}" for text in texts if not {'"', "\\"} & set(text)]
    slashes, quotes = ["slash_\\", "slash_a\\nb"], ['quote_"', 'quote_a","b']
    batches = (names, plain, slashes, quotes)
    for batch in batches:  # PostgreSQL gets the texts of a batch together, quoted where needed
        for name in batch:
            author.register(name)
            author.rename(name.partition("_")[2], name)
        await storage.append(author.batch())

    found = {row.device_id: row.stream for row in await events(storage)}
    assert found == {name: f"device/{name}" for batch in batches for name in batch}
    kept = await read(storage, "SELECT id, hardware_id FROM devices")
    assert sorted(kept) == sorted((name, f"hw-{name}") for name in found)
    await sound(storage)


async def test_the_devices_of_gateways_are_found(storage: Storage) -> None:
    author = Author(storage.term)
    for name in ("dev_a", "dev_b", "dev_c"):
        author.register(name)
        author.move("gw", name)
    author.move(None, "dev_b")
    author.move("other", "dev_c")
    await storage.append(author.batch())

    found = await storage.read(devices_view.with_gateway)

    assert {device.id: device.gateway for device in found} == {"dev_a": "gw", "dev_c": "other"}


async def test_devices_that_came_back_are_counted_with_two_reads_however_many_they_are(
    storage: Storage,
) -> None:
    author, names = Author(storage.term), [f"dev_{number}" for number in range(20)]
    for name in ("dev_never", "dev_there", *names):
        author.register(name)
    author.presence(Online(), "dev_there")
    for name in names:  # they are online again, and no event says it yet
        author.presence(Online(), name)
        author.presence(Offline(), name)
    await storage.append(author.batch())
    reads: list[str] = []

    async def work(sql: Sql) -> tuple[int, int]:
        class Noting:
            async def all(self, text: str, values: Sequence[Any] = (), /) -> list[Any]:
                reads.append(text)
                return await sql.all(text, values)

            async def one(self, text: str, values: Sequence[Any] = (), /) -> Any | None:
                reads.append(text)
                return await sql.one(text, values)

            each, form = sql.each, sql.form

        return await devices_view.counted(Noting(), PROJECT, None, {"dev_never", "dev_there", *names})

    assert await storage.read(work) == (22, 21)
    assert len(reads) == 2


async def test_open_commands_are_read_as_they_are_folded_in_order_of_creation(storage: Storage) -> None:
    author, sent, late = Author(storage.term), Published(attempt=1), TimedOut(reason="no_answer")
    lives: list[tuple[Event, ...]] = [
        (), (sent,), (sent, Acknowledged(), Progressed(percent=5)), (sent, late, Acknowledged(late=True)),
        (sent, late), (Cancelled(by="key:key_1"),),
    ]  # fmt: skip
    # The ids and the devices come in another order than the commands.
    made = [
        author.command(f"cmd_{2_000 - number}", *lives[number % 6], device_id=f"dev_{-number % 7}")
        for number in range(1_600)
    ]
    await storage.append(author.batch())
    still_open = [state for state in made if not state.closed]

    assert len(still_open) > 1_000
    assert await storage.read(lanes_view.open_commands) == still_open
    of_one = await storage.read(lambda sql: lanes_view.open_commands(sql, "dev_3"))
    assert of_one == [state for state in still_open if state.device_id == "dev_3"]


async def test_a_batch_is_recorded_once_however_often_it_is_sent(storage: Storage) -> None:
    author = Author(storage.term)
    author.command(ONE)
    batch = author.batch()
    placed = await storage.append(batch)

    assert await storage.append(batch) == placed
    assert await storage.landed(batch.number) == placed
    author.note()
    other = msgspec.structs.replace(author.batch(), number=batch.number)
    with pytest.raises(Conflict):
        await storage.append(other)
    assert [row.stream for row in await events(storage)] == [ONE]


async def test_another_term_is_fenced(storage: Storage) -> None:
    author = Author(storage.term + 1)
    author.note()
    with pytest.raises(Fenced):
        await storage.append(author.batch())
    assert await events(storage) == []


@pytest.mark.parametrize("what", ["version taken", "a version left out", "state changed", "an earlier time"])
async def test_what_does_not_follow_is_a_conflict_and_nothing_is_written(storage: Storage, what: str) -> None:
    author = Author(storage.term)
    author.register()
    author.command(ONE, Published(attempt=1))
    await storage.append(author.batch())
    before = await events(storage)
    author.rename("ours")
    author.command(TWO)
    author.row(Put("meta", ("ours", "1")))
    batch = author.batch()
    if what == "version taken":
        batch.events[0] = msgspec.structs.replace(batch.events[0], version=1)
    elif what == "a version left out":
        batch.events[0] = msgspec.structs.replace(batch.events[0], version=3)
    elif what == "state changed":
        batch.states[0].over = 7
    else:
        batch.events[0] = msgspec.structs.replace(batch.events[0], decided_at=T - 1)
    with pytest.raises(Conflict):
        await storage.append(batch)
    assert await events(storage) == before
    assert await read(storage, "SELECT value FROM meta WHERE key = 'ours'") == []


async def test_rows_beside_the_log_are_written_in_order(storage: Storage) -> None:
    author = Author(storage.term)
    author.note()
    key = (PROJECT, "k", "s", b"\x00\xff", ONE, T)
    author.row(New("idempotency", key), Put("meta", ("a", "1")), Put("meta", ("a", "2")))
    author.row(Put("meta", ("b", "1")), Drop("meta", ("b",)), Change("meta", ("a",), {"value": "3"}))
    author.row(Put("key_terms", ("key_1", b"{}", None, 5)))
    author.row(Put("key_terms", ("key_1", b"{1}", "p", 6), ("last_used_at",)))
    author.row(Change("meta", ("missing",), {"value": "3"}), Drop("meta", ("missing",)))
    await storage.append(author.batch())

    assert await read(storage, "SELECT * FROM idempotency") == [key]
    assert await read(storage, "SELECT value FROM meta WHERE key IN ('a', 'b', 'missing')") == [("3",)]
    assert await read(storage, "SELECT * FROM key_terms") == [("key_1", b"{}", None, 6)]
    author.note()
    author.row(New("idempotency", key))
    with pytest.raises(Conflict):
        await storage.append(author.batch())


async def test_unmatched_answers_are_kept_per_device_and_in_all(storage: Storage) -> None:
    author = Author(storage.term)
    for number in range(12):
        device = None if number % 3 == 0 else f"dev_{number % 3}"
        author.row(Unmatched(T, None, device, "unknown", "t", f"cmd_{number}", b"\x00", 2, 5))
    await storage.append(author.batch())
    kept = [row[0] for row in await read(storage, "SELECT command_id FROM unmatched ORDER BY id")]
    assert kept == ["cmd_7", "cmd_8", "cmd_9", "cmd_10", "cmd_11"]


async def test_erasing_removes_data_and_salt_and_what_else_names_the_command(storage: Storage) -> None:
    author = Author(storage.term)
    author.command(ONE, Published(attempt=1), Executed(result=msgspec.Raw(b"1")))
    author.command(TWO)
    author.row(Unmatched(T, None, DEVICE, "unknown", "t", ONE, b"x", 9, 9))
    await storage.append(author.batch())
    author.note("erased")
    author.row(Erase(ONE))
    await storage.append(author.batch())

    empty = [(row.data is None, row.salt is None) for row in await events(storage)]
    assert empty == [(True, True)] * 3 + [(False, False)] * 2
    assert await read(
        storage, "SELECT e.stream FROM events e JOIN commands c ON c.position = e.position"
    ) == [(TWO,)]
    assert await read(storage, "SELECT * FROM unmatched") == []


# --- the same histories

ENDS: list[Event] = [
    Executed(result=msgspec.Raw(b'{"a":1}')), TimedOut(reason="no_answer"), Cancelled(by="key:key_1"),
]  # fmt: skip
STEPS = st.one_of(
    st.tuples(st.just("command"), st.integers(0, 5), st.sampled_from([[], [Published(attempt=1)]])),
    st.tuples(st.just("command"), st.integers(0, 5), st.lists(st.sampled_from([Acknowledged(), *ENDS]))),
    st.tuples(st.just("command"), st.integers(0, 5), st.just([Progressed(percent=50, note="ß\U0001f600")])),
    st.tuples(st.just("device"), st.integers(0, 2), st.text(max_size=9)),
    st.tuples(st.just("row"), st.integers(0, 3), st.binary(max_size=4)),
    st.tuples(st.just("key"), st.integers(0, 3), st.binary(max_size=4)),
    st.tuples(st.just("erase"), st.integers(0, 5), st.none()),
    st.tuples(st.just("purge"), st.integers(0, 9), st.none()),
    st.tuples(st.just("wait"), st.integers(1, 9), st.none()),
    st.tuples(st.just("commit"), st.booleans(), st.none()),
)


REOPENED: list[tuple[str, Any, Any]] = [
    ("command", 0, [Published(attempt=1), TimedOut(reason="no_answer")]),
    ("commit", True, None),
    ("command", 0, [Acknowledged(late=True)]),
]


def played(steps: list[tuple[str, Any, Any]], term: int) -> Iterator[tuple[int, Batch]]:
    """The batches of a history, each with the time of its commit."""
    author, known = Author(term), set[int]()
    for what, number, more in [*steps, ("commit", True, None)]:
        if what == "command":
            author.command(f"cmd_{number}", *more)
        elif what == "device":
            if number in known:
                author.rename(more, f"d{number}")
            else:
                author.register(f"d{number}")
            known.add(number)
        elif what == "row":
            author.row(Put("key_terms", (f"key_{number}", more, None, number)))
        elif what == "key":
            author.row(New("idempotency", (PROJECT, f"k{number}", "s", more, ONE, T)))
        elif what == "erase":
            author.row(Erase(f"cmd_{number}"))
        elif what == "purge":
            author.note("purge")
            author.row(Purge(author.at, T + number, author.now))
        elif what == "wait" and not author.staged:
            author.now += number
        elif what == "commit":
            batch = author.batch()
            if not number:
                yield author.now, msgspec.structs.replace(batch, term=term + 1)
                return  # a node that is fenced off appends no more
            yield author.now, batch


async def told(storage: Storage, batch: Batch) -> object:
    try:
        return await storage.append(batch)
    except (Conflict, Fenced) as error:
        return type(error)


async def held(storage: Storage) -> list[object]:
    found: list[object] = [await events(storage), await storage.read(follower.dump)]
    return found + [await read(storage, f"SELECT * FROM {table} ORDER BY 1, 2") for table in SIDE]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
@example(steps=REOPENED)
@example(steps=[*REOPENED, ("commit", True, None), ("command", 0, ENDS[:1])])
def test_the_same_history_gives_both_logs_the_same_answers_and_the_same_bytes(
    steps: list[tuple[str, Any, Any]], remote: PostgresFor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    remote.run(compared(steps, remote, tmp_path_factory.mktemp("history")))


async def compared(steps: list[tuple[str, Any, Any]], remote: PostgresFor, directory: Path) -> None:
    local = await SqliteStorage.open(directory)
    await local.prepare("log_1", "00" * 32)
    async with remote.fresh() as (other, admin):
        for (now, one), (_, two) in zip(played(steps, local.term), played(steps, other.term), strict=True):
            await admin.execute("UPDATE public.clock SET now = $1", now)
            assert await told(local, one) == await told(other, two)
        assert await held(local) == await held(other)
        if not any(what == "erase" for what, *_ in steps):  # no `erased` event names what they remove
            assert (await local.read(log.verify)) == (await other.read(log.verify))
    await local.close()


class PostgresFor:
    """One event loop and one log for all histories: a new database for each would take too long."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._runner = asyncio.Runner()

    def run(self, work: Any) -> None:
        self._runner.run(work)

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[tuple[PostgresLog, asyncpg.Connection[asyncpg.Record]]]:
        admin = await asyncpg.connect(self.url)
        await admin.execute("DROP SCHEMA IF EXISTS ordain CASCADE")
        await admin.close()
        storage, admin = await _postgresql(self.url)
        yield storage, admin
        await admin.close()
        await storage.close()

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def remote(database: str) -> Iterator[PostgresFor]:
    made = PostgresFor(database)
    yield made
    made.close()
