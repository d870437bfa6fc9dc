"""The log on a real PostgreSQL: what only a server can do wrong, and what must come of it."""

from __future__ import annotations

import asyncio
import errno
import runpy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg
import msgspec
import pytest

from broker.domain.batches import Batch
from broker.domain.events import Cancelled, Event
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.postgresql import connection, making, tables
from broker.log.postgresql.arguments import APPEND, arguments
from broker.log.postgresql.log import PostgresLog
from broker.log.postgresql.reading import Snapshot
from broker.log.postgresql.taking import OwnedLog
from broker.log_url import address
from broker.seams import (
    Broken,
    Conflict,
    Fenced,
    InUse,
    Node,
    Put,
    Unknown,
    UnknownFormat,
)
from projections import follower
from tests.integration.core_support import T
from tests.integration.log.author import Author
from tests.postgres import Postgres

ONE, TWO = "cmd_00000000000000000000000001", "cmd_00000000000000000000000002"


@asynccontextmanager
async def opened(
    url: str, incarnation: str = "node_1", answer_sec: float = 10.0
) -> AsyncIterator[PostgresLog]:
    """A log whose database says that it is `T`."""
    storage = PostgresLog(address(url), incarnation, answer_sec)
    await storage.prepare("log_1", "00" * 32)
    async with admin(url) as sql:
        await at(sql, T)
    try:
        yield storage
    finally:
        await storage.close()


