"""`ordain mqtt` and `completion`: what is needed around a broker before it is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, ask, print_json, settings_of
from broker.operations.passwords import canaries, passwords

mqtt = App(name="mqtt", help="An MQTT server of your own: its password file.")


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
        Also the two devices of ordain doctor --canary. They are registered if they are not there.
    """
    settings = settings_of(config, data=data)
    directory = Path(settings.data)
    if canary:
        ask(data, config, lambda client, _: canaries(client, directory))
    users = passwords(directory, settings.mqtt_url)
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
