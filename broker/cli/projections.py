"""`ordain projections`: what is computed from the log, whether it is right, and how to compute more."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, print_json, print_table, settings_of
from broker.cli.progress import Progress
from broker.log import sqlite as log
from broker.operations.asking import POLL_SEC, REFUSED, USAGE, Failed
from broker.operations.own_projection import OwnProjection, Wrong
from broker.world import SqliteStorage, open_for_reading
from projections import follower

projections = App(name="projections", help="What is computed from the log.")


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
    """Give every event of the log to a projection of your own, and print what it shows.

    Parameters
    ----------
    file
        A Python file that defines TABLES, apply, COLUMNS and rows; see docs/projections.md.
    into
        Where to keep what it has computed, to go on from there; else all of history is taken in anew.
    follow
        Go on with new events as they come, and print again when something has changed.
    """
    directory = Path(settings_of(config, data=data).data)
    with tempfile.TemporaryDirectory() as scratch, closing(open_for_reading(directory)) as source:
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
    """Compute all projections anew, also beside a broker, and compare; exit 0 only if they are the same."""
    directory = Path(settings_of(config, data=data).data)
    with closing(open_for_reading(directory)) as kept:
        kept.execute("BEGIN")  # one state of log and projections, whatever is recorded meanwhile
        rows = log.head(kept).position
        fault = follower.fault(kept, Progress(rows))
    if as_json:
        print_json({"events": rows, "fault": fault})
    elif fault is None:
        print(f"the projections are what follows from {rows} events")
    if fault is not None:
        raise Failed(REFUSED, fault)


@projections.command(name="rebuild")
def rebuild_projections(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Drop all projections and compute them anew. Only while no broker serves."""
    directory = Path(settings_of(config, data=data).data)
    with closing(open_for_reading(directory)):
        pass  # there is a log: opening for writing would make one

    async def rebuilding() -> int:
        storage = await SqliteStorage.open(directory)
        try:
            await storage.write(follower.renew)
            return (await storage.read(log.head)).position
        finally:
            await storage.close()

    events = uvloop.run(rebuilding())
    if as_json:
        print_json({"events": events})
    else:
        print(f"the projections are made anew from {events} events")
