"""Backup and restore of a log file, also while a broker writes to it.

A backup is a consistent copy of the whole database, so its log is a prefix of the original log. It also
contains the keys, so only the owner may read the file. Data erased before the backup is not in it; data
erased after the backup still is.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.world import DATABASE, back_up, open_file, open_for_reading, part_of, rename_log


class Refused(Exception):
    """The operation was refused; the message says why. Nothing was changed."""


class Backup(NamedTuple):
    """The content of a backup: `position` and `hash` of its last event, `size` in bytes."""

    log_id: str
    position: int
    hash: bytes
    size: int


def take(directory: Path, to: Path) -> Backup:
    """Copies the log of a data directory to a new file, also while a broker runs, and verifies the copy.

    The file gets its final name only when it is complete and synced to the disk.

    Raises:
        Refused: the file already exists, or the copy has a fault.
        Broken: there is no log, or it cannot be read.
        OSError: the file cannot be written.
    """
    if os.path.lexists(to):
        raise Refused(f"{to} already exists; name a new file")
    part = part_of(to)
    try:
        with closing(open_for_reading(directory)) as sql:
            back_up(sql, part)
        made = inspect(part)
        os.link(part, to)  # unlike a rename, it never replaces an existing file
        _sync(to.parent)
    finally:
        part.unlink(missing_ok=True)
    return made


def restore(file: Path, directory: Path) -> Backup:
    """Restores a backup into a data directory without a log. Verifies the backup before it writes anything.

    New events after the restore get positions that the lost log had already used for other events. So the
    restored log gets a new log id, and subscribers do not confuse the two logs.

    Raises:
        Refused: the directory already has a log, or the backup has a fault.
        Broken: the file is not a backup.
        OSError: a file cannot be read or written.
    """
    there = directory / DATABASE
    if there.exists():
        raise Refused(f"{directory} already has a log; restore into another directory")
    found = inspect(file)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = part_of(there)
    try:
        # SQLite copies the database, because a plain file copy would miss pages that are still in the WAL.
        with closing(open_file(file)) as sql:
            back_up(sql, part)
        log_id = rename_log(part)
        os.link(part, there)
        _sync(directory)
    finally:
        part.unlink(missing_ok=True)
    return found._replace(log_id=log_id)


class Brought(NamedTuple):
    """An API key that a restored log would accept. `scopes` are separated by commas."""

    id: str
    project: str
    scopes: str
    name: str | None


def keys_in(file: Path) -> list[Brought]:
    """The valid API keys in a backup. Whoever has one of them has access to the restored log.

    Raises:
        Refused: the backup is damaged.
        Broken: the file is not a backup.
    """
    with closing(open_file(file)) as sql:
        try:
            found = sql.execute(
                "SELECT id, project, scopes, name FROM api_keys WHERE revoked_at IS NULL ORDER BY created_at"
            )
            return [Brought(*row) for row in found.fetchall()]
        except sqlite3.DatabaseError as error:
            raise Refused(f"{file} is damaged: {error}") from error


def inspect(file: Path) -> Backup:
    """Verifies a backup and returns its content.

    Raises:
        Refused: a page, the hash chain, or a row has a fault.
        Broken: the file is not a backup.
    """
    with closing(open_file(file)) as sql:
        try:
            fault = sql.execute("PRAGMA quick_check(1)").fetchone()[0]
            verified = read_now(sql, log.verify)
            log_id = read_now(sql, log.meta, "log_id")
        except sqlite3.DatabaseError as error:
            raise Refused(f"{file} is damaged: {error}") from error
    if fault != "ok":
        raise Refused(f"{file} is damaged: {fault}")
    if verified.fault is not None:
        raise Refused(f"{file} was changed after it was written: {verified.fault}")
    return Backup(log_id, verified.rows, verified.hash, file.stat().st_size)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
