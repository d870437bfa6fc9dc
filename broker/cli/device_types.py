"""`ordain types`: checks the file of a device type, and tries a message on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cyclopts import App

from broker.cli.base import Json, print_json
from broker.operations.asking import REFUSED, USAGE, Failed
from broker.type_files import load_beside
from devices.types import shipped_types

if TYPE_CHECKING:
    from devices.speech.answers import Trial

types = App(name="types", help="Device types: check a file, try a message on it.")


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
