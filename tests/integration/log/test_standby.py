"""The log on a PostgreSQL with a synchronous standby, which is taken away, comes back, and takes over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest

from broker.log import sqlite as log
from broker.log.postgresql.log import PostgresLog
from broker.log_url import address
from broker.seams import Unknown
from tests.integration.core_support import T
from tests.integration.log.author import Author
from tests.postgres import Postgres

WITHIN_SEC = 60.0
WAITS = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
FIRST, WAITING, LAST = "cmd_first", "cmd_waiting", "cmd_last"
MAKE_IT_WAIT = (
    f"CREATE OR REPLACE FUNCTION ordain.now_ms() RETURNS bigint LANGUAGE sql AS 'SELECT {T}'",
    "ALTER SYSTEM SET synchronous_standby_names = '*'",
    "SELECT pg_reload_conf()",
)


@pytest.fixture
def pair() -> Iterator[tuple[Postgres, Postgres]]:
    """A server, and its standby; both run."""
    primary = Postgres()
    primary.start()
    try:
        standby = Postgres(primary)
        try:
            standby.start()
            yield primary, standby
        finally:
            standby.remove()
    finally:
        primary.remove()


async def run(url: str, *statements: str) -> None:
    sql = await asyncpg.connect(url)
    for statement in statements:
        await sql.execute(statement)
    await sql.close()


async def until_one_waits(url: str) -> None:
    sql = await asyncpg.connect(url)
    async with asyncio.timeout(WITHIN_SEC):
        while not await sql.fetchval(f"SELECT count(*) {WAITS}"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await sql.close()


async def test_a_batch_that_the_synchronous_standby_does_not_have_is_not_confirmed(
    pair: tuple[Postgres, Postgres],
) -> None:
    primary, standby = pair
    url = primary.create("log")
    storage, author = PostgresLog(address(url), "node_1"), Author(term=0)
    await storage.prepare("log_1", "00" * 32)
    await run(url, *MAKE_IT_WAIT)
    author.command(FIRST)
    await storage.append(author.batch())

    standby.kill()
    author.command(WAITING)
    batch = author.batch()
    storage.answer_sec = WITHIN_SEC
    appending = asyncio.create_task(storage.append(batch))
    await until_one_waits(url)
    await run(url, f"SELECT pg_cancel_backend(pid) {WAITS}")
    with pytest.raises(Unknown):
        await appending
    assert await _streams(storage) == [FIRST, WAITING], "it is visible, and may still be lost"
    asking = asyncio.create_task(storage.landed(batch.number))
    await until_one_waits(url)
    assert not asking.done()

    standby.start()
    assert await asking is not None
    author.command(LAST)
    await storage.append(author.batch())
    await storage.close()
    primary.kill()
    await run(standby.url("log"), "SELECT pg_promote()")
    after = PostgresLog(address(standby.url("log")), "node_2")
    assert await _streams(after) == [FIRST, WAITING, LAST]
    await after.close()


async def _streams(storage: PostgresLog) -> list[str]:
    return [row.stream for row in await storage.read(log.all_rows)]
