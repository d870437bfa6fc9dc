"""Verifying the log while the broker serves: a walk along the chain, in small pages beside all other work.

Only looks. Nothing is ever decided on what it finds; people are told.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from broker.engine.writer import Writer
from broker.log import sqlite as log
from broker.seams import Broken

# A page takes a few milliseconds of the one process; whoever waits for a command waits no longer than that.
PAGE_ROWS = 500
PAUSE_SEC = 0.002


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How far it has come, and what it found. Times in ms. `of`: where the log ended at the start.

    `unread`: the storage failed on the way; `fault` says how.
    """

    state: Literal["running", "good", "bad", "unread"]
    rows: int
    of: int
    started_at: int
    finished_at: int | None = None
    fault: str | None = None


class Verification:
    """One walk at a time. `report` is the last one's, also while it runs; None before the first."""

    def __init__(self, writer: Writer) -> None:
        self.report: Report | None = None
        self._writer = writer
        self._asked = asyncio.Event()

    def start(self) -> Report:
        """Begins, unless it is under way."""
        if self.report is None or self.report.state != "running":
            writer = self._writer
            self.report = Report(state="running", rows=0, of=writer.durable, started_at=writer.now())
            self._asked.set()
        assert self.report is not None
        return self.report

    async def run(self) -> None:
        """Walks whenever it is asked to, for ever."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self._walk()

    async def _walk(self) -> None:
        walk, storage = log.Walk(), self._writer.storage
        begun = self.start()
        fault, more = None, True
        while more:
            try:
                more = await storage.read(lambda sql: walk.step(sql, PAGE_ROWS))
            except Broken as error:
                fault, more = str(error), False
            self.report = msgspec.structs.replace(begun, rows=walk.rows, of=max(begun.of, walk.rows))
            await asyncio.sleep(PAUSE_SEC)
        self.report = msgspec.structs.replace(
            self.report or begun,
            state="unread" if fault else "bad" if walk.fault else "good",
            finished_at=self._writer.now(),
            fault=fault or walk.fault,
        )
