"""The three grant checks in the docs: each accepts the genuine grant and refuses every forgery."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from devices.grant import params_hash
from tests.packages import EXAMPLES, has_c, node_modules
from tests.sdk_driver import WITHIN_SEC, node

DEVICE = "door-7"
COMMAND: dict[str, Any] = {"id": "cmd_1", "type": "unlock", "params": {"for_sec": 5, "b": ["ü", 1.5, None]}}
OURS, OTHERS = (
    Ed25519PrivateKey.from_private_bytes(b"1" * 32),
    Ed25519PrivateKey.from_private_bytes(b"2" * 32),
)
PUBLIC = OURS.public_key().public_bytes_raw()
X = base64.urlsafe_b64encode(PUBLIC).rstrip(b"=").decode()
JWKS = {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": X, "kid": "key_1", "use": "sig", "alg": "EdDSA"}]}
NOW = int(time.time())
CLAIMS = {
    "iss": "ordain", "aud": DEVICE, "sub": "cmd_1", "jti": "cmd_1", "iat": NOW, "nbf": NOW,
    "exp": NOW + 86_400,
    "cmd": "unlock", "phs": params_hash(COMMAND["params"]),
}  # fmt: skip

Check = Callable[[list[str]], list[bool]]


def grant(
    key: Any = OURS, algorithm: str = "EdDSA", typ: str = "grant+jwt", kid: str = "key_1", **claims: Any
) -> str:
    said = {name: value for name, value in (CLAIMS | claims).items() if value is not None}
    return jwt.encode(said, key, algorithm, {"typ": typ, "kid": kid})


def spliced(**claims: Any) -> str:
    """Other claims under a genuine signature."""
    header, _, signature = grant().split(".")
    payload = base64.urlsafe_b64encode(json.dumps(CLAIMS | claims).encode()).rstrip(b"=").decode()
    return f"{header}.{payload}.{signature}"


def hmac_with_the_public_key() -> str:
    """PyJWT refuses to make one, so it is made by hand."""

    def encoded(part: bytes) -> str:
        return base64.urlsafe_b64encode(part).rstrip(b"=").decode()

    header = {"typ": "grant+jwt", "kid": "key_1", "alg": "HS256"}
    signed = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(CLAIMS).encode())}"
    return f"{signed}.{encoded(hmac.digest(PUBLIC, signed.encode(), hashlib.sha256))}"


FORGED = {
    "no grant": "",
    "signed by another key": grant(OTHERS),
    "another device": grant(aud="door-8"),
    "another command": grant(sub="cmd_2"),
    "another type": grant(cmd="lock"),
    "other parameters": grant(phs=params_hash({"for_sec": 6})),
    "another broker": grant(iss="somebody"),
    "expired": grant(exp=NOW - 1, nbf=NOW - 60, iat=NOW - 60),
    "not valid yet": grant(nbf=NOW + 43_200, iat=NOW + 43_200),
    "no end": grant(exp=None),
    "another kind of token": grant(typ="JWT"),
    "no signature": jwt.encode(CLAIMS, "", "none", {"typ": "grant+jwt", "kid": "key_1"}),
    "hmac with the public key": hmac_with_the_public_key(),
    "claims changed": spliced(aud="door-8"),
    "cut short": grant()[:-6],
    "not a token": "a.b.c",
}


def python(grants: list[str]) -> list[bool]:
    spec = importlib.util.spec_from_file_location("grant", EXAMPLES / "device-python" / "grant.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = module.keys_of(JWKS)

    def good(token: str) -> bool:
        try:
            module.check(token, COMMAND, DEVICE, keys)
        except jwt.InvalidTokenError:
            return False
        return True

    return [good(token) for token in grants]


def javascript(grants: list[str], home: Path) -> list[bool]:
    example = EXAMPLES / "device-node"
    (home / "node_modules").symlink_to(node_modules(example))
    (home / "grant.mjs").write_text((example / "grant.mjs").read_text())
    (home / "asks.mjs").write_text(f"""
        import {{ createLocalJWKSet }} from "jose";
        import {{ check }} from "./grant.mjs";
        const keys = createLocalJWKSet({json.dumps(JWKS)});
        for (const grant of {json.dumps(grants)}) {{
          const checked = check(grant, {json.dumps(COMMAND)}, "{DEVICE}", keys);
          console.log(await checked.then(() => true, () => false));
        }}""")
    done = subprocess.run([node(), "asks.mjs"], cwd=home, capture_output=True, text=True, timeout=WITHIN_SEC)
    assert done.returncode == 0, done.stderr
    return [line == "true" for line in done.stdout.splitlines()]


def c(grants: list[str], home: Path) -> list[bool]:
    has_c()
    sources = [str(EXAMPLES / "device-c" / name) for name in ("check.c", "grant.c")]
    program = str(home / "check")
    subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Werror", *sources, "-lcjson", "-lcrypto", "-o", program], check=True
    )
    params = rfc8785.dumps(COMMAND["params"]).decode()
    asked = [X, DEVICE, COMMAND["id"], COMMAND["type"], params]
    return [subprocess.run([program, *asked, token]).returncode == 0 for token in grants]


@pytest.mark.parametrize("language", ["python", "node", "c"])
def test_the_grant_check_accepts_the_genuine_grant_and_no_forgery(language: str, tmp_path: Path) -> None:
    checks: dict[str, Check] = {
        "python": python,
        "node": lambda grants: javascript(grants, tmp_path),
        "c": lambda grants: c(grants, tmp_path),
    }
    good, *taken = checks[language]([grant(), *FORGED.values()])
    assert good
    assert [name for name, was in zip(FORGED, taken, strict=True) if was] == []
