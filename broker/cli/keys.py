"""`ordain keys` and `ordain grants`: API keys, and the keys that sign grants (never their secrets)."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from cyclopts import App

from broker.cli.base import Config, Data, Json, Text, ask, print_json, print_table
from broker.operations.asking import call

keys = App(name="keys", help="API keys: make, list, revoke.")
grants = App(name="grants", help="Keys that sign grants: list, rotate, retire.")


@keys.command(name="create")
def create_key(
    *,
    project: str,
    scope: list[str],
    name: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Create an API key. Prints only the key, and only this once. Also creates the project if it is new.

    Parameters
    ----------
    project
        The project that the key belongs to.
    scope
        devices:read, devices:write, events:read or admin; may be given several times.
    name
        A note about the key's purpose.
    """
    body = {"project": project, "scopes": scope, "name": name}
    made = ask(data, config, lambda client, _: call(client, "POST", "/local/keys", body), make=True)
    if as_json:
        print_json(made)
    else:
        print(made["key"])


@keys.command(name="list")
def list_keys(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """List all keys, without their secrets."""
    found = ask(data, config, lambda client, _: call(client, "GET", "/local/keys"))["data"]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            k["id"],
            k["project"],
            " ".join(k["scopes"]),
            k["name"] or "",
            k["created_at"],
            k["revoked_at"] or "",
        )
        for k in found
    ]
    print_table(("id", "project", "scopes", "name", "created", "revoked"), rows)


@keys.command(name="revoke")
def revoke_key(key_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Revoke a key, at once and permanently. Commands that were created with it continue."""
    gone = ask(
        data, config, lambda client, _: call(client, "DELETE", f"/local/keys/{quote(key_id, safe='')}")
    )
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['id']} revoked")


# --- the keys that grants are signed with ------------------------------------------------------------


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
