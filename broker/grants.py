"""Signs grants: the token that lets one device execute one command with exactly these parameters.

Minted when handed over or shown, never stored. Form and claims: contract, section 4; RFC 7519, RFC 8037.
"""

from __future__ import annotations

import base64

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from broker.ids import new_id
from broker.lifecycle import CommandState
from broker.seams import Entropy, Sql, Storage
from devices.grant import TYPE, params_hash

LIFE_SEC = 86_400


class Grants:
    """The signing key in use and those whose grants may still be alive."""

    def __init__(self, issuer: str, keys: dict[str, Ed25519PrivateKey]) -> None:
        self.issuer = issuer
        self.keys = keys
        self.kid = next(reversed(keys))
        self._key = keys[self.kid]
        self._last: tuple[tuple[str, str, int, int], str] = (("", "", 0, 0), "")

    def mint(self, state: CommandState, now_ms: int) -> str:
        """A grant for this hand-over; ends with the command, and for a closed one not after its closing."""
        now = now_ms // 1_000
        exp = now + LIFE_SEC
        for end in (state.expires_at, state.closed_at):
            if end is not None:
                exp = min(exp, end // 1_000)
        # The answer of a create and the hand-over right after it carry the same claims: sign once.
        if self._last[0] == (made := (self.kid, state.id, now, exp)):
            return self._last[1]
        token = self._sign(state, now, exp)
        self._last = made, token
        return token

    def _sign(self, state: CommandState, now: int, exp: int) -> str:
        claims = {
            "iss": self.issuer,
            "aud": state.hardware_id,
            "sub": state.id,
            "jti": state.id,
            "iat": now,
            "nbf": now,
            "exp": exp,
            "cmd": state.type,
            "phs": params_hash(msgspec.json.decode(state.params)),
        }
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"typ": TYPE, "kid": self.kid})

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The public keys, RFC 7517."""
        return {"keys": [_jwk(kid, key) for kid, key in self.keys.items()]}


def _jwk(kid: str, key: Ed25519PrivateKey) -> dict[str, str]:
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    x = base64.urlsafe_b64encode(public).decode().rstrip("=")
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid, "use": "sig", "alg": "EdDSA"}


async def load_grants(storage: Storage, entropy: Entropy, issuer: str, now_ms: int) -> Grants:
    """Reads the signing keys; the first start makes one."""

    def work(sql: Sql) -> list[tuple[str, bytes]]:
        keys = sql.execute("SELECT kid, private FROM grant_keys WHERE retired_at IS NULL ORDER BY created_at")
        return [(row[0], bytes(row[1])) for row in keys.fetchall()]

    found = await storage.read(work)
    if not found:
        private = Ed25519PrivateKey.from_private_bytes(entropy.token(32))
        raw = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        kid = new_id("key", now_ms, entropy)
        await storage.write(
            lambda sql: sql.execute("INSERT INTO grant_keys VALUES (?, ?, ?, NULL)", (kid, raw, now_ms))
        )
        found = [(kid, raw)]
    return Grants(issuer, {kid: Ed25519PrivateKey.from_private_bytes(raw) for kid, raw in found})
