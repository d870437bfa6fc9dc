"""`ordain devices`: registers, lists, shows, moves and deletes devices, and gives them new tokens."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import App, Parameter

from broker.cli.base import (
    Config,
    Data,
    Json,
    Text,
    Yes,
    ask,
    confirm,
    print_fields,
    print_json,
    print_table,
)
from broker.operations.asking import Client, call, pages

devices = App(name="devices", help="Devices: add, list, show, move, delete, give a new token.")


@devices.command(name="add")
def add_device(
    hardware_id: str,
    /,
    *,
    type: str,
    project: str = "default",
    id: Text = None,
    name: Text = None,
    answer_key: Text = None,
    gateway: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Register a device. Prints only its token, and only this once; with --json also its secret.

    Parameters
    ----------
    hardware_id
        The device's name in topics; also its MQTT client id and user name.
    type
        The device type, such as generic, recorder or iotee_device.
    project
        The project that the device belongs to.
    answer_key
        The Ed25519 public key that it signs its answers with, in base64url.
    gateway
        The gateway that speaks for it: its id or hardware id.
    """
    given = {"hardware_id": hardware_id, "type": type, "project": project, "id": id, "name": name}
    given |= {"answer_key": answer_key, "gateway": gateway}
    body = {key: value for key, value in given.items() if value is not None}
    made = ask(data, config, lambda client, _: call(client, "POST", "/v1/devices", body), make=True)
    if as_json:
        print_json(made)
    else:
        print(made["device_token"])


@devices.command(name="list")
def list_devices(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """List all devices, newest first, with their presence."""
    found = ask(data, config, lambda client, _: pages(client, "/v1/devices"))
    if as_json:
        print_json(found)
        return
    names = ("id", "hardware_id", "type", "project", "presence", "last_seen_at", "created_at")
    rows = [tuple(each[name] or "" for name in names) for each in found]
    print_table(("id", "hardware id", "type", "project", "presence", "last seen", "created"), rows)


@devices.command(name="show")
def show_device(device: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Show one device, and its open commands.

    Parameters
    ----------
    device
        The device's id or hardware id.
    """

    async def asking(client: Client, serving: bool) -> dict[str, Any]:
        found: dict[str, Any] = await call(client, "GET", _path(device))
        lane = await call(client, "GET", f"{_path(device)}/lane")
        return found | {"open_commands": [each["id"] for each in lane["open"]]}

    found = ask(data, config, asking)
    (print_json if as_json else print_fields)(found)


@devices.command(name="token")
def give_token(device: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Give a device a new token. Prints only the token, and only this once. The old one stops working.

    Parameters
    ----------
    device
        The device's id or hardware id.
    """
    made = ask(data, config, lambda client, _: call(client, "POST", f"{_path(device)}/token"))
    if as_json:
        print_json(made)
    else:
        print(made["device_token"])


@devices.command(name="move")
def move_device(
    device: str,
    /,
    *,
    gateway: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Move a device to another gateway. Without --gateway it connects itself from now on.

    Parameters
    ----------
    device
        The device's id or hardware id.
    gateway
        The gateway that speaks for it: its id or hardware id.
    """
    body = {"gateway": gateway}
    moved = ask(data, config, lambda client, _: call(client, "PATCH", _path(device), body))
    (print_json if as_json else print_fields)(moved)


@devices.command(name="delete")
def delete_device(
    device: str,
    /,
    *,
    force: Annotated[bool, Parameter(negative="")] = False,
    yes: Yes = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Delete a device permanently. Its names cannot be used again. On a terminal it asks first.

    Parameters
    ----------
    device
        The device's id or hardware id.
    force
        Also if it has open commands: they are cancelled, or timed out if they were handed over.
    """

    async def deleting(client: Client, serving: bool) -> dict[str, Any]:
        found = await call(client, "GET", _path(device))
        confirm(f"Delete {found['hardware_id']} ({found['id']}) permanently?", yes=yes, anyone=False)
        gone: dict[str, Any] = await call(client, "DELETE", _path(device) + ("?force=true" if force else ""))
        return gone

    gone = ask(data, config, deleting)
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['id']} deleted")


def _path(device: str) -> str:
    return f"/v1/devices/{quote(device, safe='')}"
