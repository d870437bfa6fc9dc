"""The check of a grant, for a device in Python without the agent. Needs `pyjwt[crypto]` and `rfc8785`."""

import base64
import hashlib
from typing import Any

import jwt
import rfc8785


# begin check
def check(grant: str, command: dict[str, Any], hardware_id: str, keys: dict[str, jwt.PyJWK]) -> None:
    """Raises unless the grant allows this device exactly this command; `keys` of the JWKS by `kid`."""
    header = jwt.get_unverified_header(grant)
    if header.get("typ") != "grant+jwt" or header.get("kid") not in keys:
        raise jwt.InvalidTokenError("not a grant, or signed with a key that is not known")
    claims = jwt.decode(
        grant, keys[header["kid"]], algorithms=["EdDSA"], audience=hardware_id, issuer="ordain",
        options={"require": ["exp", "nbf", "sub", "cmd", "phs"]},
    )  # fmt: skip
    digest = hashlib.sha256(rfc8785.dumps(command["params"])).digest()
    phs = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    if (claims["sub"], claims["cmd"], claims["phs"]) != (command["id"], command["type"], phs):
        raise jwt.InvalidTokenError("the grant is for another command")


# end check


def keys_of(jwks: dict[str, Any]) -> dict[str, jwt.PyJWK]:
    return {key["kid"]: jwt.PyJWK(key, "EdDSA") for key in jwks["keys"]}
