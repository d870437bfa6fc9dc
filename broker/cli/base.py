"""What all commands of the command line share: exit codes, options, asking the broker, output."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from cyclopts import Parameter

from broker.operations.asking import REFUSED, Client, Failed
from broker.settings import Settings, load

T = TypeVar("T")

# C0, DEL and C1, line separators, and characters that change the direction of the text after them.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Config = Annotated[
    str | None, Parameter(name="--config", help="TOML file with the broker's settings; else ORDAIN_CONFIG.")
]


@Parameter(name="*")
@dataclass(frozen=True)
class Place:
    """The broker that is meant: by its data directory, and by its log if that is not in there."""

    data: Annotated[
        str | None, Parameter(name="--data", help="Data directory; else ORDAIN_DATA, else ./data.")
    ] = None
    log: Annotated[
        str | None,
        Parameter(
            name="--log",
            help="The log, if it is in PostgreSQL: postgresql://user@host/database; else ORDAIN_LOG.",
        ),
    ] = None


Data = Place | None
Json = Annotated[
    bool,
    Parameter(
        name="--json", negative="", help="JSON on standard output; an error is JSON on standard error."
    ),
]
Yes = Annotated[bool, Parameter(name="--yes", negative="", help="Do not ask before it is done.")]
Text = Annotated[str | None, Parameter(negative="")]


def settings_of(config: str | None = None, *, data: Data = None, **flags: str | None) -> Settings:
    """The settings from flags, environment and file.

    Raises:
        BadSetting: a setting is wrong.
    """
    place = data or Place()
    return load({"data": place.data, "log": place.log, **flags}, os.environ, config)


def ask(
    data: Data,
    config: str | None,
    work: Callable[[Client, bool], Coroutine[Any, Any, T]],
    *,
    make: bool = False,
) -> T:
    """Runs `work` as the operator of a data directory. Its second argument says whether a broker is serving.

    `work` awaits its client and `pause`, nothing else. `make`: `work` may create the log. All other
    commands must not create a log in a wrong directory.
    """
    from broker.private_socket import SocketClient, answers  # an HTTP client, which help does not need

    settings = settings_of(config, data=data)
    directory = Path(settings.data)
    if answers(directory):
        return finished(work(SocketClient(directory), True))
    from broker.control import ask_alone  # the whole broker; a running one is asked without it

    return ask_alone(settings, work, make=make)


def finished(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never waits for anything. An event loop would take 0.05 s to import."""
    try:
        work.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    finally:
        work.close()
    raise RuntimeError(f"{work} waits for an event loop")


async def pause(seconds: float) -> None:
    """Sleeps. It may block, because a command is alone in its process."""
    time.sleep(seconds)  # noqa: ASYNC251


def confirm(question: str, *, yes: bool, anyone: bool = True) -> None:
    """Asks on standard error before something is erased, unless `yes` was given.

    `anyone` False: where standard input is not a terminal it does not ask, because the command named exactly
    what to erase.

    Raises:
        Failed: the answer is not yes.
    """
    if yes or not (anyone or sys.stdin.isatty()):
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if (answer := sys.stdin.readline()).strip().lower() not in ("y", "yes"):
        if not answer.endswith("\n"):
            print(file=sys.stderr)
        raise Failed(REFUSED, "nothing was done; answer y, or give --yes")


def escaped(text: str) -> str:
    """One line of text in which control characters are escaped as in JSON, such as `\\u001b`.

    Devices and services wrote parts of what is printed, and a terminal must not obey them. The value of JSON
    stays the same.
    """
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_fields(values: Mapping[str, object]) -> None:
    """Prints one thing, a line for each field. What is not a text is shown as JSON."""
    width = max(map(len, values))
    for name, value in values.items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        print(f"{name:{width}}  {escaped(text)}")


def print_json(value: object) -> None:
    print(escaped(msgspec.json.encode(value).decode()), flush=True)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table. Columns are as wide as their longest cell, so that no id is cut off."""
    lines = [tuple(map(escaped, row)) for row in (columns, *rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


PAUSE_SEC = 1.0


class Progress:
    """Call it with the amount that is done; it prints at most once a second. `total` is in the same unit."""

    def __init__(self, total: int, unit: str = "events") -> None:
        self._total = total
        self._unit = unit
        self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= PAUSE_SEC:
            self._said = now
            print(f"{done:,} of {self._total:,} {self._unit}", file=sys.stderr, flush=True)
