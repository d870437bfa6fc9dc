"""`ordain send`, `explain`, `delete` and `purge`: what is done with commands. They only ask the broker."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, ask, pause, print_json
from broker.operations.asking import POLL_SEC, REFUSED, UNREACHABLE, USAGE, Client, Failed, call

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
        Parameters as key=value. A value that is valid JSON is used as JSON, else as text.
    ttl
        Seconds until the command expires; else 300. 0 means never.
    wait
        Wait until the command is closed. The exit code is 0 only if it was executed.
    timeout
        Seconds to wait at most.
    """
    body: dict[str, Any] = {"type": command, "params": _params(params)}
    if ttl is not None:
        body["ttl_sec"] = ttl or None

    async def sending(client: Client, serving: bool) -> dict[str, Any]:
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
        print(made["id"], made["state"], "" if outcome is None else msgspec.json.encode(outcome).decode())
    else:
        print(made["id"])
    if wait and made["state"] != "executed":
        raise Failed(REFUSED, f"{made['id']} was not executed: it is {made['state']}")


def _params(pairs: tuple[str, ...]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise Failed(USAGE, f"{pair!r} is not a parameter: it must be key=value")
        try:
            params[key] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            params[key] = text
    return params


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
        print(found["summary"])


def delete(command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Erase one closed command permanently. A pending command is cancelled first.

    Parameters
    ----------
    command_id
        The command's id.
    """
    path = f"/commands/{quote(command_id, safe='')}"
    gone = ask(data, config, lambda client, _: call(client, "DELETE", path))
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['deleted']} erased")


def purge(
    *,
    older_than_days: Annotated[int, Parameter(name="--older-than-days")],
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Erase permanently all closed commands that are older than a number of days.

    A command is older if it was created before midnight (UTC) that many days ago.

    Parameters
    ----------
    older_than_days
        0 to 36500; 0 erases all closed commands created before today.
    """
    body = {"older_than_days": older_than_days}
    purged = ask(data, config, lambda client, _: call(client, "POST", "/commands/purge", body))
    if as_json:
        print_json(purged)
    else:
        print(f"{purged['deleted']} commands created before {purged['cutoff_date']} erased")
