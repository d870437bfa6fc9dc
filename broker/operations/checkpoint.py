"""Checkpoints: a signed statement of the log's last position and last hash.

The hash chain alone is not enough. A person with the file and the keys can cut the log off, or write a whole
new log with a valid chain. A checkpoint that is kept elsewhere shows both.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any, NamedTuple

import jwt
import msgspec
from jwt.api_jwk import PyJWK

from broker.engine.grants import jwk, read_key
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.operations.backup import Refused
from broker.seams import Readable
from devices.clock import rfc3339

TYPE = "checkpoint+jwt"


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """`hash`: the hash of the row at `position`, in hex. `recorded_at`: the time of that row, RFC 3339."""

    log_id: str
    position: int
    hash: str
    recorded_at: str


class Checkpoint(NamedTuple):
    """The claims of a checkpoint and the key that signed it. `thumbprint`: RFC 7638, base64url."""

    claims: Claims
    kid: str
    thumbprint: str


def sign(sql: Readable) -> str:
    """A checkpoint of the current log: a JWT (EdDSA) that contains the public key.

    The signing key is also the key for grants, so the JWKS publishes its public key. The `typ` header
    differs, so a checkpoint cannot be used as a grant.

    Raises:
        Refused: the log is empty, or there is no signing key yet.
    """
    head = read_now(sql, log.head)
    keys = sql.execute(
        "SELECT kid, private, created_at, retired_at FROM grant_keys ORDER BY created_at DESC, kid DESC"
    ).fetchall()
    if head.position == 0:
        raise Refused("the log is empty: there is no position to sign")
    if not keys:
        raise Refused("there is no signing key yet: a broker makes one when it first starts")
    key = read_key(*keys[0])
    claims = Claims(
        log_id=read_now(sql, log.meta, "log_id"),
        position=head.position,
        hash=head.hash.hex(),
        recorded_at=rfc3339(head.recorded_at),
    )
    headers = {"typ": TYPE, "kid": key.kid, "jwk": jwk(key)}
    return jwt.encode(msgspec.to_builtins(claims), key.private, algorithm="EdDSA", headers=headers)


def read(content: bytes) -> Checkpoint:
    """Parses a checkpoint and verifies its signature with the key inside it.

    Anyone can sign with a key of their own, so the caller must compare the thumbprint with the expected one.

    Raises:
        Refused: it is not a checkpoint, or it was changed.
    """
    text = content.strip()
    try:
        header = jwt.get_unverified_header(text)
        public: dict[str, Any] = header["jwk"]
        if header.get("typ") != TYPE or public["crv"] != "Ed25519":
            raise Refused(f"it is not a checkpoint: its type is {header.get('typ')!r:.40}")
        decoded = jwt.decode(text, PyJWK(public, "EdDSA"), algorithms=["EdDSA"])
        claims = msgspec.convert(decoded, Claims)
        return Checkpoint(claims, str(header.get("kid", "")), _thumbprint(public))
    except (jwt.PyJWTError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"it is not a checkpoint, or was changed: {error}") from error


def contradiction(sql: Readable, said: Claims) -> str | None:
    """Why a log cannot be the continuation of the log that the checkpoint was made from; None if it can be.

    The check compares only the hash of one row. If the chain verifies up to that row, this hash covers all
    earlier rows.
    """
    ids = sql.execute("SELECT value FROM meta WHERE key IN ('log_id', 'restored_from')").fetchall()
    if (said.log_id,) not in ids:
        return f"the checkpoint is of log {said.log_id}, and this is {read_now(sql, log.meta, 'log_id')}"
    row = sql.execute("SELECT hash FROM events WHERE position = ?", (said.position,)).fetchone()
    if row is None:
        end = read_now(sql, log.head).position
        return f"the log was cut off: it ends at position {end}, the checkpoint was made at {said.position}"
    if bytes(row[0]).hex() != said.hash:
        return f"the log was rewritten: position {said.position} has another hash than the checkpoint says"
    return None


def _thumbprint(public: dict[str, Any]) -> str:
    """RFC 7638: the required members of an OKP key, in order, without spaces."""
    required = msgspec.json.encode({name: public[name] for name in ("crv", "kty", "x")})
    return base64.urlsafe_b64encode(hashlib.sha256(required).digest()).decode().rstrip("=")
