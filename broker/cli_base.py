"""What all commands of the command line share: exit codes, options, output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import msgspec
from cyclopts import Parameter

from broker.settings import Settings, load

DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
POLL_SEC = 0.1

Data = Annotated[str | None, Parameter(name="--data", help="Data directory; else ORDAIN_DATA, else ./data.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="JSON on standard output.")]
Text = Annotated[str | None, Parameter(negative="")]


class Failed(Exception):
    """The command did not do what was asked; carries the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def settings_of(config: str | None = None, **flags: str | None) -> Settings:
    """Flags, environment and file together.

    Raises:
        BadSetting: one of them is wrong.
    """
    return load(flags, os.environ, config)


def print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be: an id that was cut off is of no use."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
