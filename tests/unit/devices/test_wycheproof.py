"""The vectors of Project Wycheproof for JWS and Ed25519 against what verifies grants, and against a broker's
signatures that were changed in the same ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
import pytest

from devices.grant import GrantRefused, GrantVerifier, keys_from_jwks, secret_key, signed_payload
from tests.unit.devices.test_grant import base64url, minted, refused

HERE = Path(__file__).parent / "wycheproof"
# The order of the group of points: adding it to the number in a signature gives the same equation (RFC 8032).
ORDER = 2**252 + 27742317777372353535851937790883648493
# Their text says why they are not judged as the file says: it lost the padding that makes two of them wrong
# (they equal a valid one), and holds two valid ones with a character that base64url does not have.
LOST_PADDING, FOREIGN_CHARACTER = (367, 370), (372, 373)


def vectors(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE / name).read_text())
    return found


def named(vector: dict[str, Any]) -> str:
    return f"{vector['tcId']}-{vector['comment'] or '-'.join(vector['flags'])}".replace(" ", "_")[:60]


@pytest.mark.parametrize("vector", vectors("jws.json"), ids=named)
def test_a_token_signed_with_a_secret_is_judged_as_the_vector_says(vector: dict[str, Any]) -> None:
    good = vector["result"] == "valid" and vector["alg"] == "HS256"
    good = (good and vector["tcId"] not in FOREIGN_CHARACTER) or vector["tcId"] in LOST_PADDING
    try:
        key = secret_key(vector["k"])
        GrantVerifier({"k": key}, "ordain", "ABC", lambda: 0.0)  # refuses secrets that are too short
        payload = signed_payload(vector["jws"], key)
    except (GrantRefused, ValueError):
        assert not good
        return

    assert good
    header, body, _ = vector["jws"].split(".")
    assert base64url(payload) == body
    raw = header + "." + body
    assert vector["jws"] == f"{raw}.{base64url(jwt.get_algorithm_by_name('HS256').sign(raw.encode(), key))}"


@pytest.mark.parametrize("vector", vectors("ed25519.json"), ids=named)
def test_an_ed25519_signature_is_judged_as_the_vector_says(vector: dict[str, Any]) -> None:
    jwks = {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k1", "x": vector["x"]}]}
    key = keys_from_jwks(jwks)["k1"]
    message, signature = bytes.fromhex(vector["msg"]), bytes.fromhex(vector["sig"])

    judged = jwt.get_algorithm_by_name("EdDSA").verify(message, key, signature)

    assert judged == (vector["result"] == "valid")


def test_a_grant_whose_signature_was_changed_in_the_ways_of_the_vectors_is_refused() -> None:
    head, payload, seal = minted().split(".")
    raw = jwt.utils.base64url_decode(seal)
    number = int.from_bytes(raw[32:], "little")
    same_equation = raw[:32] + (number + ORDER).to_bytes(32, "little")
    changed = [same_equation, raw + b"\0", raw[:-1], b"", raw[32:] + raw[:32], raw[:32] + bytes(32)]

    for signature in changed:
        assert refused(f"{head}.{payload}.{base64url(signature)}") in ("bad_signature", "malformed")


@pytest.mark.parametrize("foreign", [" ", "?", "\n", "=", "==", "+", "/", "%3D"])
def test_a_token_has_only_one_spelling(foreign: str) -> None:
    parts = minted().split(".")

    for place in range(3):
        for at in (0, 5, len(parts[place])):
            spelled = [*parts]
            spelled[place] = parts[place][:at] + foreign + parts[place][at:]
            assert refused(".".join(spelled)) in ("malformed", "bad_signature")


def test_the_unused_bits_at_the_end_of_a_part_are_zero() -> None:
    head, payload, seal = minted().split(".")  # 64 bytes: two characters stand for the last byte
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = letters.index(seal[-1])
    assert last % 16 == 0

    for bit in (1, 2, 4, 8):
        assert refused(f"{head}.{payload}.{seal[:-1]}{letters[last + bit]}") == "malformed"
