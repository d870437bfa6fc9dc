"""`ordain projections`: verify and rebuild the projections of the log, and run your own."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, Progress, print_json, print_table, settings_of
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.opening import open_log, open_to_read, snapshot
from broker.operations.asking import POLL_SEC, REFUSED, USAGE, Failed
from broker.operations.own_projection import OwnProjection, Wrong
from projections import follower

projections = App(name="projections", help="Projections: tables that are computed from the log.")


@projections.command(name="run")
def run_projection(
    file: Path,
    /,
    *,
    into: Path | None = None,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Run a projection of your own on every event of the log, and print its rows.

    Parameters
    ----------
    file
        A Python file that defines TABLES, apply, COLUMNS and rows; see docs/how-to/write-a-projection.md.
    into
        A file for the projection's database, so that the next run continues there; else every run starts
        with the first event.
    follow
        Continue with new events, and print the rows again when they change.
    """
    settings = settings_of(config, data=data)
    with tempfile.TemporaryDirectory() as scratch, closing(open_to_read(settings)) as source:
        try:
            projection = OwnProjection(file)
            with closing(projection.open(into or Path(scratch) / "own.db")) as sql:
                shown = None
                while True:
                    while projection.follow(source, sql):
                        pass
                    rows = projection.rows(sql)
                    if rows != shown:
                        _show(projection, rows, as_json)
                    shown = rows
                    if not follow:
                        return
                    time.sleep(POLL_SEC)
        except Wrong as error:
            raise Failed(USAGE, str(error)) from error


def _show(projection: OwnProjection, rows: list[tuple[object, ...]], as_json: bool) -> None:
    if as_json:
        print_json([dict(zip(projection.columns, row, strict=False)) for row in rows])
    else:
        print_table(projection.columns, [tuple(map(str, row)) for row in rows])


@projections.command(name="verify")
def verify_projections(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Compute all projections again and compare them. A broker may run. Exit 0 only if they are the same."""
    with closing(snapshot(settings_of(config, data=data))) as kept:
        rows = read_now(kept, log.head).position
        fault = read_now(kept, follower.fault, Progress(rows))
    if as_json:
        print_json({"events": rows, "fault": fault})
    elif fault is None:
        print(f"the projections match the log, {rows} events")
    if fault is not None:
        raise Failed(REFUSED, fault)


@projections.command(name="rebuild")
def rebuild_projections(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Delete all projections and compute them again. Stop the broker first."""
    settings = settings_of(config, data=data)
    with closing(open_to_read(settings)):
        pass  # checks that there is a log, because opening it for writing would create one

    async def rebuilding() -> int:
        storage = await open_log(settings)
        try:
            await storage.prepare("", "")  # a log has its id and its key already
            await storage.rebuild()
            return (await storage.read(log.head)).position
        finally:
            await storage.close()

    events = uvloop.run(rebuilding())
    if as_json:
        print_json({"events": events})
    else:
        print(f"the projections were rebuilt from {events} events")
