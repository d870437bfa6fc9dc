"""`ordain migrate`: moves the log of a data directory into PostgreSQL."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import Parameter

from broker.cli.base import Config, Json, Progress, print_json, settings_of
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.log_url import address
from broker.operations.asking import REFUSED, USAGE, Failed
from broker.operations.backup import Refused
from broker.operations.migrate import migrate as move
from broker.settings import password_of
from broker.world import open_for_reading


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
