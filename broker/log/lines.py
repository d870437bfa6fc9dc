"""The export format of the log: one JSON line per row, with every column as stored.

Bytes are base64. An imported row is byte for byte the same, so its hash stays valid.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from broker.log.chain import Row

VERSION = 2  # of the files that this release writes; it also reads 1
Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row: the columns of `events` in their order. `decided_at` is null in a row of format 1."""

    position: Whole
    stream: str
    version: Whole
    type: str
    schema: Whole
    recorded_at: Whole
    decided_at: Whole | None
    project: str
    device_id: str | None
    actor: str
    data: bytes | None
    salt: bytes | None
    digest: bytes
    hash: bytes


class OldLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of an export that a release before format 2 wrote."""

    position: Whole
    stream: str
    version: Whole
    type: str
    schema: Whole
    recorded_at: Whole
    project: str
    device_id: str | None
    actor: str
    data: bytes | None
    salt: bytes | None
    digest: bytes
    hash: bytes


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of an export.

    `position` and `hash`: those of the last row in the log at the time of the export. `only`: the filters of
    a partial export; it cannot be imported. `command`: set if the file holds exactly the rows that the
    decisions about this one command depend on.
    """

    format: str = "ordain-log"
    version: int = VERSION
    log_id: str
    position: int
    hash: bytes
    only: dict[str, str] = {}
    command: str | None = None


_encode = msgspec.json.Encoder().encode
_line = msgspec.json.Decoder(Line).decode
_old_line = msgspec.json.Decoder(OldLine).decode
_header = msgspec.json.Decoder(Header).decode


def as_line(row: Row) -> bytes:
    return _encode(Line(*row))


def as_row(line: bytes, version: int = VERSION) -> Row:
    """Parses a row of a file of this version. Does not check its hash.

    Raises:
        ValueError: the line is not a row of a log.
    """
    if version == 1:
        old = msgspec.structs.astuple(_old_line(line))
        return Row._make((*old[:6], None, *old[6:]))
    return Row(*msgspec.structs.astuple(_line(line)))


def header_line(header: Header) -> bytes:
    return _encode(header)


def header(line: bytes) -> Header:
    """Parses the first line.

    Raises:
        ValueError: the file is not an export of a log, or a later release wrote it.
    """
    try:
        found = _header(line)
    except ValueError as error:
        raise ValueError("it is not an export of a log") from error
    if found.format != "ordain-log" or found.version not in (1, VERSION):
        raise ValueError(
            f"its format is {found.format!r} {found.version}; this release reads 'ordain-log' 1 and {VERSION}"
        )
    return found
