"""Erases one command, all closed commands older than a number of days (a purge), or old device events.

Each request records one `erased` event. From its commit on, no read returns the erased commands. For one
command, parameters and results are removed from the log in the same transaction. For a purge they are
removed after the answer, in small transactions through the writer, so that delivery goes on meanwhile.
A restart continues a purge that was interrupted.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import structlog

from broker.domain.decisions import Verdict, decide
from broker.domain.errors import Unavailable
from broker.domain.events import ERASURES, Erased
from broker.domain.lifecycle import Input, Request
from broker.engine.commands import Caller, Commands, conflict
from broker.log import erasing, replaced
from broker.log.erasing import Purge as Promised
from broker.seams import Drop, Erase, EraseEvents, Full, Purge, SideRow, Sql
from projections import commands as commands_view

logger = structlog.get_logger()

DAY_MS = 86_400_000
MAX_DAYS = 36_500
BATCH = 100  # log rows erased in one transaction; small, because hand-overs wait for that transaction
PAUSE_SEC = 0.005
AGAIN_SEC = 1.0


class Purged(NamedTuple):
    """The extent of a purge: the number of commands or device events, all before `cutoff` (ms)."""

    cutoff: int
    amount: int


class Erasures:
    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._writer = commands.writer
        self._live = commands.live
        self._version = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.batch, self.pause_sec = BATCH, PAUSE_SEC
        self.erased = 0  # number of commands erased by this process

    async def load(self) -> None:
        """Reads the version of the `erasures` stream, and wakes `run` to finish interrupted purges."""

        async def work(sql: Sql) -> int:
            found = await sql.all(
                "SELECT coalesce(max(version), 0) FROM events WHERE stream = ?", (ERASURES,)
            )
            return int(found[0][0])

        self._version = await self._writer.storage.read(work)
        if self._version:
            self._wake.set()

    # --- requests ---

    async def delete(self, caller: Caller, command_id: str) -> None:
        """Erases one closed command; a pending one is cancelled first.

        Raises:
            Refusal: not_found; conflict, if the command was handed over and is not closed.
            Unavailable: the log could not be written.
        """
        await self._commands.ready(command_ids=[command_id], project=caller.project)
        state = self._commands.seen(caller, command_id)
        request = Request(input=Input.DELETE, now=self._writer.now(), by=caller.actor)
        decision = decide(state, request)
        if decision.verdict is Verdict.CONFLICT:
            await self._writer.barrier()
            raise conflict(state, Input.DELETE)
        state = self._commands.apply(state, decision, caller.actor)
        self._record(Erased(ids=[command_id], count=1), state.project, caller.actor)
        self._live.forget(state)
        self._writer.also(Erase(command_id))
        self._writer.then(lambda: self._carry_out(1), lambda: self._live.remember(state))
        await self._writer.barrier()

    async def purge(self, caller: Caller, older_than_days: int) -> Purged:
        """Erases closed commands of all projects, created before midnight (UTC) `older_than_days` days ago.

        Returns when the `erased` event is durable; `run` erases the data afterwards. Open commands stay.

        Raises:
            Unavailable: the log could not be written.
        """
        writer = self._writer
        cutoff, count = await self.purgeable(older_than_days)
        writer.tick()  # so that every command closed before this event has an earlier `closed_at`
        at = self._record(Erased(cutoff=cutoff, count=count), "", caller.actor)
        self._live.forget_purged(cutoff, at)
        writer.also(Purge(writer.at, cutoff, at))
        writer.then(self._carry_out, lambda: self._live.remember_purged(cutoff, at))
        await writer.barrier()
        return Purged(cutoff, count)

    async def purgeable(self, older_than_days: int) -> Purged:
        """What such a purge would erase now. Nothing changes."""
        await self._commands.ready()
        cutoff = self._midnight(older_than_days)
        count = await self._writer.storage.read(lambda sql: commands_view.closed_before(sql, cutoff))
        return Purged(cutoff, count)

    async def purge_events(self, caller: Caller, older_than_days: int, *, dry_run: bool) -> Purged:
        """Erases the data of device events of all projects that newer ones had replaced before midnight (UTC)
        `older_than_days` days ago. Each step records the positions and erases them in one transaction.

        Raises:
            Unavailable: the log could not be written; the steps before that one are done.
        """
        await self._commands.ready()
        storage, walk, count = self._writer.storage, replaced.Walk(), 0
        cutoff = self._midnight(older_than_days)
        end = await storage.read(lambda sql: erasing.bound(sql, cutoff))
        while walk.after < end - 1:
            found = await storage.read(lambda sql: walk.step(sql, end))
            count += len(found)
            for first in range(0, 0 if dry_run else len(found), self.batch):
                await self._erase_events(caller, found[first : first + self.batch])
        if count and not dry_run:
            self._carry_out()
        return Purged(cutoff, count)

    async def _erase_events(self, caller: Caller, positions: list[int]) -> None:
        await self._writer.room()
        self._record(Erased(positions=positions, count=len(positions)), "", caller.actor)
        self._writer.also(EraseEvents(tuple(positions)))
        await self._writer.barrier()
        await asyncio.sleep(self.pause_sec)

    def _midnight(self, days_ago: int) -> int:
        now = self._writer.now()
        return now - now % DAY_MS - days_ago * DAY_MS

    def _record(self, event: Erased, project: str, actor: str) -> int:
        pending = self._writer.stage(
            ERASURES, self._version + 1, event, project=project, device_id=None, actor=actor
        )
        self._version += 1
        return pending.decided_at

    # --- in the background ---

    async def finished(self) -> None:
        """Waits until all requested erasures are carried out; used to end cleanly when no broker runs."""
        await self._idle.wait()

    async def run(self) -> None:
        """Carries out purges, for ever, and empties the write-ahead log, which still has the old pages."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._erase()
            await self._forget_old_pages()
            if not self._wake.is_set():
                self._idle.set()

    async def _erase(self) -> None:
        writer = self._writer
        while pending := await writer.storage.read(erasing.purges):
            after: int | None = 0
            while after is not None:
                await writer.opened()
                after = await self._step(pending[0], after)
                await asyncio.sleep(self.pause_sec)

    async def _step(self, purge: Promised, after: int) -> int | None:
        """Erases the next commands of a purge, whole ones, until `batch` rows of the log are reached.

        Returns the position after which the next step begins; None: the purge is finished.
        """
        batch = self.batch
        # What is read here stays as it is: nothing changes a command that a purge covers.
        found = await self._writer.storage.read(lambda sql: commands_view.purgeable(sql, purge, after, batch))
        rows, erased, reached = 0, list[SideRow](), after
        for command in found:
            rows += command.version
            erased.append(Erase(command.id))
            reached = command.position
            if rows >= batch:
                break
        finished = rows < batch
        try:
            self._writer.also(*erased, *([Drop("purges", (purge.position,))] if finished else []))
            await self._writer.barrier()
        except Unavailable:
            return after
        self.erased += len(erased)
        return None if finished else reached

    async def _forget_old_pages(self) -> None:
        while True:
            try:
                if await self._writer.storage.forget_old_pages():
                    return
            except Full as error:
                logger.error("erasing.no_space", error=str(error))
            await asyncio.sleep(AGAIN_SEC)

    def _carry_out(self, erased: int = 0) -> None:
        self.erased += erased
        self._idle.clear()
        self._wake.set()
