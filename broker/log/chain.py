"""The hash chain of the log: every row's hash depends on all rows before it and on its own data.

Pure. `digest` covers salt and data. `hash` covers the previous hash, every header column and the digest.
Each part has a length prefix, so two different rows never hash the same bytes. Erasing removes data and
salt but keeps the digest, so the chain stays valid.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

GENESIS = bytes(32)
NULL = b"\xff\xff\xff\xff"  # an impossible length, so a null value differs from an empty one


class Row(NamedTuple):
    """One row of the table `events`, bytes as stored. `recorded_at`: Unix time in ms."""

    position: int
    stream: str
    version: int
    type: str
    schema: int
    recorded_at: int
    project: str
    device_id: str | None
    actor: str
    data: bytes | None
    salt: bytes | None
    digest: bytes
    hash: bytes


def _part(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _text(value: str) -> bytes:
    encoded = value.encode()
    return len(encoded).to_bytes(4, "big") + encoded


def _number(value: int) -> bytes:
    return b"\x00\x00\x00\x08" + value.to_bytes(8, "big", signed=True)


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
    project: str,
    device_id: str | None,
    actor: str,
    row_digest: bytes,
) -> bytes:
    """The hash of one row: SHA-256, 32 bytes."""
    parts = (
        _part(previous),
        _number(position),
        _text(stream),
        _number(version),
        _text(type_name),
        _number(schema),
        _number(recorded_at),
        _text(project),
        NULL if device_id is None else _text(device_id),
        _text(actor),
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
    except (TypeError, AttributeError):  # SQLite stores text in a BLOB column without an error
        return f"position {row.position} was changed: a column has the wrong type"


def _mismatch(row: Row, previous: bytes, erased: bool) -> str | None:
    if row.data is None or row.salt is None:
        if not erased:
            return f"position {row.position} has no data, and no erased event names it"
    elif digest(row.salt, row.data) != row.digest:
        return f"position {row.position} was changed: its data does not match its digest"
    if link(previous, *row[:9], row.digest) != row.hash:
        return f"position {row.position} does not follow from the row before it: one of them was changed"
    return None
