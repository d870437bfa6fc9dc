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


def _part(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _text(value: str) -> bytes:
    return _part(value.encode())


_often = lru_cache(4_096)(_text)  # of columns whose values repeat


def digest(salt: bytes, data: bytes) -> bytes:
    """SHA-256 over salt and stored data. Without the salt, short erased data could be guessed."""
    return sha256(_part(salt) + _part(data)).digest()


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
    parts = (
        form,
        _part(previous),
        _number(8, position),
        _text(stream),
        _number(8, version),
        _often(type_name),
        times,
        _often(project),
        NULL if device_id is None else _often(device_id),
        _often(actor),
        _part(row_digest),
    )
    return sha256(b"".join(parts)).digest()


def fault(row: Row, previous: bytes, expected_position: int, erased: bool) -> str | None:
    """Checks the row after the one with the hash `previous`; a sentence about its fault, or None.

    `erased`: an `erased` event names or covers this row, so its data may be missing.
    """
    if row.position != expected_position:
        return f"position {expected_position} is missing: the next row is {row.position}"
    try:
        return _mismatch(row, previous, erased)
    except (TypeError, AttributeError, StructError):  # SQLite stores text in a BLOB column without an error
        return f"position {row.position} was changed: a column has the wrong type"


def _mismatch(row: Row, previous: bytes, erased: bool) -> str | None:
    if row.data is None or row.salt is None:
        if not erased:
            return f"position {row.position} has no data, and no erased event names it"
    elif digest(row.salt, row.data) != row.digest:
        return f"position {row.position} was changed: its data does not match its digest"
    if link(previous, *row.header, row.digest) != row.hash:
        return f"position {row.position} does not follow from the row before it: one of them was changed"
    return None
