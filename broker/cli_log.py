"""`ordain log`: reads the log's file itself, beside whoever writes it, and can change nothing."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from broker.cli_base import POLL_SEC, REFUSED, USAGE, Config, Data, Failed, Json, print_json, settings_of
from broker.cli_transfer import export_log, import_log
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.world import open_for_reading
from devices.clock import rfc3339
from projections.commands import veiled

logs = App(name="log", help="The log: look at it, verify it, take it elsewhere.")
logs.command(export_log, name="export")
logs.command(import_log, name="import")


@logs.command(name="tail")
def tail_log(
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False,
    lines: Annotated[int, Parameter(name=["--lines", "-n"])] = 10,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """The last events.

    Parameters
    ----------
    follow
        Go on with new ones as they come.
    lines
        How many to begin with.
    """
    if lines < 0:
        raise Failed(USAGE, f"--lines = {lines}: must not be negative")
    with closing(open_for_reading(Path(settings_of(config, data=data).data))) as sql:
        after = max(0, log.head(sql).position - lines)
        for row in _following(sql, after, follow):
            _show(row, as_json)


def _following(sql: sqlite3.Connection, after: int, follow: bool) -> Iterator[Row]:
    while True:
        while page := veiled(sql, log.rows(sql, after)):
            after = page[-1].position
            yield from page
        if not follow:
            return
        time.sleep(POLL_SEC)


def _show(row: Row, as_json: bool) -> None:
    data = msgspec.Raw(row.data) if row.data is not None else msgspec.Raw(b"null")
    if as_json:
        shown = {"position": row.position, "recorded_at": rfc3339(row.recorded_at), "stream": row.stream}
        shown |= {
            "version": row.version,
            "type": row.type,
            "project": row.project,
            "device_id": row.device_id,
        }
        print_json(shown | {"actor": row.actor, "data": data})
    else:
        text = "(erased)" if row.data is None else row.data.decode()
        print(
            row.position,
            rfc3339(row.recorded_at),
            row.stream,
            f"v{row.version}",
            row.type,
            row.actor,
            text,
            flush=True,
        )


@logs.command(name="verify")
def verify_log(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Walk the whole hash chain; exit 0 only if every row is as it was written."""
    with closing(open_for_reading(Path(settings_of(config, data=data).data))) as sql:
        sql.execute("BEGIN")  # one state of the log, whatever is appended meanwhile
        found = log.verify(sql)
    if as_json:
        print_json({"rows": found.rows, "hash": found.hash.hex(), "fault": found.fault})
    elif found.fault is None:
        print(f"{found.rows} events, no fault; the last hash is {found.hash.hex()}")
    if found.fault is not None:
        raise Failed(REFUSED, found.fault)
