"""`ordain log`: reads the log file directly, also while a broker writes to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, Progress, Text, escaped, print_json, settings_of
from broker.cli.transfer import export_log, import_log, redecide_command
from broker.domain.events import device_stream
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.opening import open_to_read, snapshot, space
from broker.operations import checkpoint, transfer
from broker.operations.asking import POLL_SEC, REFUSED, USAGE, Failed
from broker.operations.backup import Refused
from broker.seams import Readable
from broker.world import compact
from devices.clock import rfc3339
from projections import devices
from projections.commands import veiled

logs = App(name="log", help="The log: read, verify, export, import.")
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
    """Show the last events.

    Parameters
    ----------
    follow
        Also show new events as they are recorded.
    lines
        How many past events to show.
    """
    if lines < 0:
        raise Failed(USAGE, f"--lines = {lines}: must not be negative")
    with closing(open_to_read(settings_of(config, data=data))) as sql:
        after = max(0, read_now(sql, log.head).position - lines)
        for row in _following(sql, after, follow):
            _show(row, as_json)


def _following(sql: Readable, after: int, follow: bool) -> Iterator[Row]:
    while True:
        while page := _page(sql, after):
            after = page[-1].position
            yield from page
        if not follow:
            return
        time.sleep(POLL_SEC)


def _page(sql: Readable, after: int) -> list[Row]:
    sql.execute("BEGIN")  # one snapshot of the rows and of the pending erasures
    page = read_now(sql, veiled, read_now(sql, log.rows, after))
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
            escaped(text),
            flush=True,
        )


@logs.command(name="show")
def show_log(what: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Show one event, or all events of one command or device.

    Parameters
    ----------
    what
        A position of the log, a command's id, or a device's id or hardware id.
    """
    with closing(snapshot(settings_of(config, data=data))) as sql:
        if what.isascii() and what.isdigit():
            found = [
                row for row in read_now(sql, log.rows, int(what[:18]) - 1, 1) if row.position == int(what)
            ]
        else:
            device = read_now(sql, devices.by_name, [what]).get(what)
            found = read_now(sql, log.stream, what if device is None else device_stream(device.id))
        for row in read_now(sql, veiled, found):
            _show(row, as_json)
    if not found:
        raise Failed(REFUSED, f"the log has no event, command or device {what[:80]!r}")


@logs.command(name="stats")
def show_stats(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Show statistics of the log: events by type and by project, streams, times, bytes."""
    settings = settings_of(config, data=data)
    with closing(snapshot(settings)) as sql:
        found = transfer.stats(sql) | space(settings, sql)
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
    """Return the disk space of erased data to the file system. Removes no event. Stop the broker first.

    It temporarily needs free disk space of twice the remaining size.
    """
    settings = settings_of(config, data=data)
    if settings.log:
        raise Failed(REFUSED, "PostgreSQL gives space back itself (VACUUM): there is nothing to compact here")
    before, after = compact(Path(settings.data))
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
    """Write a checkpoint: a signed statement of the log's last position and last hash. Keep it elsewhere.

    Parameters
    ----------
    to
        The file to create; else standard output.
    """
    with closing(snapshot(settings_of(config, data=data))) as sql, refusing():
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
    """Verify the whole hash chain. The exit code is 0 only if no row was changed.

    Parameters
    ----------
    against
        A checkpoint file: the log must contain its position with its hash.
    key
        The thumbprint of the key that must have signed the checkpoint.
    """
    if key is not None and against is None:
        raise Failed(USAGE, "--key: needs --against as well")
    with closing(snapshot(settings_of(config, data=data))) as sql, refusing():
        said = None if against is None else checkpoint.read(against.read_bytes())
        if said is not None and key not in (None, said.thumbprint):
            raise Failed(REFUSED, f"{against} is signed by {said.kid} ({said.thumbprint}), not by {key}")
        fault = None if said is None else checkpoint.contradiction(sql, said.claims)
        found = read_now(sql, log.verify, Progress(read_now(sql, log.head).position))
    fault = fault or found.fault
    if as_json:
        shown = {"rows": found.rows, "hash": found.hash.hex(), "fault": fault, "erased_later": found.later}
        if said is not None:
            shown["checkpoint"] = msgspec.to_builtins(said.claims) | {
                "kid": said.kid,
                "thumbprint": said.thumbprint,
            }
        print_json(shown)
    elif fault is None:
        print(f"{found.rows} events, no fault; the last hash is {found.hash.hex()}")
        if found.later:
            print(f"it is a copy; in {found.later} of them the original log erased the data later")
        if said is not None:
            claims = said.claims
            print(f"it continues the checkpoint at position {claims.position} of {claims.recorded_at}")
            print(f"signed by {said.kid}, thumbprint {said.thumbprint}")
    if fault is not None:
        raise Failed(REFUSED, fault)


@contextmanager
def refusing() -> Iterator[None]:
    """Turns `Refused` into `Failed`, which ends the command with its message and exit code 1."""
    try:
        yield
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
