"""`ordain backup` and `ordain restore`. Both work directly on the files, also while a broker serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, print_json, settings_of
from broker.operations import backup as backups
from broker.operations.asking import REFUSED, Failed
from broker.operations.backup import Backup, Refused


def backup(to: Path, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Copy the log to a new file and verify the copy. A broker may run meanwhile.

    The backup contains API keys (as digests), the keys that sign grants, device secrets and webhook secrets:
    protect it like the data directory. Data that is erased later stays in the backup.

    Parameters
    ----------
    to
        The file to create.
    """
    settings = settings_of(config, data=data)
    if settings.log:
        do = "pg_basebackup and its write-ahead log, or pg_dump; see docs/how-to/scale-out.md"
        raise Failed(REFUSED, f"a log in PostgreSQL is backed up with the database's own tools: {do}")
    try:
        made = backups.take(Path(settings.data), to)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(made, f"{to}: ", as_json)


def restore(
    source: Path,
    /,
    *,
    yes: Annotated[bool, Parameter(negative="")] = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Restore a backup into a data directory that has no log.

    Shows the API keys in the backup and asks, because these keys then give access to the restored log.

    Commands that were open at the time of the backup are open again, with their old ids. The restored log
    does not know what happened since then. A device that remembers command ids does not execute a command
    twice; a device without ids may.

    Parameters
    ----------
    source
        A file that `ordain backup` created.
    yes
        Do not ask.
    """
    settings = settings_of(config, data=data)
    if settings.log:
        raise Failed(REFUSED, "restore into a data directory, then: ordain migrate --from DIR --to URL")
    directory = Path(settings.data)
    try:
        backups.inspect(source)
        if not yes:
            _ask(source)
        found = backups.restore(source, directory)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(found, f"{directory}: ", as_json)


def _ask(source: Path) -> None:
    """Raises Failed: nobody can be asked, or the answer is not yes."""
    keys = backups.keys_in(source)
    print(f"{source} brings {len(keys)} API keys that will be valid:", file=sys.stderr)
    for key in keys:
        name = "" if key.name is None else f"  {key.name[:64]!r}"
        print(f"  {key.id}  project {key.project}  scopes {key.scopes}{name}", file=sys.stderr)
    if not sys.stdin.isatty():
        raise Failed(REFUSED, "restore asks before it makes these keys valid; say --yes")
    print("Restore it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Failed(REFUSED, "nothing was restored")


def _say(made: Backup, where: str, as_json: bool) -> None:
    if as_json:
        print_json(made._asdict() | {"hash": made.hash.hex()})
    else:
        print(f"{where}log {made.log_id} up to position {made.position}, verified; hash {made.hash.hex()}")
