"""`ordain send`, `commands`, `explain`, `delete`, `purge`: work with commands. They only ask the broker."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from cyclopts import App, Parameter

from broker.cli.base import (
    Config,
    Data,
    Json,
    Text,
    Yes,
    ask,
    confirm,
    escaped,
    pause,
    print_fields,
    print_json,
    print_table,
)
from broker.operations.asking import POLL_SEC, REFUSED, UNREACHABLE, USAGE, Client, Failed, call, pages

commands = App(name="commands", help="Commands: list, show, cancel, retry.")

CLOSED = ("executed", "failed", "timed_out", "expired", "cancelled")


def send(
    device: str,
    command: str,
    /,
    *params: str,
    ttl: int | None = None,
    wait: Annotated[bool, Parameter(negative="")] = False,
    timeout: float = 60,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Send one command. Without --wait, prints its id as soon as it is durable.

    Parameters
    ----------
    device
        The device's id or hardware id.
    command
        The command, such as lock.
    params
        Parameters. key=value is a text: pin=0042 and version=1.10 stay as they are. If the device type says
        that a parameter is no text, such as a number or true, the value is read as JSON. key:=json is always
        JSON: users:='["a", "b"]', level:=3, note:=null.
    ttl
        Seconds until the command expires; else 300. 0 means never.
    wait
        Wait until the command is closed. The exit code is 0 only if it was executed.
    timeout
        Seconds to wait at most.
    """
    texts, values = parameters(params)
    body: dict[str, Any] = {"type": command}
    if ttl is not None:
        body["ttl_sec"] = ttl or None

    async def sending(client: Client, serving: bool) -> dict[str, Any]:
        schema = await _schema(client, device, command) if any(map(_may_be_json, texts.values())) else None
        body["params"] = values | {key: typed(schema, key, text) for key, text in texts.items()}
        made: dict[str, Any] = await call(
            client, "POST", f"/v1/devices/{quote(device, safe='')}/commands", body
        )
        if wait and not serving:
            raise Failed(UNREACHABLE, f"{made['id']} is recorded, but no broker serves: --wait would not end")
        until = time.monotonic() + timeout
        while wait and made["state"] not in CLOSED:
            if time.monotonic() > until:
                raise Failed(REFUSED, f"{made['id']} is {made['state']} after {timeout:g} s")
            await pause(POLL_SEC)
            made = await call(client, "GET", f"/v1/commands/{made['id']}")
        return made

    made = ask(data, config, sending)
    if as_json:
        print_json(made)
    elif wait:
        outcome = made["result"] if made["error"] is None else made["error"]["message"]
        shown = "" if outcome is None else escaped(msgspec.json.encode(outcome).decode())
        print(made["id"], made["state"], shown)
    else:
        print(made["id"])
    if wait and made["state"] != "executed":
        raise Failed(REFUSED, f"{made['id']} was not executed: it is {made['state']}")


def parameters(pairs: tuple[str, ...]) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts of key=value, and the values of key:=json.

    Raises:
        Failed: one is neither, or a key is named twice.
    """
    texts, values = dict[str, str](), dict[str, Any]()
    for pair in pairs:
        key, equals, text = pair.partition("=")
        name = key.removesuffix(":")
        if not equals or not name:
            raise Failed(USAGE, f"{pair!r} is not a parameter: it must be key=value, or key:=json")
        if name in texts or name in values:
            raise Failed(USAGE, f"{pair!r}: {name} is named twice")
        if name == key:
            texts[name] = text
            continue
        try:
            values[name] = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise Failed(USAGE, f"{pair!r}: what follows := is not JSON: {error}") from error
    return texts, values


def typed(schema: dict[str, Any] | None, key: str, text: str) -> Any:
    """The value that a text stands for: JSON if the schema of the parameters allows no text there."""
    schema = schema or {}
    own = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
    kinds = _kinds(own)
    if kinds and "string" not in kinds and _may_be_json(text):
        return msgspec.json.decode(text)
    return text


def _kinds(schema: object) -> set[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, dict):
        return set()
    if "type" in schema:
        return {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    kinds = {"string" if isinstance(value, str) else "other" for value in values}
    return kinds.union(*map(_kinds, [*schema.get("anyOf", []), *schema.get("oneOf", [])]))


def _may_be_json(text: str) -> bool:
    """Whether it is JSON of anything but a string."""
    try:
        return not isinstance(msgspec.json.decode(text), str)
    except msgspec.DecodeError:
        return False


async def _schema(client: Client, device: str, command: str) -> dict[str, Any] | None:
    found = await call(client, "GET", f"/v1/devices/{quote(device, safe='')}")
    for kind in (await call(client, "GET", "/v1/types"))["data"]:
        for each in kind["commands"]:
            if (kind["name"], each["name"]) == (found["type"], command):
                schema: dict[str, Any] | None = each["params"]
                return schema
    return None


def explain(command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Explain why a command is in its state, and what happens next.

    Parameters
    ----------
    command_id
        The command's id, cmd_….
    """

    async def asking(client: Client, serving: bool) -> dict[str, Any]:
        found: dict[str, Any] = await call(
            client, "GET", f"/v1/commands/{quote(command_id, safe='')}/explain"
        )
        if not serving and found["next"] is not None:
            print("ordain: no broker serves this log; the command waits until one does", file=sys.stderr)
        return found

    found = ask(data, config, asking)
    if as_json:
        print_json(found)
    else:
        print(escaped(found["summary"]))


