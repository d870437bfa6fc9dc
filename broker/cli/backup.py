"""`ordain backup` and `ordain restore`: both work on files themselves, beside whoever serves."""

from __future__ import annotations

from pathlib import Path

from broker.cli.base import Config, Data, Json, print_json, settings_of
from broker.operations import backup as backups
from broker.operations.asking import REFUSED, Failed
from broker.operations.backup import Backup, Refused


def backup(to: Path, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Copy the log to a new file, while a broker serves it or not, and verify the copy.

    It holds API keys (as digests), the keys that grants are signed with, devices' secrets and webhooks'
    secrets: keep it like the data directory. What is erased later stays in it.

    Parameters
    ----------
    to
        The file to make.
    """
    try:
        made = backups.take(Path(settings_of(config, data=data).data), to)
    except Refused as error:
        raise Failed(REFUSED, str(error)) from error
    _say(made, f"{to}: ", as_json)


def restore(source: Path, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Put a backup in the place of a log that is not there.

    Commands that were open then are open again, under their old ids, and what happened since is not known:
    a device that remembers ids does not do one twice, a device without ids may.

    Parameters
    ----------
    source
        A file that `ordain backup` made.
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
