"""Verification of grants on the device. A grant is a signed permission for one device to execute one command
within a limited time.

Pure: the time is a parameter. Any other token is refused with `GrantRefused`. This module must never accept a
signature algorithm that does not belong to the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

import msgspec
import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta

TYPE = "grant+jwt"
MAX_DEPTH = 64  # deeper parameters are left to the slower encoder
_PLAIN = frozenset({dict, list, str, int, bool, type(None)})
_EXACT = 2**53 - 1
# Tolerance for clock differences, for `iat` and `nbf`. Not for `exp`: a command must not outlive its grant.
LEEWAY_SEC = 30
MIN_SECRET_BYTES = 32
MAX_TOKEN_CHARS = 8_192
LAST_SEC = 2**53  # a larger number of seconds cannot be compared with a clock

# The points of small order on Ed25519, without the sign bit, also in their forms that are not reduced. A
# signature under such a key can be made without a private key. Source: RFC 8032, section 5.1; libsodium.
SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)

Key = Ed25519PublicKey | bytes


class GrantRefused(Exception):
    """The grant does not allow this command. `code` is for programs, `sentence` for people."""

    def __init__(self, code: str, sentence: str) -> None:
        self.code, self.sentence = code, sentence
        super().__init__(f"{code}: {sentence}")


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """The claims of a grant: what a device checks after the signature."""

    iss: Annotated[str, Meta(description="The broker's setting `issuer`.")]
    aud: Annotated[str, Meta(description="The device's hardware id.")]
    sub: Annotated[str, Meta(description="The command's id.")]
    jti: Annotated[str, Meta(description="The command's id again, the same for each hand-over.")]
    iat: Annotated[int, Meta(ge=0, le=LAST_SEC, description="When it was made, in seconds since 1970.")]
    nbf: Annotated[int, Meta(ge=0, le=LAST_SEC, description="Not valid before.")]
    exp: Annotated[
        int,
        Meta(ge=0, le=LAST_SEC, description="Not valid from then on: the command's end, at most 24 hours."),
    ]
    cmd: Annotated[str, Meta(description="The command's type.")]
    phs: Annotated[
        str,
        Meta(description="base64url without padding of SHA-256 of the parameters in their RFC 8785 form."),
    ]


def params_hash(params: Any) -> str:
    """base64url (no padding) of SHA-256 over the RFC 8785 form of the parameters.

    Raises:
        ValueError: RFC 8785 cannot represent the parameters.
    """
    try:
        canonical = (
            msgspec.json.encode(params, order="sorted") if _is_plain(params) else rfc8785.dumps(params)
        )
    except RecursionError as error:
        raise ValueError("parameters nested too deeply") from error
    return base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()


def _is_plain(params: Any) -> bool:
    """Whether msgspec writes this value as RFC 8785 does, only ten times as fast: there are no fractions, no
    large numbers, and all keys are in ASCII, which sort alike as bytes and as UTF-16."""
    level: list[Any] = [params]
    for _ in range(MAX_DEPTH):
        kinds = set(map(type, level))
        if not kinds <= _PLAIN:
            return False
        if int in kinds and any(not -_EXACT <= each <= _EXACT for each in level if type(each) is int):
            return False
        maps = [each for each in level if type(each) is dict]
        if not all(type(key) is str and key.isascii() for each in maps for key in each):
            return False
        level = [item for each in level if type(each) is list for item in each]
        level += [item for each in maps for item in each.values()]
        if not level:
            return True
    return False


def secret_key(device_secret: str) -> bytes:
    """The HS256 key in a `device_secret`.

    Raises:
        ValueError: it is not base64url.
    """
    return _unbase64(device_secret)


def keys_from_jwks(document: Any) -> dict[str, Key]:
    """The Ed25519 signature keys of a JWKS, by `kid`. Keys of other kinds are ignored.

    Raises:
        ValueError: the JWKS is malformed, two keys have the same `kid`, or a key is of small order.
    """
    entries = document.get("keys") if isinstance(document, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError("a JWKS is an object with a list `keys`")
    keys: dict[str, Key] = {}
    for entry in entries:
        if not isinstance(entry, dict) or (entry.get("kty"), entry.get("crv")) != ("OKP", "Ed25519"):
            continue
        if entry.get("alg", "EdDSA") != "EdDSA" or entry.get("use", "sig") != "sig":
            continue
        kid, x = entry.get("kid"), entry.get("x")
        if not isinstance(kid, str) or not isinstance(x, str):
            raise ValueError("an Ed25519 key needs `kid` and `x`")
        if kid in keys:
            raise ValueError(f"two keys have the kid {kid!r}")
        try:
            keys[kid] = ed25519_key(x)
        except ValueError as error:
            raise ValueError(f"the key {kid!r}: {error}") from error
    return keys


def ed25519_key(text: str) -> Ed25519PublicKey:
    """The public key in base64url, as `x` in a JWK.

    Raises:
        ValueError: it is not such a key, or it is a point of small order.
    """
    raw = _unbase64(text)
    if raw[:-1] + bytes([raw[-1] & 0x7F] if raw else []) in SMALL_ORDER:
        raise ValueError("a point of small order: anyone can sign for it")
    return Ed25519PublicKey.from_public_bytes(raw)


class GrantVerifier:
    """Verifies grants for one device. The type of the key with the grant's `kid` fixes the algorithm: bytes
    need HS256, an Ed25519 key needs EdDSA."""

    def __init__(
        self, keys: Mapping[str, Key], issuer: str, hardware_id: str, now: Callable[[], float]
    ) -> None:
        self.use(keys)
        self._issuer, self._hardware_id, self._now = issuer, hardware_id, now

    def use(self, keys: Mapping[str, Key]) -> None:
        """Replaces all keys, for example after the JWKS was read again, or after a new secret.

        Raises:
            ValueError: an HS256 secret is too short.
        """
        for kid, key in keys.items():
            if isinstance(key, bytes) and len(key) < MIN_SECRET_BYTES:
                raise ValueError(f"the HS256 secret {kid!r} is shorter than {MIN_SECRET_BYTES} bytes")
        self._keys = dict(keys)

    def knows(self, token: str) -> bool:
        """Whether there is a key with the `kid` that a grant names. Nothing of the grant is verified.

        Raises:
            GrantRefused: it is not a grant.
        """
        kid = header_of(token).get("kid")
        return isinstance(kid, str) and kid in self._keys

    def verify(self, token: str | None, *, command_id: str, command: str, params: Any) -> Claims:
        """Returns the claims of a grant that allows exactly this command with these parameters.

        Raises:
            GrantRefused: the grant does not allow it.
        """
        if not token:
            raise GrantRefused("missing", "the command came without a grant")
        claims = _claims(self._verified_payload(token))
        self._check_time(claims)
        self._check_purpose(claims, command_id, command, params)
        return claims

    def _verified_payload(self, token: str) -> bytes:
        if len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise GrantRefused("malformed", "the grant is not a token of at most 8,192 characters")
        header = header_of(token)
        if header.get("typ") != TYPE:
            raise GrantRefused("wrong_type", f"the token's typ is {header.get('typ')!r:.40}, not {TYPE}")
        kid = header.get("kid")
        key = self._keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            raise GrantRefused("unknown_key", f"there is no key with the kid {kid!r:.80}")
        return signed_payload(token, key)

    def _check_time(self, claims: Claims) -> None:
        now = self._now()
        if now >= claims.exp:
            raise GrantRefused("expired", f"the grant ended {now - claims.exp:.0f} s ago")
        if claims.nbf > now + LEEWAY_SEC or claims.iat > now + LEEWAY_SEC:
            ahead = max(claims.nbf, claims.iat) - now
            raise GrantRefused("not_yet_valid", f"the grant begins in {ahead:.0f} s")

    def _check_purpose(self, claims: Claims, command_id: str, command: str, params: Any) -> None:
        if claims.iss != self._issuer:
            raise GrantRefused("wrong_issuer", f"issued by {claims.iss!r:.80}, not by {self._issuer!r}")
        if claims.aud != self._hardware_id:
            raise GrantRefused("wrong_device", f"for device {claims.aud!r:.80}, not {self._hardware_id!r}")
        if claims.sub != command_id or claims.jti != command_id or claims.cmd != command:
            raise GrantRefused("wrong_command", f"for command {claims.sub!r:.80} ({claims.cmd!r:.80})")
        try:
            hashed = params_hash(params)
        except ValueError as error:
            raise GrantRefused("changed_parameters", f"the parameters cannot be hashed: {error}") from error
        if not hmac.compare_digest(claims.phs.encode(), hashed.encode()):
            raise GrantRefused("changed_parameters", "the parameters are not those that were granted")


def signed_payload(token: str, key: Key) -> bytes:
    """The payload of a JWS in compact form (RFC 7515), if this key signed it with the algorithm of its kind.

    A token has only one spelling, so that nobody can change it and keep it valid.

    Raises:
        GrantRefused: it is not such a token, or the signature is not this key's.
    """
    parts = token.split(".")
    if len(parts) != 3:
        raise GrantRefused("malformed", f"a token has three parts, this one has {len(parts)}")
    header = _object("header", parts[0])
    payload, signature = _part("payload", parts[1]), _part("signature", parts[2])
    algorithm = "HS256" if isinstance(key, bytes) else "EdDSA"
    if header.get("alg") != algorithm:
        raise GrantRefused(
            "wrong_algorithm", f"alg is {header.get('alg')!r:.40}, this key is for {algorithm}"
        )
    if "crit" in header or "b64" in header:
        raise GrantRefused("malformed", "the header needs JWS extensions, which are not supported")
    # PyJWT would take ten times as long for a large payload.
    if not _fits(key, f"{parts[0]}.{parts[1]}".encode(), signature):
        raise GrantRefused("bad_signature", "the signature does not match the token")
    return payload


def header_of(token: str) -> dict[str, Any]:
    """The header of a token, of which nothing is verified yet.

    Raises:
        GrantRefused: it is not a JSON object in base64url.
    """
    return _object("header", token.partition(".")[0])


def _fits(key: Key, signed: bytes, signature: bytes) -> bool:
    if isinstance(key, bytes):
        return hmac.compare_digest(hmac.digest(key, signed, "sha256"), signature)
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _claims(payload: bytes) -> Claims:
    found = _strict_json("payload", payload)
    missing = [name for name in Claims.__struct_fields__ if name not in found]
    if missing:
        raise GrantRefused("missing_claim", f"the grant has no {', '.join(missing)}")
    try:
        return msgspec.convert(found, Claims)
    except msgspec.ValidationError as error:
        raise GrantRefused("malformed", f"a claim has the wrong type: {error}") from error


def _object(name: str, segment: str) -> dict[str, Any]:
    return _strict_json(name, _part(name, segment))


def _part(name: str, text: str) -> bytes:
    """Decodes one part of a token. Raises `GrantRefused` for every spelling but the one of RFC 7515."""
    try:
        raw = _unbase64(text)
    except ValueError:
        raw = b""
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != text:
        raise GrantRefused("malformed", f"the {name} is not base64url without padding")
    return raw


def _strict_json(name: str, raw: bytes) -> dict[str, Any]:
    """Parses JSON and refuses duplicate members. PyJWT keeps the last of two equal members, other parsers the
    first, so the same token could mean two things."""
    try:
        found = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise GrantRefused("malformed", f"the {name} is not plain JSON: {error}") from error
    if not isinstance(found, dict):
        raise GrantRefused("malformed", f"the {name} is not a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same member twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _unbase64(text: str) -> bytes:
    return binascii.a2b_base64(
        text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), strict_mode=True
    )
