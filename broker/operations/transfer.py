"""A log as a file of JSON Lines, and such a file as a log again, the same to the byte.

Only the log goes over. What lies beside it does not: API keys, the keys that grants are signed with,
secrets of devices and webhooks, idempotency keys, answers that fitted nothing.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from broker.domain.events import SYSTEM, Created, Recorded, definition_stream, device_stream
from broker.log import chain, lines
from broker.log import sqlite as log
from broker.log.chain import Row
from broker.log.lines import Header
from broker.operations.backup import Refused
from broker.seams import Sql
from broker.world import DATABASE, SystemEntropy, open_for_reading
from devices.clock import rfc3339
from projections import devices, follower
from projections.commands import HIDDEN, veiled

PAGE = 5_000
Reached = Callable[[int], None]


class Moved(NamedTuple):
    """`rows` were written or read; `position` and `hash` are of the last row of the log."""

    log_id: str
    rows: int
    position: int
    hash: bytes


class Only(NamedTuple):
    """What of a log is wanted; None: any. `since` and `until` are positions, both included."""

    project: str | None = None
    device: str | None = None
    type: str | None = None
    since: int | None = None
    until: int | None = None

    def named(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._asdict().items() if value is not None}


def export(sql: sqlite3.Connection, to: Path | None, only: Only, reached: Reached) -> Moved:
    """Writes the rows that are wanted to a new file, or to standard output, as they are in this transaction.

    Raises:
        Refused: the file is there already, or no such device is known.
        OSError: it cannot be written.
    """
    head, log_id, count = log.head(sql), log.meta(sql, "log_id"), 0
    header = Header(log_id=log_id, position=head.position, hash=head.hash, only=only.named())
    with new_file(to) as file:
        file.write(lines.header_line(header) + b"\n")
        for page in _pages(sql, only):
            file.writelines(lines.as_line(row) + b"\n" for row in veiled(sql, page))
            count += len(page)
            reached(page[-1].position)
    return Moved(log_id, count, head.position, head.hash)


def _pages(sql: sqlite3.Connection, only: Only) -> Iterator[list[Row]]:
    where, values = "", list[Any]()
    for column, value in (("project", only.project), ("type", only.type)):
        if value is not None:
            where += f" AND {column} = ?"
            values.append(value)
    if only.device is not None:
        device = devices.by_name(sql, [only.device]).get(only.device)
        if device is None:
            raise Refused(f"no device {only.device!r} is known")
        where += " AND device_id = ?"
        values.append(device.id)
    after = 0 if only.since is None else only.since - 1
    until = log.LAST if only.until is None else only.until
    query = f"SELECT {log.COLUMNS} FROM events WHERE position > ? AND position <= ?{where} ORDER BY position"
    while page := sql.execute(f"{query} LIMIT {PAGE}", (after, until, *values)).fetchall():
        after = page[-1][0]
        yield [Row(*row) for row in page]


@contextmanager
def new_file(path: Path | None) -> Iterator[BinaryIO]:
    """A file of the owner's alone that gets its name when it is whole and on the disk; or standard output.

    Raises:
        Refused: it is there already.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _take_its_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def _take_its_name(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # unlike a rename, it takes nobody's place
    except FileExistsError:
        raise Refused(f"{path} is there already") from None
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def export_command(sql: Sql, to: Path | None, command_id: str) -> Moved:
    """Writes all that one command was decided on, as far as the log holds it: its events and those of what
    shared its lane, up to its last; what its device was, came and went; definitions; starts of the broker.

    Raises:
        Refused: no such command is known, or the file is there already.
    """
    found = sql.execute(
        f"SELECT device_id, position FROM commands c WHERE id = ? AND NOT {HIDDEN}", (command_id,)
    ).fetchone()
    if found is None:
        raise Refused(f"no command {command_id[:80]!r} is known")
    device_id, first = found
    last = log.stream(sql, command_id)[-1].position
    mates = sql.execute(
        "SELECT id FROM commands c WHERE device_id = ? AND position <= ? "
        f"AND (closed_position IS NULL OR closed_position >= ?) AND NOT {HIDDEN}",
        (device_id, last, first),
    ).fetchall()
    rows = {row for (mate,) in mates for row in log.stream(sql, mate, last)}
    definitions = {_created(row).definition for row in rows if row.type == "created"}
    rows.update(row for digest in definitions for row in log.stream(sql, definition_stream(digest)))
    rows.update(log.device_stream(sql, device_stream(device_id), first))
    rows.update(row for row in log.stream(sql, device_stream(device_id), last) if row.position > first)
    starts = [row for row in log.stream(sql, SYSTEM, last) if row.type == "started"]
    rows.update(starts[-1:] if starts and starts[-1].position < first else starts)
    head = log.head(sql)
    header = Header(
        log_id=log.meta(sql, "log_id"), position=head.position, hash=head.hash, command=command_id
    )
    with new_file(to) as file:
        file.write(lines.header_line(header) + b"\n")
        file.writelines(lines.as_line(row) + b"\n" for row in sorted(rows))
    return Moved(header.log_id, len(rows), head.position, head.hash)


def _created(row: Row) -> Created:
    event = log.recorded(row).event
    assert isinstance(event, Created)
    return event


def read_command(source: Path) -> tuple[str, list[Recorded]]:
    """The command and the events of such a file; the data of each is what its digest says.

    Raises:
        Refused: it is another file, or was changed.
        OSError: it cannot be read.
    """
    with open(source, "rb") as file:
        try:
            header = lines.header(file.readline())
            rows = [lines.as_row(line) for line in file]
            events = [log.recorded(row) for row in rows]
        except ValueError as error:
            raise Refused(f"{source}: {error}") from error
    if header.command is None:
        raise Refused(f"{source} is not of one command: make it with ordain log export --command ID")
    for row in rows:
        if row.data is not None and row.salt is not None and chain.digest(row.salt, row.data) != row.digest:
            raise Refused(
                f"{source}: position {row.position} was changed: its data does not match its digest"
            )
    if not any(event.stream == header.command for event in events):
        raise Refused(f"{source} has no event of {header.command}")
    return header.command, events


def bring_in(source: Path, directory: Path, reached: Callable[[int, int], None]) -> Moved:
    """Makes the log of a data directory that has none out of a whole export, and its projections.

    Each row is verified as it is read, and the whole log before it gets its name. `reached` is told how
    many rows were taken in, and of how many.

    Raises:
        Refused: the directory has a log, or the file is not a whole log or was changed; names the line.
        OSError: something cannot be read or written.
    """
    there = directory / DATABASE
    if there.exists():
        raise Refused(f"{directory} has a log already; import into an empty directory")
    with open(source, "rb") as file:
        header = _header(source, file)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = directory / f"{DATABASE}.import"
        part.unlink(missing_ok=True)
        try:
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with closing(sqlite3.connect(part, isolation_level=None)) as sql:
                moved = _fill(sql, source, file, header, reached)
            with open(part, "rb") as made:
                os.fsync(made.fileno())
            _take_its_name(part, there)
        finally:
            part.unlink(missing_ok=True)
    return moved


def _header(source: Path, file: BinaryIO) -> Header:
    try:
        header = lines.header(file.readline())
    except ValueError as error:
        raise Refused(f"{source}: {error}") from error
    if header.only or header.command is not None:
        what = ", ".join(header.only) or f"command {header.command}"
        raise Refused(f"{source} is only a part of a log ({what}): it cannot be imported")
    return header


def _fill(
    sql: sqlite3.Connection,
    source: Path,
    file: BinaryIO,
    header: Header,
    reached: Callable[[int, int], None],
) -> Moved:
    sql.execute("PRAGMA journal_mode = OFF")  # what fails is thrown away as a whole
    sql.execute("PRAGMA synchronous = OFF")
    sql.execute("BEGIN")
    log.create(sql, header.log_id, SystemEntropy().token(32).hex())
    position, previous, page = 0, chain.GENESIS, list[Row]()
    for number, line in enumerate(file, 2):
        try:
            row = lines.as_row(line)
        except ValueError as error:
            raise Refused(f"{source}, line {number}: it is no row of a log: {error}") from error
        # Whether what has no data may have none is judged at the end: its `erased` event comes later.
        if (fault := chain.fault(row, previous, position + 1, erased=True)) is not None:
            raise Refused(f"{source}, line {number}: {fault}")
        position, previous = row.position, row.hash
        page.append(row)
        if len(page) == PAGE:
            sql.executemany(log.INSERT, page)
            page.clear()
            reached(position, header.position)
    sql.executemany(log.INSERT, page)
    if (position, previous) != (header.position, header.hash if header.position else previous):
        raise Refused(
            f"{source} ends at position {position}; its first line says that the log had {header.position}"
        )
    if (fault := log.verify(sql).fault) is not None:
        raise Refused(f"{source}: {fault}")
    follower.renew(sql)
    sql.execute("COMMIT")
    return Moved(header.log_id, position, position, previous)


def opened(directory: Path) -> sqlite3.Connection:
    """A log at one moment, whatever is recorded meanwhile.

    Raises:
        Broken: there is none, or it cannot be read.
    """
    sql = open_for_reading(directory)
    sql.execute("BEGIN")
    return sql


def stats(sql: sqlite3.Connection) -> dict[str, Any]:
    """How much is in a log; times are RFC 3339, sizes in bytes."""
    first, last, events = sql.execute(
        "SELECT min(recorded_at), max(recorded_at), count(*) FROM events"
    ).fetchone()
    pages = {name: sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size")}
    return {
        "log_id": log.meta(sql, "log_id"),
        "events": events,
        "erased": sql.execute("SELECT count(*) FROM events WHERE data IS NULL").fetchone()[0],
        "streams": sql.execute("SELECT count(*) FROM events WHERE version = 1").fetchone()[0],
        "first_recorded_at": None if first is None else rfc3339(first),
        "last_recorded_at": None if last is None else rfc3339(last),
        "by_type": _counted(sql, "type"),
        "by_project": _counted(sql, "project"),
        "free_bytes_in_the_file": pages["freelist_count"] * pages["page_size"],
    }


def _counted(sql: sqlite3.Connection, column: str) -> dict[str, int]:
    return dict(
        sql.execute(f"SELECT {column}, count(*) FROM events GROUP BY 1 ORDER BY 2 DESC, 1").fetchall()
    )
