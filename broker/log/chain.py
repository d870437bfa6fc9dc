"""The hash chain of the log: every row's hash depends on all rows before it and on its own data.

Pure. `digest` covers salt and data. `hash` covers the previous hash, every header column and the digest.
Each part has a length prefix, so two different rows never hash the same bytes. Erasing removes data and
salt but keeps the digest, so the chain stays valid.

Rows of format 1 have no `decided_at`, and their hash has no part for it. Which format a row has follows from
that column alone. Nobody can use this to forge: a hash of format 2 begins with a part of 8 bytes, one of
format 1 with a part of 32 bytes, so no row has the same hash in both; and all rows of format 1 come before
the first one of format 2.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

GENESIS = bytes(32)
FORMAT_2 = b"\x00\x00\x00\x08ordain-2"  # the first part of what is hashed
NULL = b"\xff\xff\xff\xff"  # an impossible length, so a null value differs from an empty one
_number = Struct(">Iq").pack  # a part with a number: its length, which is 8, and the number
_numbers = Struct(">IqIqIq").pack
_length = Struct(">I").pack  # what comes before every other part
_number_and_length = Struct(">IqI").pack

Header = tuple[int, str, int, str, int, int, int | None, str, str | None, str]


class Row(NamedTuple):
    """One row of the table `events`, bytes as stored. Times: Unix time in ms. `decided_at` None: the row has
    format 1, and was decided when it was recorded."""

    position: int
    stream: str
    version: int
    type: str
    schema: int
    recorded_at: int
    decided_at: int | None
    project: str
    device_id: str | None
    actor: str
    data: bytes | None
    salt: bytes | None
    digest: bytes
    hash: bytes

    @property
    def header(self) -> Header:
        """The columns that the hash covers besides the digest."""
        return self[:10]

    @property
    def decided(self) -> int:
        """When the event was decided."""
        return self.recorded_at if self.decided_at is None else self.decided_at


# What the first row follows.
BEFORE_ALL = Row(0, "", 0, "", 1, 0, None, "", None, "", None, None, b"", GENESIS)


def _text(value: str) -> bytes:
    text = value.encode()
    return _length(len(text)) + text


_often = lru_cache(4_096)(_text)  # of a column whose values repeat


@lru_cache(4_096)
def _whose(project: str, device_id: str | None, actor: str) -> bytes:
    return _text(project) + (NULL if device_id is None else _text(device_id)) + _text(actor)


def digest(salt: bytes, data: bytes) -> bytes:
    """SHA-256 over salt and stored data. Without the salt, short erased data could be guessed."""
    return sha256(b"".join((_length(len(salt)), salt, _length(len(data)), data))).digest()


def link(
    previous: bytes,
    position: int,
    stream: str,
    version: int,
    type_name: str,
    schema: int,
    recorded_at: int,
    decided_at: int | None,
    project: str,
    device_id: str | None,
    actor: str,
    row_digest: bytes,
) -> bytes:
    """The hash of one row: SHA-256, 32 bytes. The arguments after `previous` are the row's header."""
    if decided_at is None:
        form, times = b"", _number(8, schema) + _number(8, recorded_at)
    else:
        form, times = FORMAT_2, _numbers(8, schema, 8, recorded_at, 8, decided_at)
    name = stream.encode()
    parts = (
        form,
        _length(len(previous)),
        previous,
        _number_and_length(8, position, len(name)),
        name,
        _number(8, version),
        _often(type_name),
        times,
        _whose(project, device_id, actor),
        _length(len(row_digest)),
        row_digest,
    )
    return sha256(b"".join(parts)).digest()


def fault(row: Row, last: Row, erased: bool) -> str | None:
    """Checks the row after the good row `last`; a sentence about its fault, or None.

    `erased`: an `erased` event names or covers this row, so its data may be missing.
    """
    if row.position != last.position + 1:
        return f"position {last.position + 1} is missing: the next row is {row.position}"
    try:
        return _mismatch(row, last.hash, erased) or _untimely(row, last)
    except (TypeError, AttributeError, StructError):  # SQLite stores text in a BLOB column without an error
        return f"position {row.position} was changed: a column has the wrong type"


def _untimely(row: Row, last: Row) -> str | None:
    if row.recorded_at < last.recorded_at or row.decided < last.decided:
        return f"position {row.position} is older than the row before it"
    if row.decided_at is None and last.decided_at is not None:
        return f"position {row.position} has format 1 and follows a row of format 2"
    return None


def _mismatch(row: Row, previous: bytes, erased: bool) -> str | None:
    if row.data is None or row.salt is None:
        if not erased:
            return f"position {row.position} has no data, and no erased event names it"
    elif digest(row.salt, row.data) != row.digest:
        return f"position {row.position} was changed: its data does not match its digest"
    if link(previous, *row.header, row.digest) != row.hash:
        return f"position {row.position} does not follow from the row before it: one of them was changed"
    return None
