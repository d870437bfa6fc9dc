"""Signs grants: tokens that let one device execute one command with exactly these parameters.

A grant is signed for each hand-over. A grant in an HTTP answer may be older: otherwise each read of a list
would sign every row again. Grants are kept in memory only, never stored. Format and claims: contract, section
4; RFC 7519, RFC 8037. Private keys and device secrets are kept beside the log and must never enter an event.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from broker.domain.errors import Refusal, not_found
from broker.domain.lifecycle import CommandState
from broker.engine.ids import new_id
from broker.engine.live import Live, Recent
from broker.engine.writer import Writer
from broker.seams import Change, Drop, New, Put, Sql
from devices.grant import TYPE, params_hash
from devices.wire import Unsendable

LIFE_SEC = 86_400
KEPT = 4_096  # grants in memory, about 700 bytes each


class Secrets:
    """The secrets that devices share with the broker, by device id: for HS256 grants, and for answers signed
    with HMAC. Loaded by `Grants.load`."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._held: dict[str, bytes] = {}

    def get(self, device_id: str) -> bytes | None:
        return self._held.get(device_id)

    def take(self, rows: list[tuple[str, bytes]]) -> None:
        self._held = dict(rows)

    def renew(self, device_id: str) -> str:
        """Stages a new secret of 32 bytes, used as soon as it is durable. Returns it as base64url, once."""
        secret = self._writer.entropy.token(32)
        self._writer.also(Put("device_secrets", (device_id, secret)))
        self._writer.then(lambda: self._held.update({device_id: secret}))
        return _base64url(secret).decode()

    def forget(self, device_id: str) -> None:
        def forgotten() -> None:
            self._held.pop(device_id, None)

        if device_id in self._held:
            self._writer.also(Drop("device_secrets", (device_id,)))
            self._writer.then(forgotten)


class GrantKey(msgspec.Struct, frozen=True, kw_only=True):
    """A signing key. Times in ms. A retired key is no longer in the JWKS that devices read."""

    kid: str
    private: Ed25519PrivateKey
    created_at: int
    retired_at: int | None = None


class Made(NamedTuple):
    """A signed grant: with which key, and from when to when it is valid, in seconds."""

    key: Ed25519PrivateKey | bytes
    iat: int
    exp: int
    token: str


