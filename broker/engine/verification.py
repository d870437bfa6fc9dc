"""Verifies the hash chain of the log while the broker serves, a small page at a time.

It only reads. The result is shown to operators; the broker decides nothing with it.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from broker.engine.writer import Writer
from broker.log import sqlite as log
from broker.seams import Broken

# A page takes a few milliseconds of CPU. Requests wait no longer than that for it.
PAGE_ROWS = 500
PAUSE_SEC = 0.002


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Progress or result of a verification. Times in ms. `of`: the last position when it started.

    `unread`: the storage failed before the end; `fault` says how.
    """

    state: Literal["running", "good", "bad", "unread"]
    rows: int
    of: int
    started_at: int
    finished_at: int | None = None
    fault: str | None = None


class Verification:
    """Runs one verification at a time. `report`: of the running or the last one; None before the first."""

    def __init__(self, writer: Writer) -> None:
        self.report: Report | None = None
        self._writer = writer
        self._asked = asyncio.Event()

    def start(self) -> Report:
        """Starts a verification, unless one is running."""
        if self.report is None or self.report.state != "running":
            writer = self._writer
            self.report = Report(state="running", rows=0, of=writer.durable, started_at=writer.now())
            self._asked.set()
        assert self.report is not None
        return self.report

    async def run(self) -> None:
        """Waits for `start` and verifies, until cancelled."""
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