@asynccontextmanager
async def admin(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    sql = await asyncpg.connect(url, server_settings={"search_path": "ordain"})
    try:
        yield sql
    finally:
        await sql.close()


async def at(sql: asyncpg.Connection[asyncpg.Record], now: int) -> None:
    """Sets the clock of the database."""
    await sql.execute(f"CREATE OR REPLACE FUNCTION now_ms() RETURNS bigint LANGUAGE sql AS 'SELECT {now}'")


async def rows(storage: PostgresLog) -> list[Row]:
    async def work(sql: Snapshot) -> list[Row]:
        return [Row(*row) for row in await sql.all(f"SELECT {log.COLUMNS} FROM events ORDER BY position")]

    return await storage.read(work)


async def table(storage: PostgresLog, name: str) -> list[tuple[object, ...]]:
    async def work(sql: Snapshot) -> list[tuple[object, ...]]:
        return [tuple(row) for row in await sql.all(f"SELECT * FROM {name} ORDER BY 1, 2")]

    return await storage.read(work)


# --- appending


async def test_a_batch_that_was_asked_for_in_vain_can_never_be_recorded(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage:
        author.command(ONE)
        batch = author.batch()
        assert await storage.landed(batch.number) is None
        with pytest.raises(Conflict, match="given up"):
            await storage.append(batch)
        assert await storage.landed(batch.number) is None
        assert await rows(storage) == []


async def test_an_append_in_an_older_term_is_fenced(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage:
        async with opened(database, "node_2") as other:
            assert await storage.own("one", None, T) == 1
            assert await other.own("two", None, T) == 2
            assert (storage.term, other.term) == (1, 2)
        author.command(ONE)
        batch = msgspec.structs.replace(author.batch(term=1), number=storage.number())
        with pytest.raises(Fenced) as fenced:
            await storage.append(batch)
        assert fenced.value.term == 2
        assert [row.type for row in await rows(storage)] == ["owned", "owned"]


async def test_two_that_claim_at_once_get_different_terms(database: str) -> None:
    async with opened(database) as first, opened(database, "node_2") as second:
        claims = (first.own("one", None, T), second.own("two", None, T))
        found = await asyncio.gather(*claims, return_exceptions=True)
        terms = sorted(term for term in found if isinstance(term, int))
        assert terms == [row.version for row in await rows(first)]
        assert all(isinstance(term, int | Conflict) for term in found)


async def test_a_clock_ahead_of_the_database_is_refused_by_its_milliseconds(database: str) -> None:
    author = Author(term=0, now=T + 1_001)
    async with opened(database) as storage:
        author.note()
        with pytest.raises(Conflict, match="1001 ms ahead"):
            await storage.append(author.batch())
        author = Author(term=0, now=T + 1_000)
        author.note()
        batch = msgspec.structs.replace(author.batch(), number=2)
        assert list((await storage.append(batch)).times) == [T]


async def test_appends_of_many_connections_leave_no_gap_in_the_positions(database: str) -> None:
    async with opened(database) as storage:
        logs = [PostgresLog(address(database), f"node_{number}") for number in range(4)]

        async def write(number: int) -> None:
            author = Author(term=0, seed=number)
            for turn in range(20):
                author.command(f"cmd_{number}_{turn}")
                await logs[number].append(author.batch())

        await asyncio.gather(*(write(number) for number in range(4)))
        found = await rows(storage)
        assert [row.position for row in found] == list(range(1, 81))
        assert (await storage.read(log.verify)).fault is None
        for each in logs:
            await each.close()


def _commands(author: Author, numbers: range, *then: Event) -> None:
    for number in numbers:
        author.command(f"cmd_{number}", *then)


def _devices(author: Author, numbers: range, *then: Event) -> None:
    for number in numbers:
        if then:
            author.rename("Lamp", f"dev_{number}")
        else:
            author.register(f"dev_{number}")


@pytest.mark.parametrize(("table", "stage"), [("commands", _commands), ("devices", _devices)])
async def test_an_append_reads_only_the_rows_that_it_changes(
    database: str, table: str, stage: Callable[..., None]
) -> None:
    """Also with statistics and plans from a time without rows."""
    author, change = Author(term=0), Cancelled(by="key:key_1")
    async with admin(database) as sql:
        async with opened(database) as storage:
            await sql.execute("VACUUM ANALYZE")
            for number in range(20):
                stage(author, range(number, number + 1))
                stage(author, range(number, number + 1), change)
                await storage.append(author.batch())
            stage(author, range(20, 2_000))
            await storage.append(author.batch())
            stage(author, range(20, 120), change)
            await storage.append(author.batch())
        async with asyncio.timeout(60):
            while await sql.fetchval(  # noqa: ASYNC110 # a session counts its work at the latest when it ends
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ordain'"
            ):
                await asyncio.sleep(0.01)
        changed, read = await sql.fetchrow(
            "SELECT n_tup_upd, seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = $1",
            table,
        ) or (0, 0)
    assert changed == 100
    assert read <= 220


# --- unknown outcomes


async def test_a_caller_that_is_cancelled_does_not_stop_the_append(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage, admin(database) as sql:
        author.command(ONE)
        batch = author.batch()
        async with sql.transaction():
            await sql.execute(f"SELECT pg_advisory_xact_lock({int.from_bytes(b'ordain')})")
            caller = asyncio.create_task(storage.append(batch))
            await waiting(database)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        assert (await storage.landed(batch.number)) is not None


async def waiting(database: str) -> None:
    """Returns when a session waits for the lock of appends."""
    async with admin(database) as sql, asyncio.timeout(60):
        while not await sql.fetchval(  # noqa: ASYNC110
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        ):
            await asyncio.sleep(0.01)  # another session's lock gives no sign


async def test_a_zombie_append_is_refused_once_its_batch_was_given_up(database: str) -> None:
    """The server does not notice at once that a client is gone: its statement goes on."""
    author = Author(term=0)
    async with opened(database, answer_sec=0.2) as storage, admin(database) as sql:
        author.command(ONE)
        batch = author.batch()
        async with sql.transaction():
            await sql.execute(f"SELECT pg_advisory_xact_lock({int.from_bytes(b'ordain')})")
            with pytest.raises(Unknown, match="did not answer"):
                await storage.append(batch)
            with pytest.raises(Unknown, match="did not answer"):
                await storage.landed(batch.number)
        storage.answer_sec = 10.0
        placed = await storage.landed(batch.number)  # the first append was first at the lock
        assert placed is not None
        assert await storage.append(batch) == placed
        assert [row.stream for row in await rows(storage)] == [ONE]


async def test_an_append_whose_connection_the_server_ended_is_unknown_and_the_next_one_is_made_anew(
    database: str,
) -> None:
    author = Author(term=0)
    async with opened(database) as storage, admin(database) as sql:
        author.note()
        batch = author.batch()
        async with sql.transaction():
            await sql.execute(f"SELECT pg_advisory_xact_lock({int.from_bytes(b'ordain')})")
            append = asyncio.create_task(storage.append(batch))
            await waiting(database)
            await sql.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
            with pytest.raises(Unknown):
                await append
        assert await storage.landed(batch.number) is None
        author = Author(term=0)
        author.note()
        await storage.append(msgspec.structs.replace(author.batch(), number=2))
        assert len(await rows(storage)) == 1


async def test_a_warning_of_the_database_is_not_taken_for_success(database: str) -> None:
    """PostgreSQL warns when a commit is not on its synchronous standby, and calls it a success."""
    author = Author(term=0)
    async with opened(database) as storage, admin(database) as sql:
        await sql.execute(
            "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE WARNING 'canceling wait for synchronous replication'; RETURN NULL; END $$; "
            "CREATE TRIGGER warn AFTER INSERT ON batches EXECUTE FUNCTION warn()"
        )
        author.command(ONE)
        batch = author.batch()
        with pytest.raises(Unknown, match="synchronous replication"):
            await storage.append(batch)
        await sql.execute("DROP TRIGGER warn ON batches")
        assert await storage.landed(batch.number) is not None


async def test_commits_wait_for_standbys_whatever_the_session_is_told(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage, admin(database) as sql:
        name = await sql.fetchval("SELECT current_database()")
        await sql.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        await sql.execute(
            "CREATE TABLE seen (level text); "
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$; "
            "CREATE TRIGGER look AFTER INSERT ON batches EXECUTE FUNCTION look()"
        )
        author.note()
        await storage.append(author.batch())
        await storage.landed(2)
        assert [row[0] for row in await sql.fetch("SELECT level FROM seen")] == ["on", "on"]


async def test_a_database_that_lost_a_confirmed_event_is_broken(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage, admin(database) as sql:
        author.command(ONE)
        await storage.append(author.batch())
        await sql.execute("DELETE FROM events")  # as a standby that was promoted without it
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        author.note()
        batch = author.batch()
        with pytest.raises((Unknown, Broken)):  # as it notices its end before or after it is used
            await storage.append(batch)
        with pytest.raises(Broken, match="position 1"):
            await storage.landed(batch.number)


async def test_a_value_that_cannot_be_stored_fails_and_the_next_batch_does_not(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage:
        author.row(Put("meta", ("nul", "a\0b")))  # the writer checks rows when they are staged
        with pytest.raises(ValueError):
            await storage.append(author.batch())
        author.note()
        assert (await storage.append(author.batch())).first == 1


# --- reading and starting


async def test_a_read_sees_one_state_from_its_first_statement_on(database: str) -> None:
    author = Author(term=0)
    async with opened(database) as storage:

        async def work(sql: Snapshot) -> tuple[int, int]:
            first = await sql.one("SELECT count(*) FROM events")
            author.command(ONE)
            await storage.append(author.batch())
            second = await sql.one("SELECT count(*) FROM events WHERE position > ?", (0,))
            assert first is not None
            assert second is not None
            return first[0], second[0]

        assert await storage.read(work) == (0, 0)
        assert len(await rows(storage)) == 1


async def test_a_read_cannot_write_and_an_error_of_it_does_not_harm_the_next(database: str) -> None:
    async with opened(database) as storage:

        async def writes(sql: Snapshot) -> None:
            await sql.all("DELETE FROM meta")

        async def fails(sql: Snapshot) -> None:
            raise LookupError("in the middle")

        with pytest.raises(Unknown, match="read-only"):
            await storage.read(writes)
        with pytest.raises(LookupError):
            await storage.read(fails)
        assert await rows(storage) == []


async def test_a_log_keeps_its_id_and_another_format_is_refused(database: str) -> None:
    async with opened(database) as storage, admin(database) as sql:
        again = PostgresLog(address(database), "node_2")
        await again.prepare("log_2", "11" * 32)
        meta = {str(row[0]): row[1] for row in await table(storage, "meta")}
        assert (meta["log_id"], meta["cursor_key"], meta["format"]) == ("log_1", "00" * 32, "2")
        await sql.execute("UPDATE meta SET value = '9' WHERE key = 'format'")
        with pytest.raises(UnknownFormat, match="its format is 9"):
            await again.prepare("log_2", "11" * 32)


async def test_functions_of_an_older_release_are_replaced(database: str) -> None:
    async with opened(database), admin(database) as sql:
        older = next(text for text in tables.statements() if "FUNCTION put_newest" in text)
        await sql.execute("DROP FUNCTION put_newest")
        await sql.execute(older.replace("of_commands", "of_lanes"))
        await sql.execute("UPDATE meta SET value = 'older' WHERE key = 'tables'")

        again = PostgresLog(address(database), "node_2")
        await again.prepare("log_1", "00" * 32)
        await again.close()

        names = await sql.fetchval("SELECT proargnames FROM pg_proc WHERE proname = 'put_newest'")
        assert "of_commands" in names


async def test_an_owner_is_refused_once_another_release_made_the_tables(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    author = Author(term=0)
    async with opened(database) as storage:
        author.command(ONE)
        await storage.append(author.batch())
        before = await rows(storage)
        with monkeypatch.context() as newer:
            newer.setattr(making, "TABLES", "newer")
            await PostgresLog(address(database), "node_2").prepare("log_1", "00" * 32)

        author.command(TWO)
        with pytest.raises(UnknownFormat, match="all nodes must run the same release"):
            await storage.append(author.batch())
        assert await rows(storage) == before


async def test_a_broker_of_another_release_that_finds_the_owner_alive_changes_nothing(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned, another = (
        OwnedLog(address(database), Node(each, each), lambda: 0, lease_sec=0.3, beat_sec=0.02)
        for each in ("node_1", "node_2")
    )
    async with asyncio.TaskGroup() as group:
        await owned.prepare("log_1", "00" * 32)
        alive = group.create_task(owned.keep())
        with monkeypatch.context() as newer:
            newer.setattr(making, "TABLES", "newer")
            with pytest.raises(InUse, match="node node_1"):
                await another.prepare("log_1", "00" * 32)

        await owned.append(Batch(owned.number(), owned.term, [], b"", [], [Put("meta", ("probe", "x"))]))
        alive.cancel()
    await another.close()
    await owned.close()


async def test_an_owner_that_names_the_format_as_earlier_releases_did_is_refused(database: str) -> None:
    """It would write rows that no later release can read."""
    author = Author(term=0)
    author.command(ONE)
    async with opened(database) as storage, admin(database) as sql:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await sql.fetchrow(APPEND, *arguments(author.batch(), "node_1", str(tables.FORMAT)))
        assert isinstance(connection.translated(refused.value), UnknownFormat)
        assert await rows(storage) == []


EARLIER = {"put_newest": "put_states", "key = 'tables'": "key = 'format'"}


@pytest.mark.parametrize(
    ("function", "named", "refusal"),
    [
        (EARLIER, str(tables.FORMAT), Broken),  # a function that is no longer there
        ({}, making.TABLES, UnknownFormat),
    ],
)
async def test_an_append_that_waits_while_another_release_makes_the_tables_records_nothing(
    database: str, function: dict[str, str], named: str, refusal: type[Exception]
) -> None:
    author = Author(term=0)
    author.command(ONE)
    async with opened(database) as storage, admin(database) as sql, admin(database) as owner:
        for text in tables.statements()[-3:-1]:  # put_newest and append
            for now, then in function.items():
                text = text.replace(now, then)
            await sql.execute(text)
        async with sql.transaction():
            await sql.execute(making.LOCK)
            values = arguments(author.batch(), "node_1", named)
            append = asyncio.create_task(owner.fetchrow(APPEND, *values))
            async with asyncio.timeout(30):
                while not await sql.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                ):
                    pass
            await making.make(sql)
            await at(sql, T)
            await sql.execute("UPDATE meta SET value = 'newer' WHERE key = 'tables'")
        with pytest.raises(asyncpg.PostgresError) as refused:
            await append
        assert isinstance(connection.translated(refused.value), refusal)
        assert await rows(storage) == []


# The functions of a release that replaces them without dropping them first.
REPLACING = """
CREATE OR REPLACE FUNCTION append(
    of_incarnation text, of_number bigint, of_digest bytea, of_term bigint, of_format text,
    streams text[], versions bigint[], types text[], schemas bigint[], decided bigint[], projects text[],
    device_ids text[], actors text[], datas bytea[], salts bytea[],
    c_id text[], c_over bigint[], c_first bigint[], c_last bigint[], c_opened boolean[], c_project text[],
    c_device text[], c_type text[], c_state text[], c_version bigint[], c_closed_at bigint[],
    c_summary bytea[],
    d_id text[], d_over bigint[], d_first bigint[], d_last bigint[], d_project text[], d_hardware text[],
    d_deleted boolean[], d_version bigint[], d_online bigint[], d_body bytea[],
    statements text[], payloads jsonb[],
    OUT first bigint, OUT recorded bigint, OUT last bigint, OUT head bytea) LANGUAGE plpgsql AS $$
BEGIN
END $$;
CREATE OR REPLACE FUNCTION put_states(
    base bigint,
    c_id text[], c_over bigint[], c_first bigint[], c_last bigint[], c_opened boolean[], c_project text[],
    c_device text[], c_type text[], c_state text[], c_version bigint[], c_closed_at bigint[],
    c_summary bytea[],
    d_id text[], d_over bigint[], d_first bigint[], d_last bigint[], d_project text[], d_hardware text[],
    d_deleted boolean[], d_version bigint[], d_online bigint[], d_body bytea[])
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
END $$;
"""


async def test_an_earlier_release_can_make_its_functions_again_and_this_one_its_own_after_it(
    database: str,
) -> None:
    author = Author(term=0)
    author.command(ONE)
    async with opened(database), admin(database) as sql:
        await sql.execute(REPLACING)
        await sql.execute("UPDATE meta SET value = 'older' WHERE key = 'tables'")
    async with opened(database, "node_2") as storage:
        await storage.append(author.batch())
        assert len(await rows(storage)) == 1


def test_the_tables_of_a_log_change_with_what_its_rows_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runpy` makes the digest again, as the next release does."""
    assert runpy.run_path(making.__file__)["TABLES"] == making.TABLES
    for module, name in ((follower, "SHAPE"), (tables, "FORMAT")):
        with monkeypatch.context() as newer:
            newer.setattr(module, name, "another")
            assert runpy.run_path(making.__file__)["TABLES"] != making.TABLES


async def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    storage = PostgresLog(address("postgresql://me:secret@127.0.0.1:1/log"), "node_1")
    with pytest.raises(Unknown, match=r"postgresql://me@127.0.0.1:1/log cannot be reached") as refused:
        await storage.prepare("log_1", "00" * 32)
    assert "secret" not in str(refused.value)


async def test_a_connection_that_ends_right_after_the_handshake_is_unknown_and_is_closed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg warns of a connection that nobody closed, and the test would fail."""

    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")  # as macOS says of the options of such a socket

    monkeypatch.setattr(connection, "watch", refused)
    with pytest.raises(Unknown, match="cannot be reached"):
        await connection.connect(address(database))


async def test_after_kill_9_of_the_server_what_was_confirmed_is_there(
    postgres: Postgres, database: str
) -> None:
    author = Author(term=0)
    async with opened(database) as storage:
        for turn in range(20):
            author.command(f"cmd_{turn}")
            await storage.append(author.batch())
        postgres.kill()
        with pytest.raises(Unknown):
            await storage.landed(20)
        postgres.start()
        assert await storage.landed(20) is not None
        assert [row.stream for row in await rows(storage)] == [f"cmd_{turn}" for turn in range(20)]
