"""Rows of the log as lines of JSON, every column as stored: what is exported, and imported again.

Bytes are base64, so a row that is read back is the same to the byte, and its hash still holds.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from broker.log.chain import Row

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The columns, in their order."""

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
    """The first line. `position` and `hash`: of the last row there was. `only`: what was asked for, if not
    everything; such a file cannot be imported. `command`: the file is all that one command was decided on."""

    format: str = "ordain-log"
    version: int = 1
    log_id: str
    position: int
    hash: bytes
    only: dict[str, str] = {}
    command: str | None = None


_encode = msgspec.json.Encoder().encode
_line = msgspec.json.Decoder(Line).decode
_header = msgspec.json.Decoder(Header).decode


def as_line(row: Row) -> bytes:
    return _encode(Line(*row))


def as_row(line: bytes) -> Row:
    """A row, not verified.

    Raises:
        ValueError: it is no row of a log.
    """
    return Row(*msgspec.structs.astuple(_line(line)))


def header_line(header: Header) -> bytes:
    return _encode(header)


def header(line: bytes) -> Header:
    """The first line.

    Raises:
        ValueError: the file is not one of ours, or of a later release.
    """
    try:
        found = _header(line)
    except ValueError as error:
        raise ValueError("it is no export of a log") from error
    if found.format != "ordain-log" or found.version != 1:
        raise ValueError(f"its format is {found.format!r} {found.version}, and only 'ordain-log' 1 is known")
    return found
