"""`ordain backup` and `ordain restore`. Both work directly on the files, also while a broker serves."""

from __future__ import annotations

from pathlib import Path

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
    try:
        made = backups.take(Path(settings_of(config, data=data).data), to)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(made, f"{to}: ", as_json)


def restore(source: Path, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Restore a backup into a data directory that has no log.

    Commands that were open at the time of the backup are open again, with their old ids. The restored log
    does not know what happened since then. A device that remembers command ids does not execute a command
    twice; a device without ids may.

    Parameters
    ----------
    source
        A file that `ordain backup` created.
    """
    directory = Path(settings_of(config, data=data).data)
    try:
        found = backups.restore(source, directory)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(found, f"{directory}: ", as_json)


def _say(made: Backup, where: str, as_json: bool) -> None:
    if as_json:
        print_json(made._asdict() | {"hash": made.hash.hex()})
    else:
        print(f"{where}log {made.log_id} up to position {made.position}, verified; hash {made.hash.hex()}")
