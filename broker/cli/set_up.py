"""`ordain types`, `mqtt` and `completion`: what is needed around a broker before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, ask, print_json, settings_of
from broker.operations.asking import REFUSED, USAGE, Failed
from broker.operations.passwords import access_rules, canaries, passwords
from broker.type_files import load_beside, load_types
from devices.types import shipped_types

if TYPE_CHECKING:
    from devices.speech.answers import Trial

types = App(name="types", help="Device types: check a file, try a message on it.")
mqtt = App(name="mqtt", help="An MQTT server of your own: its password file and its access rules.")


@types.command(name="check")
def check_type(file: Path, /, *, as_json: Json = False) -> None:
    """Check the file of a device type as the broker does at its start. Nothing is changed.

    Parameters
    ----------
    file
        A TOML file, as it would lie in the directory of the setting `types`.
    """
    kind = load_beside(file, dict(shipped_types()))
    if as_json:
        print_json({"name": kind.name, "payload": kind.payload, "commands": list(kind.commands)})
    else:
        others = " and any other command" if kind.open else ""
        print(f"{file}: {kind.name} is a valid device type: {', '.join(kind.commands) or 'none'}{others}")


@types.command(name="test")
def try_type(
    file: Path,
    /,
    *,
    topic: str,
    payload: str,
    command: tuple[str, ...] = (),
    params: str = "{}",
    prefix: str = "iotee",
    as_json: Json = False,
) -> None:
    """Say what a device's message would lead to: which event would be recorded, and why.

    It asks no broker and changes nothing. Without --command it says so for each command of the type.

    Parameters
    ----------
    file
        A TOML file of a device type, or the name of a shipped type.
    topic
        The topic that the message came on.
    payload
        The payload of the message.
    command
        Only this command is with the device; may be repeated.
    params
        The parameters of the command, as JSON.
    prefix
        The broker's setting prefix.
    """
    from devices.speech.answers import trial  # only this command needs it

    shipped = dict(shipped_types())
    kind = shipped.get(str(file)) or load_beside(file, shipped, prefix=prefix)
    for name in command:
        if name not in kind.commands:
            raise Failed(USAGE, f"--command {name}: {kind.name} has the commands {', '.join(kind.commands)}")
    try:
        given = msgspec.json.decode(params)
    except msgspec.DecodeError as error:
        raise Failed(USAGE, f"--params {params}: must be JSON: {error}") from error
    found = trial(kind, prefix, topic, payload.encode(), given, command)
    if not found.roles:
        read = ", ".join(kind.says)
        raise Failed(REFUSED, f"{topic} is no topic that is read of {kind.name}; those are {read}")
    if as_json:
        print_json(msgspec.to_builtins(found))
    else:
        for line in lines_of(found):
            print(line)


def lines_of(found: Trial) -> Iterator[str]:
    """What a trial found, for a reader. Commands with the same outcome share a line."""
    yield f"{found.topic}: {' and '.join(found.roles)} of the device {found.device}"
    if found.malformed is not None:
        yield f"malformed: {found.malformed}"
    if found.presence is not None:
        yield f"the device is {found.presence}"
    if found.state is not msgspec.UNSET:
        yield f"reported: {_json(found.state)}"
    same: dict[str, list[str]] = {}
    for outcome in found.commands:
        event = "nothing is recorded" if outcome.event is None else f"{outcome.event} ({outcome.evidence})"
        said = {"result": outcome.result, "error": outcome.error, "progress": outcome.progress}
        parts = [f", {key} {_json(value)}" for key, value in said.items() if value is not None]
        same.setdefault(f"{event}{''.join(parts)}. Why: {outcome.why}", []).append(outcome.command)
    for sentence, commands in same.items():
        yield f"{', '.join(commands)}: {sentence}"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


@mqtt.command(name="passwd-file")
def password_file(
    *,
    to: Annotated[Path | None, Parameter(negative="")] = None,
    canary: bool = True,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the password file for a Mosquitto of your own: all devices with their tokens' digests.

    The file also has the user of mqtt_url, if that has a password. Write it again and reload Mosquitto
    (SIGHUP) after a device was added or deleted, or got a new token. The access rules are in
    docs/mosquitto.acl.

    Parameters
    ----------
    to
        The file to write or replace, readable for its owner only; else standard output.
    canary
        Also the devices of ordain doctor --canary. They are registered if they are not there.
    """
    settings = settings_of(config, data=data)
    if canary:
        ask(data, config, lambda client, _: canaries(client, settings))
    users = passwords(settings)
    text = "".join(f"{name}:{digest}\n" for name, digest in users.items())
    if to is not None:
        part = to.with_name(f"{to.name}.part")
        with open(part, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
        os.replace(part, to)
    if as_json:
        print_json({"users": users} if to is None else {"file": str(to), "users": len(users)})
    elif to is None:
        print(text, end="")
    else:
        print(f"{to}: {len(users)} users")


@mqtt.command(name="acl-file")
def acl_file(
    *,
    to: Annotated[Path | None, Parameter(negative="")] = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the access rules for a Mosquitto of your own: each device reaches its own topics only.

    They follow from the device types and the registered devices. Write the file again and reload Mosquitto
    (SIGHUP) after a device with topics of its own type was added, changed or deleted.

    Parameters
    ----------
    to
        The file to write or replace; else standard output.
    """
    settings = settings_of(config, data=data)
    types_known = load_types(settings.types, settings.prefix)
    lines = access_rules(settings, types_known)
    if to is not None:
        part = to.with_name(f"{to.name}.part")
        part.write_text("\n".join([*lines, ""]))
        os.replace(part, to)
    if as_json:
        print_json({"rules": lines} if to is None else {"file": str(to), "rules": len(lines)})
    else:
        print("\n".join(lines) if to is None else f"{to}: {len(lines)} rules")


def completion(shell: Literal["bash", "zsh", "fish"], /, *, as_json: Json = False) -> None:
    """Print a script that lets a shell complete commands and options.

    For bash: `ordain completion bash > ~/.local/share/bash-completion/completions/ordain`. For zsh: to a file
    `_ordain` in a directory of `$fpath`. For fish: `~/.config/fish/completions/ordain.fish`.

    Parameters
    ----------
    shell
        bash, zsh or fish.
    """
    from broker.cli.main import application  # it imports this module when it is used

    script = application().generate_completion(prog_name="ordain", shell=shell)  # nosec B604 - a name, nothing is run
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        print(script, end="")
