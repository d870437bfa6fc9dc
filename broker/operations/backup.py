"""Backups: a copy of a log's file taken while a broker writes it, and the way back.

A backup is one state of the whole database, so its log is a prefix of the log it was taken of. It
holds the keys too, so it is the owner's alone. What erasing took away before the backup is not in it,
what is erased afterwards is.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from broker.log import sqlite as log
from broker.world import DATABASE, back_up, open_file, open_for_reading, rename_log


class Refused(Exception):
    """The backup or the restore was not made; the message says why. Nothing was changed."""


class Backup(NamedTuple):
    """What a backup holds: `position` and `hash` of its last event, `size` in bytes."""

    log_id: str
    position: int
    hash: bytes
    size: int


def take(directory: Path, to: Path) -> Backup:
    """Copies the log of a data directory to a new file, beside whoever writes it, and verifies the copy.

    The file appears under its name only when it is whole and on the disk.

    Raises:
        Refused: the file is there already, or what was copied has a fault.
        Broken: there is no log, or it cannot be read.
        OSError: the file cannot be written.
    """
    if to.exists():
        raise Refused(f"{to} is there already; name a new file")
    part = to.with_name(f"{to.name}.part")
    try:
        with closing(open_for_reading(directory)) as sql:
            back_up(sql, part)
        made = inspect(part)
        os.link(part, to)  # unlike a rename, it takes nobody's place
        _sync(to.parent)
    finally:
        part.unlink(missing_ok=True)
    return made


def restore(file: Path, directory: Path) -> Backup:
    """Puts a backup in the place of a log that is not there; verified before anything is written.

    What is recorded from then on takes positions that the lost log had given to other events. So the
    restored log gets an id of its own: no subscriber takes the one for the other.

    Raises:
        Refused: the directory has a log, or the backup has a fault.
        Broken: it is no backup.
        OSError: it cannot be read or written.
    """
    there = directory / DATABASE
    if there.exists():
        raise Refused(f"{directory} has a log already; restore into another directory")
    found = inspect(file)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = directory / f"{DATABASE}.part"
    try:
        # Not byte by byte: while somebody has it open, what was written last lies in another file beside it.
        with closing(open_file(file)) as sql:
            back_up(sql, part)
        log_id = rename_log(part)
        os.link(part, there)
        _sync(directory)
    finally:
        part.unlink(missing_ok=True)
    return found._replace(log_id=log_id)


def inspect(file: Path) -> Backup:
    """What a backup holds.

    Raises:
        Refused: a page, the chain, or a row has a fault.
        Broken: it is no backup.
    """
    with closing(open_file(file)) as sql:
        try:
            fault = sql.execute("PRAGMA quick_check(1)").fetchone()[0]
            verified = log.verify(sql)
            log_id = log.meta(sql, "log_id")
        except sqlite3.DatabaseError as error:
            raise Refused(f"{file} is damaged: {error}") from error
    if fault != "ok":
        raise Refused(f"{file} is damaged: {fault}")
    if verified.fault is not None:
        raise Refused(f"{file} is not what was written: {verified.fault}")
    return Backup(log_id, verified.rows, verified.hash, file.stat().st_size)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
