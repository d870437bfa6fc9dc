"""`ordain keys`, `ordain grants` and `ordain audit`: API keys, the keys that sign grants, and who
changed what. Secrets are never shown again."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, Text, ask, escaped, print_json, print_table
from broker.operations.asking import Client, call

SPAN = re.compile(r"([0-9]{1,6})([mhd])")
UNITS = {"m": 60, "h": 3_600, "d": 86_400}

Several = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)]

keys = App(name="keys", help="API keys: make, list, show, revoke.")
grants = App(name="grants", help="Keys that sign grants: list, rotate, retire.")


@keys.command(name="create")
def create_key(
    *,
    project: str,
    scope: list[str],
    name: Text = None,
    expires: Text = None,
    device: Several = None,
    device_prefix: Several = None,
    commands_per_minute: int | None = None,
    requests_per_minute: int | None = None,
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
    expires
        When it stops working: an RFC 3339 time, or a time from now such as 90d, 12h or 30m.
    device
        Limit the key to this device (id or hardware id); may be given several times.
    device_prefix
        Limit the key to devices whose hardware id begins so; may be given several times.
    commands_per_minute
        The most commands the key may send in a minute; 0 for no limit, whatever the settings say.
    requests_per_minute
        The most requests the key may make in a minute; 0 for no limit, whatever the settings say.
    """
    body: dict[str, object] = {"project": project, "scopes": scope, "name": name}
    body |= {"commands_per_minute": commands_per_minute, "requests_per_minute": requests_per_minute}
    if expires is not None:
        span = SPAN.fullmatch(expires)
        body |= {"expires_in_sec": int(span[1]) * UNITS[span[2]]} if span else {"expires_at": expires}
    body |= {} if device is None else {"devices": device}
    body |= {} if device_prefix is None else {"device_prefixes": device_prefix}
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
            k["state"],
            k["created_at"],
            k["expires_at"] or "",
            k["last_used_at"] or "",
        )
        for k in found
    ]
    print_table(("id", "project", "scopes", "name", "state", "created", "expires", "last used"), rows)


@keys.command(name="show")
def show_key(key_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Show one key: its scopes, limits and devices, and when it was last used. Never its secret."""
    found = ask(data, config, lambda client, _: call(client, "GET", f"/local/keys/{quote(key_id, safe='')}"))
    if as_json:
        print_json(found)
        return
    for field, value in found.items():
        shown = " ".join(value) if isinstance(value, list) else value
        print(escaped(f"{field.replace('_', ' ')}: {'-' if shown is None else shown}"))


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


# --- the audit ---------------------------------------------------------------------------------------


def audit(
    *, key: Text = None, since: Text = None, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Show who changed what: every change by a key or the operator, with request id and address.

    Parameters
    ----------
    key
        Only what the key with this id did.
    since
        Only from this RFC 3339 time on.
    """

    async def asking(client: Client, _: bool) -> None:
        cursor: str | None = ""
        while cursor is not None:
            asked = {"key": key, "since": since, "limit": "100", "cursor": cursor}
            given = {name: value for name, value in asked.items() if value}
            page = await call(client, "GET", f"/v1/audit?{urlencode(given)}")
            for entry in page["data"]:
                if as_json:
                    print_json(entry)
                else:
                    print(escaped(_change(entry)), flush=True)
            cursor = page["next_cursor"]

    ask(data, config, asking)


def _change(entry: dict[str, Any]) -> str:
    parts = [entry[field] for field in ("at", "actor", "action", "subject", "request_id", "peer")]
    return "  ".join([str(entry["position"]), *("-" if part is None else part for part in parts)])
