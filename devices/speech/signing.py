"""Signed answers: the answer of a device as a JWS in compact form (RFC 7515), signed with its own key.

Pure. The payload of the JWS is the answer as JSON, with the device's hardware id as `iss`. Its header says
`typ: "answer+jwt"`, so that no grant can be taken for an answer, nor an answer for a grant. This module must
never accept an algorithm that does not belong to the key.
"""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from typing import Annotated

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import Meta

from devices.grant import GrantRefused, Key, ed25519_key, header_of, signed_payload

TYPE = "answer+jwt"
KEY_CHARS = 43  # of 32 bytes in base64url without padding
START = b"eyJ"  # base64url of `{"` and a letter: how a JWS begins

SigningKey = Ed25519PrivateKey | bytes


class _Signed(msgspec.Struct):
    """What a signed answer has beside the fields of an answer."""

    iss: str
    seq: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None


_decode = msgspec.json.Decoder(_Signed).decode


def looks_signed(payload: bytes) -> bool:
    """Whether a message is meant as a JWS. No JSON, msgpack or bare answer looks like one."""
    return payload.startswith(START) and payload.count(b".") == 2


def sign(answer: bytes, hardware_id: str, key: SigningKey) -> bytes:
    """An answer in its JSON form, signed by this device."""
    payload = b'{"iss":' + msgspec.json.encode(hardware_id) + b"," + answer[1:]
    algorithm = "HS256" if isinstance(key, bytes) else "EdDSA"
    return jwt.PyJWS().encode(payload, key, algorithm=algorithm, headers={"typ": TYPE}).encode()


def is_signed_by(token: str, hardware_id: str, key: Key) -> bool:
    """Whether this device signed the answer, with this key."""
    try:
        if header_of(token).get("typ") != TYPE:
            return False
        payload = signed_payload(token, key)
    except GrantRefused:
        return False
    try:
        return _read(payload).iss == hardware_id
    except ValueError:
        return False


def unverified(token: str) -> tuple[bytes, int | None]:
    """The answer in a JWS, and its `seq`. The signature is not looked at.

    Raises:
        ValueError: it is not a JWS of an answer.
    """
    middle = token.split(".")[1]
    text = binascii.a2b_base64(middle.replace("-", "+").replace("_", "/") + "=" * (-len(middle) % 4))
    if not text.startswith(b"{"):
        raise ValueError("its payload is not a JSON object")
    return text, _read(text).seq


def _read(payload: bytes) -> _Signed:
    """Raises ValueError if it is not the payload of an answer."""
    payload.decode()  # msgspec skips members that it does not know, without a look at their bytes
    try:
        return _decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


@lru_cache(maxsize=4_096)
def public_key(text: str) -> Ed25519PublicKey:
    """The Ed25519 key that a device signs its answers with: base64url, as `x` in a JWK.

    Raises:
        ValueError: it is not such a key, or it is a point of small order.
    """
    if len(text) != KEY_CHARS:
        raise ValueError(f"{len(text)} characters; 32 bytes in base64url without padding have {KEY_CHARS}")
    key = ed25519_key(text)
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    if base64.urlsafe_b64encode(raw).decode().rstrip("=") != text:
        raise ValueError("not base64url in its only spelling")
    return key
