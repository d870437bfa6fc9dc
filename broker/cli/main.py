"""The command line. Every command finds the broker by its data directory, and works while a broker runs.

Exit codes: 0 done; 1 refused, not executed, or a fault found; 2 the command line or a setting is wrong;
3 the broker or its log cannot be reached. Errors are one sentence on standard error.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import httpx2
import msgspec
import structlog
import uvloop
from cyclopts import App, CycloptsError, Parameter

from broker import __version__
from broker.cli.backup import backup, restore
from broker.cli.base import Config, Data, Json, Text, ask, print_json, print_table, settings_of
from broker.cli.diff import diff
from broker.cli.doctor import doctor
from broker.cli.erase import delete, purge
from broker.cli.explain import explain
from broker.cli.grants import grants
from broker.cli.log import logs
from broker.cli.projections import projections
from broker.cli.replay import replay
from broker.cli.simulate import simulate
from broker.cli.webhooks import webhooks
from broker.domain.errors import Unavailable
from broker.operations.asking import DONE, POLL_SEC, REFUSED, UNREACHABLE, USAGE, Failed, call, pages
from broker.seams import Broken, Full
from broker.serve import serve as serve_until_signal
from broker.settings import BadSetting
from broker.world import InUse
from devices.types import BadType

T = TypeVar("T")

WRONG = (BadSetting, BadType, CycloptsError)
EXPECTED = (
    *WRONG, Failed, InUse, Broken, Full, Unavailable, OSError, sqlite3.Error, httpx2.HTTPError,
)  # fmt: skip

CLOSED = ("executed", "failed", "timed_out", "expired", "cancelled")

app = App(
    name="ordain",
    version=__version__,
    help="An event-sourced command broker for MQTT devices.",
    help_epilogue="Exit codes: 0 done; 1 refused, not executed, or a fault found; "
    "2 wrong command line or setting; 3 the broker or its log cannot be reached.",
)
keys = App(name="keys", help="API keys: make, list, revoke.")
devices = App(name="devices", help="Devices: add, list.")
for part in (keys, devices, grants, logs, projections, simulate, webhooks):
    app.command(part)
for one in (delete, purge, explain, diff, backup, restore, doctor, replay):
    app.command(one)


def main() -> None:
    """Entry point of `ordain`."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `ordain log tail | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except BrokenPipeError:
        raise
    except EXPECTED as error:
        return _error(error)
    except ExceptionGroup as group:
        known, rest = group.split(EXPECTED)
        if rest is not None or known is None:
            raise
        return _error(_first(known))
    except KeyboardInterrupt:
        return 130
    return DONE


def _first(group: BaseException) -> BaseException:
    return _first(group.exceptions[0]) if isinstance(group, BaseExceptionGroup) else group


def _error(error: BaseException) -> int:
    """Prints the error in one line and returns the exit code."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = ": ".join([*([str(error.filename)] if error.filename else []), error.strerror])
    print("ordain:", " ".join(message.split()), file=sys.stderr)
    if isinstance(error, Failed):
        return error.code
    return USAGE if isinstance(error, WRONG) else UNREACHABLE


# --- serve ---------------------------------------------------------------------------------------


@app.command
def serve(
    *,
    data: Data = None,
    http: Text = None,
    mqtt_listen: Text = None,
    mqtt_server: Text = None,
    mqtt_url: Text = None,
    config: Config = None,
    demo: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Run the broker until SIGTERM or Ctrl-C.

    Parameters
    ----------
    http
        HOST:PORT of the HTTP server; else ORDAIN_HTTP, else 127.0.0.1:8080.
    mqtt_listen
        HOST:PORT of the embedded MQTT server; else ORDAIN_MQTT_LISTEN, else 127.0.0.1:1883.
    mqtt_server
        The broker's own MQTT server: embedded, or mosquitto as a child process; else ORDAIN_MQTT_SERVER, else
        embedded.
    mqtt_url
        Use this external MQTT server instead, mqtt://user:password@host:port; else ORDAIN_MQTT_URL.
    demo
        Also run a few simulated devices, and print a curl to try.
    """
    settings = settings_of(
        data=data,
        http=http,
        mqtt_listen=mqtt_listen,
        mqtt_server=mqtt_server,
        mqtt_url=mqtt_url,
        config=config,
    )
    _log_to_stderr()
    uvloop.run(serve_until_signal(settings, demo=demo, say=lambda text: print(text, flush=True)))


def _log_to_stderr() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


# --- requests to the broker as its operator --------------------------------------------------------


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


@app.command
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

    async def sending(client: httpx2.AsyncClient, serving: bool) -> dict[str, Any]:
        made: dict[str, Any] = await call(
            client, "POST", f"/v1/devices/{quote(device, safe='')}/commands", body
        )
        if wait and not serving:
            raise Failed(UNREACHABLE, f"{made['id']} is recorded, but no broker serves: --wait would not end")
        until = time.monotonic() + timeout
        while wait and made["state"] not in CLOSED:
            if time.monotonic() > until:
                raise Failed(REFUSED, f"{made['id']} is {made['state']} after {timeout:g} s")
            await asyncio.sleep(POLL_SEC)
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
