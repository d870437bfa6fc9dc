"""Identifiers: `cmd_…`, `dev_…` (TypeID over UUIDv7, sortable by time) and secrets (`sk_live_…`).

Time and randomness come through the seams. Sources: RFC 9562 section 5.7, TypeID specification 0.3.
"""

from __future__ import annotations

import base64
import hashlib

from broker.seams import Entropy

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str, at_ms: int, entropy: Entropy) -> str:
    """`prefix` + `_` + 26 characters: 48 bits of Unix ms, then 74 random bits, in Crockford's base 32."""
    value = at_ms << 80 | int.from_bytes(entropy.token(10), "big")
    value = value & ~(0xF << 76) | 7 << 76  # version
    value = value & ~(0x3 << 62) | 2 << 62  # variant
    return f"{prefix}_" + "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -5, -5))


def new_secret(prefix: str, entropy: Entropy) -> str:
    """A secret of 256 bits, shown once; only its digest is kept."""
    return prefix + base64.urlsafe_b64encode(entropy.token(32)).decode().rstrip("=")


def secret_digest(secret: str) -> str:
    """SHA-256, hex. Enough for a secret of 256 random bits: there is nothing to guess faster."""
    return hashlib.sha256(secret.encode()).hexdigest()
