"""Identifiers: `cmd_…`, `dev_…` (TypeID over UUIDv7, sortable by time) and secrets (`sk_live_…`).

Time and randomness come through the seams. Sources: RFC 9562 section 5.7, TypeID specification 0.3.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from broker.domain.errors import invalid
from broker.seams import Entropy
from devices.names import is_name
from devices.speech.signing import public_key

NAME_RULE = "must match [A-Za-z0-9][A-Za-z0-9_-]{0,63} and not be me or pending"
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]


def new_id(prefix: str, at_ms: int, entropy: Entropy) -> str:
    """`prefix` + `_` + 26 characters: 48 bits of Unix ms, then 74 random bits, in Crockford's base 32."""
    value = at_ms << 80 | int.from_bytes(entropy.token(10), "big")
    value = value & ~(0xF << 76) | 7 << 76  # version
    value = value & ~(0x3 << 62) | 2 << 62  # variant
    return f"{prefix}_" + "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -10, -10)])


def new_secret(prefix: str, entropy: Entropy) -> str:
    """A secret of 256 bits, shown once; only its digest is kept."""
    return prefix + base64.urlsafe_b64encode(entropy.token(32)).decode().rstrip("=")


def secret_digest(secret: str) -> str:
    """SHA-256, hex. A slow hash is not needed: 256 random bits cannot be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def peppered_digest(secret: str, pepper: bytes) -> str:
    """HMAC-SHA256 of a secret, hex: who can write to the log's file, but has no pepper, cannot add a key."""
    return hmac.digest(pepper, secret.encode(), "sha256").hex()


def token_digest(token: str, entropy: Entropy, rounds: int = 1) -> str:
    """A device token's digest in the format of Mosquitto's password file; Ordain and Mosquitto both use it.

    `$7$rounds$salt$hash`, PBKDF2 with SHA-512. One round is enough: 256 random bits cannot be guessed. A
    password that a person chose needs more.
    """
    salt = entropy.token(12)
    return f"$7${rounds}${_base64(salt)}${_base64(_pbkdf2(token, salt, rounds))}"


def is_token(token: str, digest: str) -> bool:
    """True if the digest is that of this token. Compares in constant time.

    A token with a NUL is never right: HMAC fills its key up with NULs, so `abc` and `abc\\0` have one digest.
    """
    _, _, rounds, salt, wanted = digest.split("$")
    found = _base64(_pbkdf2(token, base64.b64decode(salt), int(rounds)))
    return hmac.compare_digest(found, wanted) and "\0" not in token


def _pbkdf2(token: str, salt: bytes, rounds: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha512", token.encode(), salt, rounds)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def check_name(field: str, value: str | None) -> None:
    """Checks that a value is an identifier; None is allowed.

    Raises:
        Refusal: invalid_request.
    """
    if value is not None and not is_name(value):
        raise invalid(field, NAME_RULE, value)


def check_answer_key(key: str | None) -> None:
    """Checks that it is an Ed25519 public key; None is allowed.

    Raises:
        Refusal: invalid_request.
    """
    try:
        if key is not None:
            public_key(key)
    except ValueError as error:
        raise invalid("answer_key", f"no Ed25519 public key: {error}", key) from error
