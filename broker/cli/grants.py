"""`ordain grants`: the keys that sign grants. It only sends requests, and never sees a private key."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from cyclopts import App

from broker.cli.base import Config, Data, Json, ask, print_json, print_table
from broker.operations.asking import call

grants = App(name="grants", help="Keys that sign grants: list, rotate, retire.")


@grants.command(name="list")
def list_grant_keys(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """List all keys, oldest first. The last one signs."""
    found = ask(data, config, lambda client, _: call(client, "GET", "/local/grants"))["data"]
    if as_json:
        print_json(found)
        return
    rows = [(key["kid"], _state(key), key["created_at"], key["retired_at"] or "") for key in found]
    print_table(("kid", "state", "created", "retired"), rows)


@grants.command(name="rotate")
def rotate_grant_key(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Create a new key, which signs from now on. Older keys stay in the JWKS until they are retired."""
    made = ask(data, config, lambda client, _: call(client, "POST", "/local/grants/rotate"))
    if as_json:
        print_json(made)
    else:
        print(made["kid"])


@grants.command(name="retire")
def retire_grant_key(kid: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Remove a key from the JWKS. Do this at once if it leaked, else 24 hours after it was replaced."""
    gone = ask(
        data, config, lambda client, _: call(client, "POST", f"/local/grants/{quote(kid, safe='')}/retire")
    )
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['kid']} retired")


def _state(key: dict[str, Any]) -> str:
    if key["retired_at"] is not None:
        return "retired"
    return "signing" if key["signing"] else "shown"
