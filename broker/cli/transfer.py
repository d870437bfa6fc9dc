"""`ordain log export` and `import`: the log as JSON Lines, and the way back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, Text, print_json, settings_of
from broker.cli.progress import Progress
from broker.log import sqlite as log
from broker.operations import transfer
from broker.operations.asking import REFUSED, USAGE, Failed
from broker.operations.backup import Refused
from broker.operations.redecide import redecide
from broker.operations.transfer import Moved, Only
from broker.seams import Sql
from devices.clock import parse_rfc3339, rfc3339


def export_log(
    *,
    to: Annotated[Path | None, Parameter(negative="")] = None,
    project: Text = None,
    device: Text = None,
    type: Text = None,
    command: Text = None,
    since: Text = None,
    until: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the log as JSON Lines, one state of it, beside a running broker or without one.

    All columns, bytes as base64, in order of position. Only the log: no API keys, no signing keys, no
    secrets, no idempotency keys. With a filter it is for reading, and cannot be imported.

    Parameters
    ----------
    to
        The file to make; else standard output.
    project
        Only events of this project.
    device
        Only events of this device and its commands: id or hardware id.
    type
        Only events of this type, such as created.
    command
        All that this one command was decided on, and nothing else; for ordain log redecide.
    since
        From this position or RFC 3339 time on.
    until
        Up to this position or RFC 3339 time.
    """
    with closing(transfer.opened(Path(settings_of(config, data=data).data))) as sql:
        first = None if since is None else _point(sql, "--since", since, first=True)
        last = None if until is None else _point(sql, "--until", until, first=False)
        if command is not None and any((project, device, type, since, until)):
            raise Failed(USAGE, "--command: stands alone; it chooses what it needs by itself")
        only = Only(project=project, device=device, type=type, since=first, until=last)
        try:
            if command is not None:
                moved = transfer.export_command(sql, to, command)
            else:
                moved = transfer.export(sql, to, only, Progress(log.head(sql).position))
        except Refused as error:
            raise Failed(REFUSED, str(error)) from error
    if to is not None:
        part = " Only a part of it was asked for, so it cannot be imported." if any(only) or command else ""
        _say(moved, f"{to}: {moved.rows} events of", part, as_json)


def import_log(
    *,
    from_: Annotated[Path, Parameter(name="--from")],
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make the log of a data directory that has none out of an export; it is the same log, to the byte.

    Every row is verified, and the projections are computed. API keys, signing keys, device secrets and
    idempotency keys are not in an export: make new ones.

    Parameters
    ----------
    from_
        A file that `ordain log export` made, without a filter.
    """
    progress: list[Progress] = []

    def reached(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(total))
        progress[0](done)

    directory = Path(settings_of(config, data=data).data)
    try:
        moved = transfer.bring_in(from_, directory, reached)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(moved, f"{directory}:", "", as_json)


def redecide_command(source: Path, /, *, as_json: Json = False) -> None:
    """Decide again, on a virtual clock, what was decided about one command; exit 0 if all comes out the same.

    For each event the request that led to it is put together, and the broker's own functions are asked at the
    recorded time: the table of the life of a command, its timers, and whether its lane let it go. Not in the
    log, so not decided again: draws of chance, when bytes were written, whether an attempt still counted.

    Parameters
    ----------
    source
        A file that `ordain log export --command ID` made.
    """
    try:
        command, events = transfer.read_command(source)
        since = min(event.position for event in events if event.stream == command)
        steps = list(redecide(events, since))
    except (Refused, ValueError, KeyError) as error:
        raise Failed(REFUSED, f"{source}: {error}") from error
    for recorded, asked, fault in steps:
        shown = {"position": recorded.position, "recorded_at": rfc3339(recorded.recorded_at)}
        shown |= {"command_id": recorded.stream, "type": recorded.type, "input": asked.value, "fault": fault}
        if as_json:
            print_json(shown)
        else:
            print(*[value for name, value in shown.items() if name != "fault"], fault or "the same", sep="  ")
    faults = [step.recorded.position for step in steps if step.fault is not None]
    if faults:
        raise Failed(REFUSED, f"position {faults[0]} would be decided otherwise ({len(faults)} in all)")


def _say(moved: Moved, where: str, more: str, as_json: bool) -> None:
    if as_json:
        print_json(moved._asdict() | {"hash": moved.hash.hex()})
    else:
        print(f"{where} log {moved.log_id} up to position {moved.position}; hash {moved.hash.hex()}{more}")


def _point(sql: Sql, option: str, text: str, *, first: bool) -> int:
    """The position that is meant by a position or a time: the first at or after it, or the last before."""
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    try:
        at = parse_rfc3339(text)
    except ValueError as error:
        raise Failed(USAGE, f"{option} = {text!r}: must be a position or an RFC 3339 time") from error
    return log.place(sql, at - 1) + 1 if first else log.place(sql, at)
