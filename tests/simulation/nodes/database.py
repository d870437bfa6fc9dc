"""A simulated PostgreSQL with a synchronous standby, for the real `PostgresLog`.

It carries out the statements of the real code in a SQLite in memory. `append` and `landed`, PL/pgSQL on a
real server, are written again here. A commit waits for the standby. If that wait is broken off, the
commit is visible and may still be lost.
"""

from __future__ import annotations

import re
import sqlite3
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from asyncpg import exceptions as pg

from broker.domain.events import NAMES, SCHEMA, encode
from broker.log import chain
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.log.postgresql.arguments import APPEND
from broker.seams import Batch, Conflict
from projections.batches import put, put_states
from projections.follower import open_log
from tests.simulation.loop import SimClock, SimLoop
from tests.simulation.nodes.connection import Answer, Request, SimConnection
from tests.simulation.nodes.net import Net

LANDED = "SELECT * FROM landed($1, $2)"
TERM = "SELECT coalesce(max(version), 0) FROM events WHERE stream = 'owner'"
TABLES = """
CREATE TABLE batches (incarnation TEXT, number INTEGER, digest BLOB, first INTEGER, count INTEGER,
    recorded_at INTEGER, PRIMARY KEY (incarnation, number));
CREATE TABLE nodes (incarnation TEXT PRIMARY KEY, name TEXT, address TEXT, beat INTEGER, link_up INTEGER,
    draining INTEGER);
"""
FIELD = re.compile(r"\(convert_from\((\w+), 'UTF8'\)::jsonb ->> '(\w+)'\)")
NEXT = "SELECT 1 FROM events WHERE stream = ? AND version = ?"
KNOWN = "SELECT first, count, recorded_at FROM batches WHERE incarnation = ? AND number = ? AND digest <> ''"
AHEAD_MS = 1_000


def refusal(code: str, text: str) -> pg.PostgresError:
    error: pg.PostgresError = pg.PostgresError.new({"C": code, "M": text, "S": "ERROR"})
    return error


class _Content(sqlite3.Connection):
    """The whole database at one time. Several readers may hold it; it is closed when the last lets it go."""

    def __del__(self) -> None:
        self.close()


