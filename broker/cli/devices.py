"""`ordain devices`: devices are registered and listed."""

from __future__ import annotations

from cyclopts import App

from broker.cli.base import Config, Data, Json, Text, ask, print_json, print_table
from broker.operations.asking import call, pages

devices = App(name="devices", help="Devices: add, list.")


@devices.command(name="add")
def add_device(
    hardware_id: str,
    /,
    *,
    type: str,
    project: str = "default",
    id: Text = None,
    name: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Register a device. Prints only its token, and only this once.

    Parameters
    ----------
    hardware_id
        The device's name in topics; also its MQTT client id and user name.
    type
        The device type, such as generic, recorder or iotee_device.
    project
        The project that the device belongs to.
    """
    given = {"hardware_id": hardware_id, "type": type, "project": project, "id": id, "name": name}
    body = {key: value for key, value in given.items() if value is not None}
    made = ask(data, config, lambda client, _: call(client, "POST", "/v1/devices", body), make=True)
    if as_json:
        print_json(made)
    else:
        print(made["device_token"])


@devices.command(name="list")
def list_devices(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """List all devices, newest first."""
    found = ask(data, config, lambda client, _: pages(client, "/v1/devices"))
    if as_json:
        print_json(found)
        return
    rows = [(d["id"], d["hardware_id"], d["type"], d["project"], d["created_at"]) for d in found]
    print_table(("id", "hardware id", "type", "project", "created"), rows)
