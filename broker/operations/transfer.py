"""Export of a log to JSON Lines, and import of such a file. The imported log is identical, byte for byte.

Only the log is exported. The other tables are not: API keys, the keys that sign grants, secrets of devices
and webhooks, idempotency keys, and unmatched answers.
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
from broker.log.driven import read_now
from broker.log.lines import Header
from broker.operations.backup import Refused
from broker.operations.fit import unfit
from broker.seams import Readable
from broker.world import DATABASE, SystemEntropy, create, part_of
from devices.clock import rfc3339
from devices.names import is_name
from projections import devices, follower
from projections.commands import CREATED, HIDDEN, veiled

PAGE = 5_000
Reached = Callable[[int], None]


class Moved(NamedTuple):
    """`rows`: how many rows were written or read. `position` and `hash`: those of the log's last row."""

    log_id: str
    rows: int
    position: int
    hash: bytes


class Only(NamedTuple):
    """The filter of an export; None matches all. `since` and `until` are positions, both included."""

    project: str | None = None
    device: str | None = None
    type: str | None = None
    since: int | None = None
    until: int | None = None

    def named(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._asdict().items() if value is not None}


def export(sql: Readable, to: Path | None, only: Only, reached: Reached) -> Moved:
    """Writes the rows that match the filter, as this transaction sees them, to a new file or standard output.

    Raises:
        Refused: the file already exists, or the device is not known.
        OSError: the file cannot be written.
    """
    head, log_id, count = read_now(sql, log.head), read_now(sql, log.meta, "log_id"), 0
    header = Header(
        log_id=log_id, position=head.position, hash=head.hash, only=only.named() | read_now(sql, log.copied)
    )
    with new_file(to) as file:
        file.write(lines.header_line(header) + b"\n")
        for page in _pages(sql, only):
            file.writelines(lines.as_line(row) + b"\n" for row in read_now(sql, veiled, page))
            count += len(page)
            reached(page[-1].position)
    return Moved(log_id, count, head.position, head.hash)