class SimDatabase:
    """`standby`: whether it confirms commits. `asynchronous`: commits do not wait for it. `durable` is called
    with the last position that no failover loses, `claimed` with each claim of the log as it becomes visible,
    `appended` with the run that appended up to a position."""

    def __init__(self, loop: SimLoop, net: Net) -> None:
        self.net = net
        self.clock = SimClock(loop)
        self.up, self.standby, self.asynchronous = True, True, False
        self.lose_replies = self.lose_notifications = 0.0
        self.durable: Callable[[sqlite3.Connection], object] = lambda sql: None
        self.claimed: Callable[[str, int], object] = lambda incarnation, position: None
        self.appended: Callable[[str, int], object] = lambda incarnation, position: None
        self.connections: dict[SimConnection, None] = {}
        self.random = loop.rng("database")
        self.loop = loop
        self._waiting: deque[Request] = deque()  # committed, and not confirmed by the standby
        self._locked: deque[Request] = deque()  # wait for the lock of appends
        self._behind: bytes | None = None  # what the standby has; None: everything
        self._sql = self._opened(None)
        open_log(self._sql, "log_sim", "00" * 32)
        self._sql.executescript(TABLES)
        self._shown: sqlite3.Connection | None = None

    # --- faults ---

    def end_backends(self, *, quietly: bool = False) -> None:
        """`pg_terminate_backend` for all; `quietly`: `pg_cancel_backend`, which leaves them connected."""
        if not quietly:
            for each in list(self.connections):
                each.lose()
        self._stop_waiting(answer=quietly)

    def kill(self, down_for_sec: float) -> None:
        """Ends the server. What waited for the standby is visible when it is up again."""
        self.up = False
        for each in list(self.connections):
            each.lose()
        self._stop_waiting(answer=False)
        self.loop.call_later(down_for_sec, setattr, self, "up", True, context=self.net.world)

    def fail_over(self, down_for_sec: float) -> None:
        """The standby takes the place of the server; what had not reached it is gone."""
        self.kill(down_for_sec)
        if self._behind is not None:
            self._sql, self._behind = self._opened(self._behind), None
            self._shown = None
        self.standby = True

    def take_standby(self) -> None:
        self.standby = False

    def return_standby(self) -> None:
        self.standby, self._behind = True, None
        self.durable(self._sql)
        waiting, self._waiting = self._waiting, deque()
        for each in waiting:
            each.reply(self._carried_out(each))
        self._next()

    def _stop_waiting(self, *, answer: bool) -> None:
        """What waits for the standby is visible from now on; with an `answer`, that is a warning."""
        waiting, self._waiting = self._waiting, deque()
        for each in waiting:
            done = self._carried_out(each)
            if answer:
                each.reply(done, warning=True)
        if self.up:
            self._next()
        else:
            self._locked.clear()

    # --- statements ---

    def cancel(self, connection: SimConnection) -> None:
        """A client asked to cancel what its connection does."""
        for each in [each for each in self._waiting if each.connection is connection]:
            self._waiting.remove(each)
            each.reply(self._carried_out(each), warning=True)
        self._next()

    def take(self, request: Request) -> None:
        """Carries out a statement that has arrived."""
        text = request.text
        if not self.up or not request.connection.served:
            return
        if text.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
            request.connection.reading = self.shown() if text.startswith("BEGIN") else None
            request.reply([])
        elif text.startswith("SELECT") and text not in (APPEND, LANDED):
            request.reply(self._selected(request))
        elif request.locks and any(each.locks for each in self._waiting):
            self._locked.append(request)
        elif self.standby or self.asynchronous:
            request.reply(self._carried_out(request))
        elif isinstance(refused := self._carried_out(request, really=False), Exception):
            request.reply(refused)
        else:
            self._waiting.append(request)

    def _next(self) -> None:
        locked, self._locked = self._locked, deque()
        for each in locked:
            self.take(each)

    def _selected(self, request: Request) -> Answer:
        sql = request.connection.reading or self._sql
        try:
            return _execute(sql, request.text, request.values).fetchall()
        except sqlite3.Error as error:
            return refusal("42000", f"{error}: {request.text}")

    def _carried_out(self, request: Request, *, really: bool = True) -> Answer:
        if really and not self.standby and self._behind is None:
            self._behind = self._sql.serialize()
        self._sql.execute("BEGIN")
        try:
            answer = self._work(request)
        except (pg.PostgresError, sqlite3.IntegrityError, Conflict) as error:
            self._sql.execute("ROLLBACK")
            if isinstance(error, pg.PostgresError):
                return error
            return refusal("23505" if isinstance(error, sqlite3.IntegrityError) else "OD002", str(error))
        self._sql.execute("COMMIT" if really else "ROLLBACK")
        if really:
            self._shown = None
            if request.text == APPEND:
                self._tell(request, answer)
            if self.standby or self.asynchronous:
                self.durable(self._sql)
        return answer

    def _tell(self, request: Request, answer: list[Any]) -> None:
        incarnation, batch = request.connection.incarnation, request.values[5]
        first, _, last, _ = answer[0]
        if last < first or not batch.events:
            return
        self.appended(incarnation, last)
        if batch.events[0].stream == "owner":
            self.claimed(incarnation, last)

    def _work(self, request: Request) -> list[Any]:
        if request.text == APPEND:
            return [self._append(*request.values)]
        if request.text == LANDED:
            return [self._landed(*request.values)]
        return _execute(self._sql, request.text, request.values).fetchall()

    def _append(
        self, incarnation: str, number: int, digest: bytes, term: int, of_tables: str, batch: Batch
    ) -> tuple[int, int, int, bytes]:
        sql, head = self._sql, read_now(self._sql, log.head)
        text = "SELECT digest, first, recorded_at FROM batches WHERE incarnation = ? AND number = ?"
        known = sql.execute(text, (incarnation, number)).fetchone()
        if known is not None:
            if known[0] != digest:
                raise refusal("OD003", f"batch {number} was recorded with another content, or given up")
            return known[1], known[2], head.position, head.hash
        self._check_term(term)
        clock = self.clock.wall_ms()
        first, recorded = head.position + 1, max(head.recorded_at, clock)
        last = head
        if batch.events:
            if batch.events[0].decided_at < head.decided_at:
                raise refusal("OD002", "decided before the last event")
            if batch.events[-1].decided_at > clock + AHEAD_MS:
                raise refusal("OD004", "the clock of this node is ahead of the database's")
            last = self._insert(head, batch, recorded)
            put_states(sql, batch.states, first)
        for row in batch.rows:
            put(sql, row, first)
        values = (incarnation, number, digest, first, len(batch.events), recorded)
        sql.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", values)
        sql.execute("DELETE FROM batches WHERE incarnation = ? AND number = ?", (incarnation, number - 100))
        return first, recorded, last.position, last.hash

    def _check_term(self, term: int) -> None:
        current = self._sql.execute(TERM).fetchone()[0]
        if current != term:
            raise refusal("OD001", str(current))

    def _insert(self, head: log.Head, batch: Batch, recorded: int) -> log.Head:
        position, previous = head.position, head.hash
        for index, event in enumerate(batch.events):
            if (
                event.version > 1
                and not self._sql.execute(NEXT, (event.stream, event.version - 1)).fetchone()
            ):
                raise refusal("OD002", "an event is not the next one of its stream")
            position += 1
            data, salt = encode(event.event), batch.salts[16 * index : 16 * index + 16]
            header = (
                *(position, event.stream, event.version, NAMES[type(event.event)], SCHEMA, recorded),
                *(event.decided_at, event.project, event.device_id, event.actor),
            )
            digest = chain.digest(salt, data)
            previous = chain.link(previous, *header, digest)
            self._sql.execute(log.INSERT, Row(*header, data, salt, digest, previous))
        return log.Head(position, recorded, previous, batch.events[-1].decided_at)

    def _landed(self, incarnation: str, number: int) -> tuple[Any, ...]:
        known = self._sql.execute(KNOWN, (incarnation, number)).fetchone()
        if known is None:
            given_up = "INSERT INTO batches VALUES (?, ?, '', 0, 0, 0) ON CONFLICT DO NOTHING"
            self._sql.execute(given_up, (incarnation, number))
        return known or (None, None, None)

    # --- reading ---

    def shown(self) -> sqlite3.Connection:
        """The database as it is now; it stays so."""
        if self._shown is None:
            self._shown = self._opened(self._sql.serialize())
        return self._shown

    def _opened(self, content: bytes | None) -> sqlite3.Connection:
        sql = sqlite3.connect(":memory:", isolation_level=None, factory=_Content)
        if content is not None:
            sql.deserialize(content)
        sql.create_function("pg_is_in_recovery", 0, lambda: 0)
        sql.create_function("pg_notify", 2, self._notify)
        return sql

    def _notify(self, channel: str, _text: str) -> None:
        for each in self.connections:
            for listener in each.listeners.get(channel, ()):
                if self.random.random() >= self.lose_notifications:
                    each.arrive(partial(listener, each, 0, channel, ""))


def _execute(sql: sqlite3.Connection, text: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
    text = FIELD.sub(r"json_extract(CAST(\1 AS TEXT), '$.\2')", text)
    return sql.execute(text, {str(number): value for number, value in enumerate(values, 1)})
