"""The log on PostgreSQL (`seams.EventLog`): one statement appends a batch, reads see one snapshot each.

An append is never cancelled: after its deadline the socket is closed, and `landed` asks what became of it.
What the database once gave as durable must stay: if the last row seen has another hash after a new
connection, the database has lost it, and this log is broken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any, TypeVar, cast

import asyncpg
import structlog

from broker.domain.events import OWNER, Owned, Pending, decode
from broker.log.postgresql import making
from broker.log.postgresql.arguments import APPEND, arguments
from broker.log.postgresql.connection import (
    APPENDING,
    FAILURES,
    Connect,
    Connection,
    connect,
    end,
    goodbye,
    translated,
)
from broker.log.postgresql.reading import Readers, Snapshot
from broker.log_url import Address
from broker.seams import Batch, Broken, Conflict, Fenced, Node, Placed, Unknown, View

T = TypeVar("T")

logger = structlog.get_logger()

ANSWER_SEC = 10.0  # for one statement of ours; a longer silence is a lost connection
CHANNEL = "ordain_nodes"
BEAT_WITHIN_SEC = 3.0
END = """SELECT
    coalesce((SELECT version FROM events WHERE stream = 'owner' ORDER BY version DESC LIMIT 1), 0),
    coalesce((SELECT coalesce(decided_at, recorded_at) FROM events ORDER BY position DESC LIMIT 1), 0)"""
BEAT = """INSERT INTO nodes (incarnation, name, address, beat, link_up, draining)
    VALUES ($1, $2, $3, 1, $4, $5)
    ON CONFLICT (incarnation) DO UPDATE SET name = excluded.name, address = excluded.address,
        beat = nodes.beat + 1, link_up = excluded.link_up, draining = excluded.draining"""
NODES = "SELECT incarnation, name, address, beat, link_up, draining FROM nodes ORDER BY incarnation"
OWNED_BY = "SELECT version, data FROM events WHERE stream = 'owner' ORDER BY version DESC LIMIT 1"
NOTIFY = f"SELECT pg_notify('{CHANNEL}', '')"


class PostgresLog:
    """One node's connections to a log. `incarnation`: this run of the process; its batches are numbered."""

    def __init__(
        self, where: Address, incarnation: str, answer_sec: float = ANSWER_SEC, connect: Connect = connect
    ) -> None:
        self.where = where
        self.incarnation = incarnation
        self.answer_sec = answer_sec
        self._connect = connect
        self._readers = Readers(where, connect)
        self._appending: Connection | None = None
        self._beating: Connection | None = None
        self._turn = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._warnings: list[str] = []
        self._seen: tuple[int, bytes] | None = None
        self._term = 0
        self._number = 0
        self.notified = asyncio.Event()  # another node said that something about the nodes has changed

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        """Creates the tables, or checks those that are there. Rebuilds the projections if their form changed.

        Raises:
            Unknown: the server cannot be reached.
            Broken: it cannot hold a log, or what it has is none.
            UnknownFormat: another release wrote it.
        """
        connection = await self._connect(self.where)
        try:
            await making.prepare(connection, self.where, log_id, cursor_key)
        except FAILURES as error:
            raise translated(error) from error
        finally:
            await goodbye(connection)

    # --- appending ---

    def number(self) -> int:
        """A number for the next batch, which no batch of this run has had."""
        self._number += 1
        return self._number

    @property
    def term(self) -> int:
        """The term in which this node owns the log; 0: it never did."""
        return self._term

    async def own(self, node: str, address: str | None, now: int) -> int:
        """Claims the log for this node: every append of an earlier owner is refused from now on.

        Returns the new term. `now`: the clock of this node, ms.

        Raises:
            Conflict: another node claimed it at the same moment.
            Unknown: the server cannot be reached; the claim may be recorded, and then nobody uses it.
        """
        term, decided_at = await self._ask(END)
        claim = Owned(incarnation=self.incarnation, node=node, address=address)
        event = Pending(
            stream=OWNER,
            version=term + 1,
            decided_at=max(now, decided_at),
            project="",
            device_id=None,
            actor="broker",
            event=claim,
        )
        # This event hides nothing, so its salt may be known.
        salt = sha256(f"{self.incarnation} {term}".encode()).digest()[:16]
        try:
            await self.append(Batch(self.number(), term, [event], salt, [], []))
        except Fenced as error:
            raise Conflict(f"another node claimed term {error.term}") from error
        self._term = term + 1
        return self._term

    async def append(self, batch: Batch) -> Placed:
        """Records a batch, whole or not at all.

        Raises:
            Conflict, Fenced, Full, ValueError: nothing was recorded.
            Unknown: it may be recorded: ask `landed`.
            Broken: the database is damaged, or has lost what it had confirmed.
            UnknownFormat: another release made the tables since; nothing was recorded.
        """
        values = arguments(batch, self.incarnation, making.TABLES)
        first, recorded_at, last, head = await self._ask(APPEND, *values)
        self._seen = (last, head)
        return Placed(first, [recorded_at] * len(batch.events))

    async def landed(self, number: int) -> Placed | None:
        """What became of the batch with this number; None: it is not recorded and never will be.

        Raises:
            Unknown: the server cannot say it now.
        """
        text = "SELECT * FROM landed($1, $2)"
        first, count, recorded_at = await self._ask(text, self.incarnation, number)
        return None if first is None else Placed(first, [recorded_at] * count)

    async def _ask(self, text: str, *values: object) -> asyncpg.Record:
        """Runs one statement on the connection of appends. A caller that is cancelled does not stop it."""
        task = asyncio.ensure_future(self._in_turn(text, values))
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it has it, or was cancelled

    async def _in_turn(self, text: str, values: Sequence[object]) -> asyncpg.Record:
        async with self._turn:
            return await self._answered(text, values)

    async def _answered(self, text: str, values: Sequence[object]) -> asyncpg.Record:
        connection = await self._connected()
        self._warnings.clear()
        answer = asyncio.ensure_future(connection.fetchrow(text, *values))
        done, _ = await asyncio.wait({answer}, timeout=self.answer_sec)
        if not done:
            end(connection)  # not cancelled: a cancelled commit may be visible and still be lost
            await asyncio.wait({answer})
        try:
            row = answer.result()
        except FAILURES as error:
            found = translated(error)
            if isinstance(found, Unknown):
                end(connection)
            if not done:
                found = Unknown(f"{self.where.shown} did not answer within {self.answer_sec:g} s")
            raise found from error
        # PostgreSQL warns that a commit is not on its synchronous standbys, and then calls it a success.
        if self._warnings:
            end(connection)
            raise Unknown(self._warnings[0])
        assert row is not None
        return row

    async def _connected(self) -> Connection:
        if self._appending is not None and not self._appending.is_closed():
            return self._appending
        connection = await self._connect(self.where, APPENDING)
        try:
            if await connection.fetchval("SELECT pg_is_in_recovery()"):
                raise Unknown(f"{self.where.shown} is a standby: it only reads")
            if self._seen is not None:
                position, known = self._seen
                found = await connection.fetchval("SELECT hash FROM events WHERE position = $1", position)
                if found != known:
                    raise Broken(
                        f"{self.where.shown} no longer has the event at position {position} that it had "
                        "confirmed: it was replaced by a copy that lacks it"
                    )
        except FAILURES as error:
            end(connection)
            raise translated(error) from error
        except BaseException:
            end(connection)
            raise
        connection.add_log_listener(self._noticed)
        self._appending = connection
        return connection

    def _noticed(self, connection: Any, message: asyncpg.PostgresLogMessage) -> None:
        if str(message.severity_en or message.severity) == "WARNING":
            self._warnings.append(str(message))
            logger.warning("log.database_warns", said=str(message))

    # --- reading ---

    async def read(self, work: Callable[[Snapshot], Awaitable[T]]) -> T:
        """Runs `work` on one snapshot.

        Raises:
            Unknown: the server cannot be reached now.
        """
        return await self._readers.read(work)

    # --- nodes ---

    async def beat(self, node: Node, *, notify: bool = False) -> View:
        """Says that this node lives, and reads what the others said. On a connection of its own: an append
        that waits must not look like a dead node. `notify`: makes the other nodes look at once.

        Raises:
            Unknown: the server cannot be reached now.
        """
        try:
            if self._beating is None or self._beating.is_closed():
                self._beating = await self._connect(self.where)
                await self._beating.add_listener(CHANNEL, lambda *_: self.notified.set())
            connection = self._beating
            async with asyncio.timeout(min(self.answer_sec, BEAT_WITHIN_SEC)):
                await connection.execute(
                    BEAT, node.incarnation, node.name, node.address, int(node.link_up), int(node.draining)
                )
                if notify:
                    await connection.execute(NOTIFY)
                return await _view(connection)
        except FAILURES as error:
            end(self._beating)
            raise translated(error) from error

    async def view(self) -> View | None:
        """Reads what the nodes said, and changes nothing. None: there is no log yet.

        Raises:
            Unknown: the server cannot be reached now.
        """
        try:
            connection = await self._connect(self.where)
            try:
                if await connection.fetchval("SELECT to_regclass('nodes') IS NULL"):
                    return None
                return await _view(connection)
            finally:
                await goodbye(connection)
        except FAILURES as error:
            raise translated(error) from error

    async def leave(self, node: Node) -> None:
        """Takes a node off the list, so that nobody has to wait for its end.

        Raises:
            Unknown: the server cannot be reached now.
        """
        try:
            connection = await self._connect(self.where)
            try:
                await connection.execute("DELETE FROM nodes WHERE incarnation = $1", node.incarnation)
                await connection.execute(NOTIFY)
            finally:
                await goodbye(connection)
        except FAILURES as error:
            raise translated(error) from error

    async def rebuild(self) -> None:
        """Builds the projections anew from the log.

        Raises:
            Unknown: the server cannot be reached.
            ValueError: an event cannot be read.
        """
        connection = await self._connect(self.where)
        try:
            async with connection.transaction():
                await making.rebuild(connection)
        except FAILURES as error:
            raise translated(error) from error
        finally:
            await goodbye(connection)

    async def forget_old_pages(self) -> bool:
        """Nothing to do: PostgreSQL removes old row versions itself, some time later (VACUUM)."""
        return True

    async def close(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way)
        await self._readers.close()
        await goodbye(self._beating)
        await goodbye(self._appending)


async def _view(connection: Connection) -> View:
    owner = await connection.fetchrow(OWNED_BY)
    nodes = [
        Node(row[0], row[1], row[2], beat=row[3], link_up=bool(row[4]), draining=bool(row[5]))
        for row in await connection.fetch(NODES)
    ]
    if owner is None:
        return View(0, None, nodes)
    return View(owner[0], cast(Owned, decode("owned", owner[1])).incarnation, nodes)
