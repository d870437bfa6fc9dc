"""Grants: one valid grant, and everything that must be refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from devices.grant import (
    SMALL_ORDER,
    TYPE,
    GrantRefused,
    GrantVerifier,
    Key,
    keys_from_jwks,
    params_hash,
    secret_key,
)

NOW = 1_800_000_000.0
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC_RAW = PRIVATE.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
SECRET = b"s" * 32
PARAMS = {"b": 1, "a": [True, None]}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims(**changed: Any) -> dict[str, Any]:
    """The claims of the valid grant; a change to None removes the claim."""
    good = {
        "iss": "ordain",
        "aud": "ABC",
        "sub": "cmd_1",
        "jti": "cmd_1",
        "iat": int(NOW),
        "nbf": int(NOW),
        "exp": int(NOW) + 60,
        "cmd": "lock",
        "phs": params_hash(PARAMS),
    }
    return {name: value for name, value in (good | changed).items() if value is not None}


def minted(payload: dict[str, Any] | None = None, **header: Any) -> str:
    headers = {"typ": TYPE, "kid": "k1"} | header
    algorithm = headers.pop("alg", "EdDSA")
    return jwt.encode(payload or claims(), PRIVATE, algorithm=algorithm, headers=headers)


def signed(header: str, payload: str, secret: bytes | None = None) -> str:
    """A token with exactly these texts; no JWT library would mint it."""
    body = f"{base64url(header.encode())}.{base64url(payload.encode())}"
    if secret is None:
        return f"{body}.{base64url(PRIVATE.sign(body.encode()))}"
    return f"{body}.{base64url(hmac.digest(secret, body.encode(), 'sha256'))}"


def verifier(now: float = NOW, hardware_id: str = "ABC") -> GrantVerifier:
    keys: dict[str, Key] = {"k1": PRIVATE.public_key(), "small": SECRET}
    return GrantVerifier(keys, "ordain", hardware_id, lambda: now)


def refused(token: str | None, by: GrantVerifier | None = None, **asked: Any) -> str:
    request: dict[str, Any] = {"command_id": "cmd_1", "command": "lock", "params": PARAMS} | asked
    with pytest.raises(GrantRefused) as refusal:
        (by or verifier()).verify(token, **request)
    assert refusal.value.sentence
    return refusal.value.code


def test_a_valid_grant_is_accepted() -> None:
    found = verifier().verify(
        minted(), command_id="cmd_1", command="lock", params={"a": [True, None], "b": 1}
    )

    assert (found.aud, found.jti, found.exp) == ("ABC", "cmd_1", int(NOW) + 60)


def test_a_small_device_may_use_a_shared_secret() -> None:
    token = jwt.encode(claims(), SECRET, algorithm="HS256", headers={"typ": TYPE, "kid": "small"})

    assert verifier().verify(token, command_id="cmd_1", command="lock", params=PARAMS).sub == "cmd_1"


def test_a_grant_for_something_else_is_refused() -> None:
    assert refused(minted(), verifier(hardware_id="XYZ")) == "wrong_device"
    assert refused(minted(claims(aud=["ABC"]))) == "malformed"
    assert refused(minted(), command="unlock") == "wrong_command"
    assert refused(minted(), command_id="cmd_2") == "wrong_command"
    assert refused(minted(claims(jti="cmd_2"))) == "wrong_command"
    assert refused(minted(claims(iss="else"))) == "wrong_issuer"


@pytest.mark.parametrize(
    "params", [{}, {"b": 1}, {"b": 2, "a": [True, None]}, None, {"b": 2**60}, {"b": {1}}]
)
def test_changed_parameters_are_refused(params: Any) -> None:
    assert refused(minted(), params=params) == "changed_parameters"


def test_a_grant_expires_without_tolerance_and_starts_with_a_small_one() -> None:
    assert refused(minted(), verifier(NOW + 60)) == "expired"
    assert refused(minted(), verifier(NOW - 31)) == "not_yet_valid"
    assert refused(minted(claims(iat=int(NOW) + 31))) == "not_yet_valid"
    early = verifier(NOW - 30).verify(minted(), command_id="cmd_1", command="lock", params=PARAMS)
    assert early.nbf == int(NOW)


@pytest.mark.parametrize("name", list(claims()))
def test_every_claim_is_required(name: str) -> None:
    assert refused(minted(claims(**{name: None}))) == "missing_claim"


@pytest.mark.parametrize(
    ("name", "value"), [("exp", "1"), ("exp", True), ("nbf", 1.5), ("sub", 1), ("phs", [])]
)
def test_a_claim_of_the_wrong_type_is_refused(name: str, value: Any) -> None:
    payload = json.dumps(claims() | {name: value})

    assert refused(signed(json.dumps({"alg": "EdDSA", "typ": TYPE, "kid": "k1"}), payload)) == "malformed"


def test_the_key_decides_the_algorithm() -> None:
    payload = json.dumps(claims())

    def header(algorithm: str, kid: str) -> str:
        return json.dumps({"alg": algorithm, "typ": TYPE, "kid": kid})

    assert refused(signed(header("HS256", "k1"), payload, PUBLIC_RAW)) == "wrong_algorithm"
    assert refused(signed(header("EdDSA", "small"), payload)) == "wrong_algorithm"
    assert refused(signed(header("none", "k1"), payload).rpartition(".")[0] + ".") == "wrong_algorithm"
    assert refused(signed(header("HS512", "small"), payload, SECRET)) == "wrong_algorithm"


def test_a_token_of_another_kind_is_refused() -> None:
    assert refused(minted(typ="JWT")) == "wrong_type"
    assert refused(minted(typ=None)) == "wrong_type"
    assert refused(minted(kid="k2")) == "unknown_key"
    assert refused(minted(kid="")) == "unknown_key"
    assert refused(None) == "missing"


def test_a_foreign_signature_is_refused() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"x" * 32)
    token = jwt.encode(claims(), stranger, algorithm="EdDSA", headers={"typ": TYPE, "kid": "k1"})
    head, payload, _ = minted().split(".")

    assert refused(token) == "bad_signature"
    assert refused(f"{head}.{payload}.{base64url(bytes(64))}") == "bad_signature"


def test_a_duplicate_member_is_refused() -> None:
    header, payload = json.dumps({"alg": "EdDSA", "typ": TYPE, "kid": "k1"}), json.dumps(claims())

    assert refused(signed(header.replace("{", '{"kid": "small", '), payload)) == "malformed"
    assert refused(signed(header, payload.replace("{", '{"aud": "XYZ", '))) == "malformed"
    assert refused(signed(header, payload.replace("{", '{"more": NaN, '))) == "malformed"
    assert refused(signed(header, "[" * 5_000)) == "malformed"
    assert refused(signed(header.replace("{", '{"crit": ["b64"], "b64": false, '), payload)) == "malformed"


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: f"{base64url(raw)}.e30.e30"))
def test_any_text_that_is_no_grant_is_refused(token: str) -> None:
    assert refused(token)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        GrantVerifier({"k": b"short"}, "ordain", "ABC", lambda: NOW)


def test_the_hash_uses_the_canonical_form() -> None:
    numbers = [333333333.33333329, 1e30, 4.50, 2e-3, 1e-27]
    canonical = '{"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"€":"\\n","😀":1,"\ufb33":2}'

    found = params_hash({"\ufb33": 2, "😀": 1.0, "€": "\n", "numbers": numbers})

    assert found == base64url(hashlib.sha256(canonical.encode()).digest())


@given(JSON)
def test_the_fast_encoder_and_the_one_for_every_value_agree(params: Any) -> None:
    canonical = base64url(hashlib.sha256(rfc8785.dumps(params)).digest())

    assert params_hash(params) == canonical
    assert params_hash([True, 2**53 - 1, {"b": '\x00\x1f\x7f\u2028"\\/', "B": None}]) == base64url(
        hashlib.sha256(
            b'[true,9007199254740991,{"B":null,"b":"\\u0000\\u001f\x7f\xe2\x80\xa8\\"\\\\/"}]'
        ).digest()
    )


@given(st.dictionaries(st.text(), JSON, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_change_the_hash(params: dict[str, Any], order: Any) -> None:
    shuffled = list(params.items())
    order.shuffle(shuffled)

    assert params_hash(dict(shuffled)) == params_hash(params)


@given(JSON, JSON)
def test_other_parameters_have_another_hash(one: Any, other: Any) -> None:
    def marked(value: Any) -> str:
        return json.dumps(json.loads(json.dumps(value), parse_float=_as_ecmascript), sort_keys=True)

    assert (params_hash(one) == params_hash(other)) == (marked(one) == marked(other))


def _as_ecmascript(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number


def test_values_without_a_canonical_form_have_no_hash() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for params in (2**53, float("nan"), "\ud800", object(), deep):
        with pytest.raises(ValueError):
            params_hash(params)


def test_the_keys_of_a_jwks_are_its_ed25519_signature_keys() -> None:
    good = {
        "kty": "OKP",
        "crv": "Ed25519",
        "kid": "k1",
        "use": "sig",
        "alg": "EdDSA",
        "x": base64url(PUBLIC_RAW),
    }
    others: list[Any] = [{"kty": "RSA", "kid": "r"}, good | {"kid": "e", "use": "enc"}, 5]

    keys = keys_from_jwks({"keys": [good, *others]})

    assert list(keys) == ["k1"]
    GrantVerifier(keys, "ordain", "ABC", lambda: NOW).verify(
        minted(), command_id="cmd_1", command="lock", params=PARAMS
    )


@pytest.mark.parametrize("change", [{"x": "AA"}, {"x": "é"}, {"x": 1}, {"kid": None}, {"x": None}])
def test_a_broken_key_is_refused(change: dict[str, Any]) -> None:
    good = {"kty": "OKP", "crv": "Ed25519", "kid": "k1", "x": base64url(PUBLIC_RAW)}

    with pytest.raises(ValueError):
        keys_from_jwks({"keys": [good | change]})
    with pytest.raises(ValueError, match="two keys"):
        keys_from_jwks({"keys": [good, good]})
    with pytest.raises(ValueError, match="list"):
        keys_from_jwks({})
    for document in (["keys"], "keys", None):
        with pytest.raises(ValueError, match="a list `keys`"):
            keys_from_jwks(document)


def test_a_device_refuses_an_unknown_key_until_it_reads_the_keys_again() -> None:
    old, new = PRIVATE, Ed25519PrivateKey.from_private_bytes(b"n" * 32)
    by_old, by_new = minted(kid="old"), jwt.encode(claims(), new, "EdDSA", {"typ": TYPE, "kid": "new"})
    device = GrantVerifier({"old": old.public_key()}, "ordain", "ABC", lambda: NOW)

    assert accepted(by_old, device)
    assert refused(by_new, device) == "unknown_key"

    device.use({"old": old.public_key(), "new": new.public_key()})
    assert accepted(by_old, device)
    assert accepted(by_new, device)

    device.use({"new": new.public_key()})
    assert refused(by_old, device) == "unknown_key"
    assert accepted(by_new, device)


def test_a_device_secret_is_the_key_decoded_from_its_text() -> None:
    shown = base64url(SECRET)

    assert secret_key(shown) == SECRET
    with pytest.raises(ValueError):
        secret_key("no base64url!")
    with pytest.raises(ValueError, match="shorter than 32"):
        verifier().use({"dev_1": secret_key(shown[:20])})


def accepted(token: str, by: GrantVerifier) -> bool:
    return by.verify(token, command_id="cmd_1", command="lock", params=PARAMS).sub == "cmd_1"


def test_a_key_of_small_order_is_refused() -> None:
    for raw in SMALL_ORDER:
        for sign in (0, 0x80):
            point = raw[:-1] + bytes([raw[-1] | sign])
            entry = {
                "kty": "OKP",
                "crv": "Ed25519",
                "kid": "k",
                "x": base64.urlsafe_b64encode(point).decode(),
            }
            with pytest.raises(ValueError, match="small order"):
                keys_from_jwks({"keys": [entry]})


def test_times_that_no_clock_can_reach_are_refused() -> None:
    for field in ("iat", "nbf", "exp"):
        for value in (10**400, -(10**400), 2**53 + 1, -1):
            assert refused(minted(claims(**{field: value}))) == "malformed"
