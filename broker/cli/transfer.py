"""`ordain log export`, `import` and `redecide`, and `ordain migrate`: the log in other forms and places."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, Progress, Text, print_json, settings_of
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.log_url import address
from broker.opening import snapshot
from broker.operations import transfer
from broker.operations.asking import REFUSED, USAGE, Failed
from broker.operations.backup import Refused
from broker.operations.redecide import redecide
from broker.operations.transfer import Moved, Only
from broker.seams import Readable
from broker.settings import password_of
from broker.world import open_for_reading
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
    """Write a snapshot of the log as JSON Lines. A broker may run meanwhile.

    It has all columns, bytes as base64, in order of position. It contains only the log: no API keys, no
    signing keys, no secrets, no idempotency keys. A filtered export cannot be imported.

    Parameters
    ----------
    to
        The file to create; else standard output.
    project
        Only events of this project.
    device
        Only events of this device and its commands: id or hardware id.
    type
        Only events of this type, such as created.
    command
        Only the events that influenced this one command; for ordain log redecide.
    since
        From this position or RFC 3339 time on.
    until
        Up to this position or RFC 3339 time.
    """
    with closing(snapshot(settings_of(config, data=data))) as sql:
        first = None if since is None else _point(sql, "--since", since, first=True)
        last = None if until is None else _point(sql, "--until", until, first=False)
        if command is not None and any((project, device, type, since, until)):
            raise Failed(USAGE, "--command: cannot be combined with other filters")
        only = Only(project=project, device=device, type=type, since=first, until=last)
        try:
            if command is not None:
                moved = transfer.export_command(sql, to, command)
            else:
                moved = transfer.export(sql, to, only, Progress(read_now(sql, log.head).position))
        except Refused as error:
            raise Failed(REFUSED, str(error)) from error
    if to is not None:
        part = "; this is only part of the log, so it cannot be imported" if any(only) or command else ""
        _say(moved, f"{to}: {moved.rows} events of", part, as_json)


def import_log(
    *,
    from_: Annotated[Path, Parameter(name="--from")],
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Import an export into a data directory that has no log. The new log is identical, byte for byte.

    Every row is verified, and the projections are computed. An export has no API keys, signing keys, device
    secrets and idempotency keys: create new ones.

    Parameters
    ----------
    from_
        A file that `ordain log export` created, without a filter.
    """
    progress: list[Progress] = []

    def reached(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(total))
        progress[0](done)

    settings = settings_of(config, data=data)
    if settings.log:
        raise Failed(USAGE, "import into a data directory, and move that: ordain migrate --from DIR --to URL")
    directory = Path(settings.data)
    try:
        moved = transfer.bring_in(from_, directory, reached)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(moved, f"{directory}:", "", as_json)


def migrate(
    *,
    from_: Annotated[Path, Parameter(name="--from")],
    to: str,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Move the log of a data directory into an empty PostgreSQL database. Stop the broker first.

    Log id, positions and hashes stay, and everything beside the log moves too: API keys, signing keys, device
    secrets, webhooks. The copy is verified. The directory is then marked as moved: no broker serves it again.
    Keep its file key.pepper: the digests of API keys need it.

    Parameters
    ----------
    from_
        The data directory.
    to
        The database: postgresql://user@host/database.
    """
    import uvloop

    from broker.operations.migrate import migrate as move  # the driver of PostgreSQL takes a while to load

    try:
        where = address(to, password_of(settings_of(config)))
    except ValueError as error:  # do not show the URL: it may contain a password
        raise Failed(USAGE, f"--to: {error}") from error
    with closing(open_for_reading(from_)) as source:
        progress = Progress(read_now(source, log.head).position)
    try:
        moved = uvloop.run(move(from_, where, progress))
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    if as_json:
        print_json(moved._asdict() | {"hash": moved.hash.hex()})
    else:
        print(
            f"{where.shown}: log {moved.log_id} up to position {moved.position}, verified; "
            f"hash {moved.hash.hex()}"
        )


def redecide_command(source: Path, /, *, as_json: Json = False) -> None:
    """Repeat the broker's decisions about one command, and compare. Exit 0 only if all are the same.

    For each event, the request that led to it is rebuilt, and the broker's own functions decide again at the
    recorded time: the state table, the timers, and the device's lane. Some inputs are not in the log, so they
    are not checked: random draws, the time when bytes were written, and whether an attempt still counted.

    Parameters
    ----------
    source
        A file that `ordain log export --command ID` created.
    """
    try:
        command, events = transfer.read_command(source)
        since = min(event.position for event in events if event.stream == command)
        steps = list(redecide(events, since))
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise Failed(REFUSED, f"{source}: its events do not follow from each other ({why})") from error
    for recorded, asked, fault in steps:
        shown = {"position": recorded.position, "recorded_at": rfc3339(recorded.recorded_at)}
        shown |= {"command_id": recorded.stream, "type": recorded.type, "input": asked.value, "fault": fault}
        if as_json:
            print_json(shown)
        else:
            print(*[value for name, value in shown.items() if name != "fault"], fault or "the same", sep="  ")
    faults = [step.recorded.position for step in steps if step.fault is not None]
    if faults:
        raise Failed(REFUSED, f"position {faults[0]} would be decided differently ({len(faults)} in all)")


def _say(moved: Moved, where: str, more: str, as_json: bool) -> None:
    if as_json:
        print_json(moved._asdict() | {"hash": moved.hash.hex()})
    else:
        print(f"{where} log {moved.log_id} up to position {moved.position}; hash {moved.hash.hex()}{more}")


def _point(sql: Readable, option: str, text: str, *, first: bool) -> int:
    """The position that an option names. For a time: the first event at or after it (`first`), or the last
    event up to it."""
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    try:
        at = parse_rfc3339(text)
    except ValueError as error:
        raise Failed(USAGE, f"{option} = {text!r}: must be a position or an RFC 3339 time") from error
    return read_now(sql, log.place, at - 1) + 1 if first else read_now(sql, log.place, at)
