"""`ordain log`: reads the log's file itself, beside whoever writes it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, Text, print_json, settings_of
from broker.cli.progress import Progress
from broker.cli.transfer import export_log, import_log, redecide_command
from broker.domain.events import device_stream
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.operations import checkpoint, transfer
from broker.operations.asking import POLL_SEC, REFUSED, USAGE, Failed
from broker.operations.backup import Refused
from broker.world import DATABASE, compact, open_for_reading
from devices.clock import rfc3339
from projections import devices
from projections.commands import veiled

logs = App(name="log", help="The log: look at it, verify it, take it elsewhere.")
logs.command(export_log, name="export")
logs.command(import_log, name="import")
logs.command(redecide_command, name="redecide")


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
        while page := _page(sql, after):
            after = page[-1].position
            yield from page
        if not follow:
            return
        time.sleep(POLL_SEC)


def _page(sql: sqlite3.Connection, after: int) -> list[Row]:
    sql.execute("BEGIN")  # one state of the rows and of what is to be erased of them
    page = veiled(sql, log.rows(sql, after))
    sql.execute("COMMIT")
    return page


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


@logs.command(name="show")
def show_log(what: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """One event, or all events of one command or device.

    Parameters
    ----------
    what
        A position of the log, a command's id, or a device's id or hardware id.
    """
    with closing(transfer.opened(_directory(config, data))) as sql:
        if what.isascii() and what.isdigit():
            found = [row for row in log.rows(sql, int(what[:18]) - 1, 1) if row.position == int(what)]
        else:
            device = devices.by_name(sql, [what]).get(what)
            found = log.stream(sql, what if device is None else device_stream(device.id))
        for row in veiled(sql, found):
            _show(row, as_json)
    if not found:
        raise Failed(REFUSED, f"no event, command or device {what[:80]!r} is in the log")


@logs.command(name="stats")
def show_stats(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """How much is in the log: events by type and by project, streams, times, bytes."""
    directory = _directory(config, data)
    with closing(transfer.opened(directory)) as sql:
        found = transfer.stats(sql)
    found["bytes"] = {path.name: path.stat().st_size for path in sorted(directory.glob(f"{DATABASE}*"))}
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name.replace('_', ' ')}:")
            for part, amount in value.items():
                print(f"  {part or '(the broker)':24} {amount:>15,}")
        else:
            print(f"{name.replace('_', ' '):26} {f'{value:,}' if isinstance(value, int) else value:>15}")


@logs.command(name="compact")
def compact_log(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Give the space of what was erased back to the disk; removes no event. Only while no broker serves.

    It needs twice the size of what remains as free space meanwhile.
    """
    before, after = compact(_directory(config, data))
    if as_json:
        print_json({"before": before, "after": after})
    else:
        print(f"{before:,} bytes before, {after:,} after")


@logs.command(name="checkpoint")
def make_checkpoint(
    *,
    to: Annotated[Path | None, Parameter(negative="")] = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """State how far the log has come and what its last hash is, signed, for somebody else to keep.

    Parameters
    ----------
    to
        The file to make; else standard output.
    """
    with closing(transfer.opened(_directory(config, data))) as sql, refusing():
        text = checkpoint.sign(sql)
        if to is not None or not as_json:
            with transfer.new_file(to) as file:
                file.write(text.encode() + b"\n")
    if as_json:
        made = checkpoint.read(text.encode())
        said = msgspec.to_builtins(made.claims)
        print_json(said | {"kid": made.kid, "thumbprint": made.thumbprint, "checkpoint": text})


@logs.command(name="verify")
def verify_log(
    *,
    against: Annotated[Path | None, Parameter(negative="")] = None,
    key: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Walk the whole hash chain; exit 0 only if every row is as it was written.

    Parameters
    ----------
    against
        A checkpoint that was kept: the log must have been what it says, and gone on from there.
    key
        The thumbprint of the key that must have signed it, as you noted it.
    """
    if key is not None and against is None:
        raise Failed(USAGE, "--key: belongs to --against, and that is not given")
    with closing(transfer.opened(_directory(config, data))) as sql, refusing():
        said = None if against is None else checkpoint.read(against.read_bytes())
        if said is not None and key not in (None, said.thumbprint):
            raise Failed(REFUSED, f"{against} is signed by {said.kid} ({said.thumbprint}), not by {key}")
        fault = None if said is None else checkpoint.contradiction(sql, said.claims)
        found = log.verify(sql, Progress(log.head(sql).position))
    fault = fault or found.fault
    if as_json:
        shown = {"rows": found.rows, "hash": found.hash.hex(), "fault": fault}
        if said is not None:
            shown["checkpoint"] = msgspec.to_builtins(said.claims) | {
                "kid": said.kid,
                "thumbprint": said.thumbprint,
            }
        print_json(shown)
    elif fault is None:
        print(f"{found.rows} events, no fault; the last hash is {found.hash.hex()}")
        if said is not None:
            claims = said.claims
            print(f"it goes on from the checkpoint at position {claims.position} of {claims.recorded_at}")
            print(f"signed by {said.kid}, thumbprint {said.thumbprint}")
    if fault is not None:
        raise Failed(REFUSED, fault)


def _directory(config: str | None, data: str | None) -> Path:
    return Path(settings_of(config, data=data).data)


@contextmanager
def refusing() -> Iterator[None]:
    """What cannot be done ends the command with its sentence."""
    try:
        yield
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