class Grants:
    """The signing key in use, and older keys whose grants may still be valid. Call `load` first."""

    def __init__(self, writer: Writer, live: Live, secrets: Secrets, issuer: str) -> None:
        self.issuer = issuer
        self._writer, self._live, self._secrets = writer, live, secrets
        self._keys: dict[str, GrantKey] = {}
        self._made: Recent[str, Made] = Recent(KEPT)  # by command id
        self._hashes: Recent[bytes, str] = Recent(KEPT)  # hashes of parameters in grants, by SHA-256

    async def load(self) -> None:
        """Reads keys and secrets; makes a first key if there is none."""

        async def work(sql: Sql) -> tuple[list[GrantKey], list[tuple[str, bytes]]]:
            rows = await sql.all("SELECT kid, private, created_at, retired_at FROM grant_keys")
            secrets = await sql.all("SELECT device_id, secret FROM device_secrets")
            return [read_key(*row) for row in rows], [(row[0], bytes(row[1])) for row in secrets]

        storage = self._writer.storage
        keys, secrets = await storage.read(work)
        if not keys:
            keys = [self._new_key()]
            await self._writer.prepare(_row(keys[0]))
        self._keys = {key.kid: key for key in sorted(keys, key=lambda key: (key.created_at, key.kid))}
        self._secrets.take(secrets)

    # --- minting ---

    @property
    def signing(self) -> GrantKey:
        """The newest key."""
        return next(reversed(self._keys.values()))

    def mint(self, state: CommandState, now_ms: int) -> str:
        """A grant for this hand-over, as a JWT. It ends after 24 h, or earlier: when the command expires, or
        when it was closed.

        Raises:
            Unsendable: the type uses HS256 and the device has no secret.
        """
        now, exp = now_ms // 1_000, _end(state, now_ms)
        kid, key, algorithm = self._signer(state)
        # The answer to a create and a hand-over in the same second carry the same grant: sign it once.
        known = self._made.get(state.id)
        if known is not None and known[:3] == (key, now, exp):
            return known.token
        claims = {
            "iss": self.issuer,
            "aud": state.hardware_id,
            "sub": state.id,
            "jti": state.id,
            "iat": now,
            "nbf": now,
            "exp": exp,
            "cmd": state.type,
            "phs": self._hash(state),
        }
        token = _signed(claims, kid, key, algorithm)
        self._made.put(state.id, Made(key, now, exp, token))
        return token

    def _hash(self, state: CommandState) -> str:
        """The hash of the parameters. The commands of a fan-out share it, and every later grant needs it."""
        params = bytes(state.params)
        key = sha256(params).digest()
        found = self._hashes.get(key)
        if found is None:
            found = params_hash(msgspec.json.decode(params))
            self._hashes.put(key, found)
        return found

    def _signer(self, state: CommandState) -> tuple[str, Ed25519PrivateKey | bytes, str]:
        if self._live.definitions[state.definition].grant_algorithm != "HS256":
            return self.signing.kid, self.signing.private, "EdDSA"
        secret = self._secrets.get(state.device_id)
        if secret is None:
            raise Unsendable(f"{state.hardware_id} has no device secret; rotate its token to get one")
        return state.device_id, secret, "HS256"

    def shown(self, state: CommandState, now_ms: int) -> str | None:
        """A grant to show in an answer; None if the device has no secret to sign it with.

        An earlier grant is shown again until half of its life is over. The grant of a closed command has
        ended, so it is not renewed.
        """
        now, end, known = now_ms // 1_000, _end(state, now_ms), self._made.get(state.id)
        try:
            key = self._signer(state)[1]
            if known is None or known.exp > end or known.key != key:
                return self.mint(state, now_ms)
            fresh = now < (known.iat + known.exp) / 2
            return known.token if fresh or end <= now else self.mint(state, now_ms)
        except Unsendable:
            return None

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The public keys as a JWKS (RFC 7517). It never contains device secrets."""
        return {"keys": [jwk(key) for key in self._keys.values() if key.retired_at is None]}

    # --- rotation ---

    def all(self) -> list[GrantKey]:
        """All keys, oldest first; the last one signs."""
        return list(self._keys.values())

    async def rotate(self, actor: str = "operator:local") -> GrantKey:
        """Makes a new signing key. Grants of older keys stay valid until those keys are retired.

        Raises:
            Unavailable: the log could not be written.
        """
        await self._writer.room()
        key = self._new_key()
        self._writer.also(_row(key))
        self._writer.operated(actor, "grant_key.rotated", key.kid)
        await self._writer.barrier()
        self._keys[key.kid] = key
        return key

    async def retire(self, kid: str, actor: str = "operator:local") -> GrantKey:
        """Removes a key from the JWKS. Devices refuse its grants after they have read the new JWKS.

        Retiring a retired key changes nothing.

        Raises:
            Refusal: not_found; conflict for the key that signs.
            Unavailable: the log could not be written.
        """
        key = self._keys.get(kid)
        if key is None:
            raise not_found("grant key", kid)
        if key is self.signing:
            raise Refusal("conflict", f"{kid} is the key that signs; rotate first")
        if key.retired_at is None:
            await self._writer.room()
            now = self._writer.now()
            self._writer.also(Change("grant_keys", (kid,), {"retired_at": now}))
            self._writer.operated(actor, "grant_key.retired", kid)
            await self._writer.barrier()
            key = self._keys[kid] = msgspec.structs.replace(key, retired_at=now)
        return key

    def _new_key(self) -> GrantKey:
        now, entropy = self._writer.now(), self._writer.entropy
        private = Ed25519PrivateKey.from_private_bytes(entropy.token(32))
        return GrantKey(kid=new_id("key", now, entropy), private=private, created_at=now)


def _end(state: CommandState, now_ms: int) -> int:
    """When a grant signed now ends, in seconds: after 24 h, or earlier with its command."""
    ends = (end // 1_000 for end in (state.expires_at, state.closed_at) if end is not None)
    return min([now_ms // 1_000 + LIFE_SEC, *ends])


def _signed(claims: dict[str, Any], kid: str, key: Ed25519PrivateKey | bytes, algorithm: str) -> str:
    """The same as `jwt.encode`, which makes and checks the header and the key again for each token."""
    text = _header(kid, algorithm) + b"." + _base64url(msgspec.json.encode(claims))
    signature = jwt.get_algorithm_by_name(algorithm).sign(text, key)
    return (text + b"." + _base64url(signature)).decode()


@lru_cache(KEPT)
def _header(kid: str, algorithm: str) -> bytes:
    return _base64url(msgspec.json.encode({"alg": algorithm, "kid": kid, "typ": TYPE}))


def _base64url(value: bytes) -> bytes:
    return base64.urlsafe_b64encode(value).rstrip(b"=")


def jwk(key: GrantKey) -> dict[str, str]:
    """The public key as a JWK (RFC 8037)."""
    public = key.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    x = _base64url(public).decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": key.kid, "use": "sig", "alg": "EdDSA"}


def read_key(kid: str, private: bytes, created_at: int, retired_at: int | None) -> GrantKey:
    """The key in a row of the table `grant_keys`."""
    loaded = Ed25519PrivateKey.from_private_bytes(bytes(private))
    return GrantKey(kid=kid, private=loaded, created_at=created_at, retired_at=retired_at)


def _row(key: GrantKey) -> New:
    raw = key.private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return New("grant_keys", (key.kid, raw, key.created_at, None))
