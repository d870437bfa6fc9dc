"""Checkpoints: a signed statement of how far the log had come and what its last hash was.

The chain alone shows a change only to those who know where it ended: whoever holds the file and the keys
can cut it off, or make another from the beginning. Whoever keeps a checkpoint elsewhere sees both.
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
from broker.operations.backup import Refused
from broker.seams import Sql
from devices.clock import rfc3339

TYPE = "checkpoint+jwt"


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """`hash`: of the row at `position`, in hex; `recorded_at`: its time, RFC 3339."""

    log_id: str
    position: int
    hash: str
    recorded_at: str


class Checkpoint(NamedTuple):
    """What was said, and by which key. `thumbprint`: RFC 7638, base64url; it says which key it is."""

    claims: Claims
    kid: str
    thumbprint: str


def sign(sql: Sql) -> str:
    """A checkpoint of the log as it is, a JWT (EdDSA) that carries the public key. The key is the one that
    grants are signed with, so that it can also be had from the JWKS; the type of the token is another.

    Raises:
        Refused: there is nothing to state, or no key yet.
    """
    head = log.head(sql)
    keys = sql.execute(
        "SELECT kid, private, created_at, retired_at FROM grant_keys ORDER BY created_at DESC, kid DESC"
    ).fetchall()
    if head.position == 0:
        raise Refused("the log is empty: there is nothing to state")
    if not keys:
        raise Refused("there is no signing key yet: a broker makes one when it first starts")
    key = read_key(*keys[0])
    claims = Claims(
        log_id=log.meta(sql, "log_id"),
        position=head.position,
        hash=head.hash.hex(),
        recorded_at=rfc3339(head.recorded_at),
    )
    headers = {"typ": TYPE, "kid": key.kid, "jwk": jwk(key)}
    return jwt.encode(msgspec.to_builtins(claims), key.private, algorithm="EdDSA", headers=headers)


def read(content: bytes) -> Checkpoint:
    """What a checkpoint says. Its signature is good; whose key that was, the thumbprint says.

    Raises:
        Refused: it is none, or was changed.
    """
    text = content.strip()
    try:
        header = jwt.get_unverified_header(text)
        public: dict[str, Any] = header["jwk"]
        if header.get("typ") != TYPE or public["crv"] != "Ed25519":
            raise Refused(f"it is no checkpoint: its type is {header.get('typ')!r:.40}")
        decoded = jwt.decode(text, PyJWK(public, "EdDSA"), algorithms=["EdDSA"])
        claims = msgspec.convert(decoded, Claims)
        return Checkpoint(claims, str(header.get("kid", "")), _thumbprint(public))
    except (jwt.PyJWTError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"it is no checkpoint, or was changed: {error}") from error


def contradiction(sql: Sql, said: Claims) -> str | None:
    """Why a log is not the one that a checkpoint was made of, gone on; None if it may be.

    The hash of one row speaks for all rows before it, if the chain verifies up to there.
    """
    ids = sql.execute("SELECT value FROM meta WHERE key IN ('log_id', 'restored_from')").fetchall()
    if (said.log_id,) not in ids:
        return f"the checkpoint is of log {said.log_id}, and this is {log.meta(sql, 'log_id')}"
    row = sql.execute("SELECT hash FROM events WHERE position = ?", (said.position,)).fetchone()
    if row is None:
        end = log.head(sql).position
        return f"the log was cut off: it ends at position {end}, the checkpoint was made at {said.position}"
    if bytes(row[0]).hex() != said.hash:
        return f"the log was rewritten: position {said.position} has another hash than the checkpoint says"
    return None


def _thumbprint(public: dict[str, Any]) -> str:
    """RFC 7638: the required members of an OKP key, in order, without spaces."""
    required = msgspec.json.encode({name: public[name] for name in ("crv", "kty", "x")})
    return base64.urlsafe_b64encode(hashlib.sha256(required).digest()).decode().rstrip("=")