def delete(
    command_id: str,
    /,
    *,
    yes: Yes = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Erase one closed command permanently. A pending command is cancelled first.

    On a terminal it asks first.

    Parameters
    ----------
    command_id
        The command's id.
    """
    path = f"/commands/{quote(command_id, safe='')}"
    confirm(f"Erase {command_id} permanently?", yes=yes, anyone=False)
    gone = ask(data, config, lambda client, _: call(client, "DELETE", path))
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['deleted']} erased")


def purge(
    *,
    older_than_days: Annotated[int, Parameter(name="--older-than-days")],
    device_events: Annotated[bool, Parameter(name="--device-events", negative="")] = False,
    dry_run: Annotated[bool, Parameter(name="--dry-run", negative="")] = False,
    yes: Yes = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Erase permanently all closed commands older than a number of days, or old device events.

    A command is older if it was created before midnight (UTC) that many days ago. It asks first.

    Parameters
    ----------
    older_than_days
        0 to 36500; 0 erases all closed commands created before today.
    device_events
        Not commands: the data of presence, attribute and state events that a newer one had replaced by then.
    dry_run
        Show how many would be erased, and erase none.
    """
    age = {"older_than_days": older_than_days}
    preview, path, counted, erased, what = (
        ("/v1/events/purge", "/v1/events/purge", "erased", "erased", "device events replaced")
        if device_events
        else ("/local/purge/preview", "/commands/purge", "commands", "deleted", "commands created")
    )

    async def purging(client: Client, serving: bool) -> dict[str, Any]:
        look = age | {"dry_run": True} if device_events else age
        found: dict[str, Any] = await call(client, "POST", preview, look)
        if dry_run:
            return found
        if found[counted]:
            all_of_it = f"{found[counted]} {what} before {found['cutoff_date']}"
            confirm(f"Erase {all_of_it} permanently?", yes=yes)
        purged: dict[str, Any] = await call(client, "POST", path, age)
        return purged

    purged = ask(data, config, purging)
    if as_json:
        print_json(purged)
    elif dry_run:
        print(f"{purged[counted]} {what} before {purged['cutoff_date']} would be erased")
    else:
        print(f"{purged[erased]} {what} before {purged['cutoff_date']} erased")


# --- ordain commands ---------------------------------------------------------------------------------


@commands.command(name="list")
def list_commands(
    *,
    device: Text = None,
    state: Text = None,
    status: Text = None,
    type: Text = None,
    limit: int = 20,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List commands, newest first.

    Parameters
    ----------
    device
        Only commands of this device: id or hardware id.
    state
        Only commands in this state, such as published or timed_out.
    status
        Only commands with this status of the API, such as pending or failed.
    type
        Only commands of this name, such as lock.
    limit
        How many at most; 0 means all.
    """
    if limit < 0:
        raise Failed(USAGE, f"--limit = {limit}: must not be negative")
    filters = {"device": device, "state": state, "status": status, "type": type, "grant": "false"}
    found = ask(data, config, lambda client, _: pages(client, "/v1/commands", filters, limit))
    if as_json:
        print_json(found)
        return
    names = ("id", "hardware_id", "type", "state", "attempts", "created_at")
    rows = [tuple(str(each[name]) for name in names) for each in found]
    print_table(("id", "device", "command", "state", "attempts", "created"), rows)


@commands.command(name="show")
def show_command(
    command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Show one command and its events.

    Parameters
    ----------
    command_id
        The command's id, cmd_….
    """
    path = f"/v1/commands/{quote(command_id, safe='')}"

    async def asking(client: Client, serving: bool) -> dict[str, Any]:
        found: dict[str, Any] = await call(client, "GET", path)
        return found | {"events": await pages(client, f"{path}/events")}

    found = ask(data, config, asking)
    if as_json:
        print_json(found)
        return
    events = found.pop("events")
    found.pop("grant_token")
    print_fields(found)
    print()
    rows = [
        (
            str(each["position"]),
            each["recorded_at"],
            each["type"],
            each["evidence"] or "",
            "(erased)" if each.get("erased") else msgspec.json.encode(each["data"]).decode(),
        )
        for each in events
    ]
    print_table(("position", "recorded", "event", "evidence", "data"), rows)


@commands.command(name="cancel")
def cancel_command(
    command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Cancel a pending command. Refused after it was handed over, because the device may execute it.

    Parameters
    ----------
    command_id
        The command's id, cmd_….
    """
    gone = _about(data, config, command_id, "DELETE", "")
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['id']} {gone['state']}")


@commands.command(name="retry")
def retry_command(
    command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Send a closed command again, as a new one. Prints the new id.

    Only a failed, timed out, expired or cancelled command can be sent again. After a failure or a time-out,
    the device may already have executed it.

    Parameters
    ----------
    command_id
        The id of the old command, cmd_….
    """
    made = _about(data, config, command_id, "POST", "/retry")
    if as_json:
        print_json(made)
    else:
        print(made["id"])


def _about(data: Data, config: str | None, command_id: str, method: str, more: str) -> dict[str, Any]:
    """Asks for a change of one command, under the path of its device."""
    name = quote(command_id, safe="")

    async def asking(client: Client, serving: bool) -> dict[str, Any]:
        found = await call(client, "GET", f"/v1/commands/{name}")
        path = f"/v1/devices/{found['device_id']}/commands/{name}{more}"
        changed: dict[str, Any] = await call(client, method, path)
        return changed

    return ask(data, config, asking)