def _pages(sql: Readable, only: Only) -> Iterator[list[Row]]:
    where, values = "", list[Any]()
    for column, value in (("project", only.project), ("type", only.type)):
        if value is not None:
            where += f" AND {column} = ?"
            values.append(value)
    if only.device is not None:
        device = read_now(sql, devices.by_name, [only.device]).get(only.device)
        if device is None:
            raise Refused(f"there is no device {only.device!r}")
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
    """A new file that only the owner can read, or standard output if `path` is None.

    The file gets its final name only when it is complete and synced to the disk.

    Raises:
        Refused: the file already exists.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = part_of(path)
    try:
        create(part)
        with open(part, "r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _take_its_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def _take_its_name(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # unlike a rename, it never replaces an existing file
    except FileExistsError:
        raise Refused(f"{path} already exists") from None
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def export_command(sql: Readable, to: Path | None, command_id: str) -> Moved:
    """Writes all events that influenced the decisions about one command, up to its last event.

    These are its own events, those of the commands that shared its lane, those of its device (type, online,
    offline), the definitions, and the starts of the broker.

    Raises:
        Refused: the command is not known, or the file already exists.
    """
    found = sql.execute(
        f"SELECT device_id, position FROM commands c WHERE position = {CREATED.format('?')} AND NOT {HIDDEN}",
        (command_id,),
    ).fetchone()
    if found is None:
        raise Refused(f"there is no command {command_id[:80]!r}")
    device_id, first = found
    last = read_now(sql, log.stream, command_id)[-1].position
    mates = sql.execute(
        "SELECT f.stream FROM commands c CROSS JOIN events f ON f.position = c.position "
        "WHERE c.device_id = ? AND c.position <= ? "
        f"AND (c.closed_position IS NULL OR c.closed_position >= ?) AND NOT {HIDDEN}",
        (device_id, last, first),
    ).fetchall()
    rows = {row for (mate,) in mates for row in read_now(sql, log.stream, mate, last)}
    definitions = {_created(row).definition for row in rows if row.type == "created"}
    rows.update(row for digest in definitions for row in read_now(sql, log.stream, definition_stream(digest)))
    rows.update(read_now(sql, log.device_stream, device_stream(device_id), first))
    rows.update(
        row for row in read_now(sql, log.stream, device_stream(device_id), last) if row.position > first
    )
    starts = [row for row in read_now(sql, log.stream, SYSTEM, last) if row.type == "started"]
    rows.update(starts[-1:] if starts and starts[-1].position < first else starts)
    head = read_now(sql, log.head)
    header = Header(
        log_id=read_now(sql, log.meta, "log_id"), position=head.position, hash=head.hash, command=command_id
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
    """The command id and the events of a file that `export_command` wrote. Checks each event's digest.

    Raises:
        Refused: the file is not such an export, or it was changed.
        OSError: the file cannot be read.
    """
    with open(source, "rb") as file:
        try:
            header = lines.header(file.readline())
            rows = [lines.as_row(line, header.version) for line in file]
            events = [log.recorded(row) for row in rows]
        except ValueError as error:
            raise Refused(f"{source}: {error}") from error
    if header.command is None:
        raise Refused(f"{source} is not an export of one command: use ordain log export --command ID")
    for row in rows:
        if row.data is not None and row.salt is not None and chain.digest(row.salt, row.data) != row.digest:
            raise Refused(
                f"{source}: position {row.position} was changed: its data does not match its digest"
            )
    if not any(event.stream == header.command for event in events):
        raise Refused(f"{source} has no event of {header.command}")
    return header.command, events


def bring_in(source: Path, directory: Path, reached: Callable[[int, int], None]) -> Moved:
    """Imports a whole export into a data directory without a log, and computes the projections.

    Each row is verified when it is read. The whole log is verified before its file gets its final name.
    `reached` is called with the number of rows read so far and the number of all rows.

    Raises:
        Refused: the directory already has a log, or the file is not a whole log or was changed; the message
            names the line.
        OSError: a file cannot be read or written.
    """
    there = directory / DATABASE
    if there.exists():
        raise Refused(f"{directory} already has a log; import into an empty directory")
    with open(source, "rb") as file:
        header = _header(source, file)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = part_of(there)
        try:
            create(part)
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
    if not is_name(header.log_id):
        raise Refused(f"{source}: log_id = {header.log_id[:64]!r} is no identifier")
    if header.only or header.command is not None:
        what = ", ".join(header.only) or f"command {header.command}"
        raise Refused(f"{source} is only part of a log ({what}): it cannot be imported")
    return header


def _fill(
    sql: sqlite3.Connection,
    source: Path,
    file: BinaryIO,
    header: Header,
    reached: Callable[[int, int], None],
) -> Moved:
    sql.execute("PRAGMA journal_mode = OFF")  # a failed import deletes the whole file
    sql.execute("PRAGMA synchronous = OFF")
    sql.execute("BEGIN")
    log.create(sql, header.log_id, SystemEntropy().token(32).hex())
    last, page = chain.BEFORE_ALL, list[Row]()
    for number, line in enumerate(file, 2):
        try:
            row = lines.as_row(line, header.version)
        except ValueError as error:
            raise Refused(f"{source}, line {number}: it is not a row of a log: {error}") from error
        # A row without data needs an `erased` event, which comes later: `verify` checks that at the end.
        if (fault := chain.fault(row, last, erased=True)) is not None:
            raise Refused(f"{source}, line {number}: {fault}")
        if (fault := unfit(row)) is not None:
            raise Refused(f"{source}, line {number}: {fault}")
        last = row
        page.append(row)
        if len(page) == PAGE:
            _put(sql, source, page)
            page.clear()
            reached(last.position, header.position)
    _put(sql, source, page)
    if (last.position, last.hash) != (header.position, header.hash if header.position else last.hash):
        raise Refused(
            f"{source} ends at position {last.position}; "
            f"its first line says that the log had {header.position}"
        )
    if (fault := read_now(sql, log.verify).fault) is not None:
        raise Refused(f"{source}: {fault}")
    try:
        follower.renew(sql)
    except (ValueError, TypeError, LookupError, AssertionError, sqlite3.Error) as error:
        raise Refused(f"{source}: its events do not follow from each other: {error}") from error
    sql.execute("COMMIT")
    return Moved(header.log_id, last.position, last.position, last.hash)


def _put(sql: sqlite3.Connection, source: Path, page: list[Row]) -> None:
    try:
        sql.executemany(log.INSERT, page)
    except sqlite3.IntegrityError:
        raise Refused(
            f"{source}: up to position {page[-1].position}, two events of a stream have the same version"
        ) from None


def stats(sql: Readable) -> dict[str, Any]:
    """Statistics of a log. Times are RFC 3339, sizes are in bytes."""
    first, last, events = sql.execute(
        "SELECT min(recorded_at), max(recorded_at), count(*) FROM events"
    ).fetchone()
    return {
        "log_id": read_now(sql, log.meta, "log_id"),
        "events": events,
        "erased": sql.execute("SELECT count(*) FROM events WHERE data IS NULL").fetchone()[0],
        "streams": sql.execute("SELECT count(*) FROM events WHERE version = 1").fetchone()[0],
        "first_recorded_at": None if first is None else rfc3339(first),
        "last_recorded_at": None if last is None else rfc3339(last),
        "by_type": _counted(sql, "type"),
        "by_project": _counted(sql, "project"),
    }


def _counted(sql: Readable, column: str) -> dict[str, int]:
    return dict(
        sql.execute(f"SELECT {column}, count(*) FROM events GROUP BY 1 ORDER BY 2 DESC, 1").fetchall()
    )
