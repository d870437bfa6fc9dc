"""Shared parts of all commands of the command line: options, requests to the broker, output."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import httpx2
import msgspec
import structlog
import uvloop
from cyclopts import Parameter

from broker.control import operator
from broker.settings import Settings, load
from broker.world import there_is_a_log

T = TypeVar("T")

Config = Annotated[
    str | None, Parameter(name="--config", help="TOML file with the broker's settings; else ORDAIN_CONFIG.")
]
Data = Annotated[str | None, Parameter(name="--data", help="Data directory; else ORDAIN_DATA, else ./data.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="JSON on standard output.")]
Text = Annotated[str | None, Parameter(negative="")]


def settings_of(config: str | None = None, **flags: str | None) -> Settings:
    """The settings from flags, environment and file.

    Raises:
        BadSetting: a setting is wrong.
    """
    return load(flags, os.environ, config)


def ask(
    data: str | None,
    config: str | None,
    work: Callable[[httpx2.AsyncClient, bool], Awaitable[T]],
    *,
    make: bool = False,
) -> T:
    """Runs `work` as the operator of a data directory. Its second argument says whether a broker is serving.

    `make`: `work` may create the log. All other commands must not create a log in a wrong directory.
    """
    settings = settings_of(config, data=data)
    if not make:
        there_is_a_log(Path(settings.data))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("critical")
    )  # errors arrive as exceptions, so log lines would only repeat them

    async def asking() -> T:
        async with operator(settings) as (client, serving):
            return await work(client, serving)

    return uvloop.run(asking())


def print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table. Columns are as wide as their longest cell, so that no id is cut off."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
