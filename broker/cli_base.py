"""What all commands of the command line share: exit codes, options, asking the broker, output."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx2
import msgspec
import structlog
import uvloop
from cyclopts import Parameter

from broker.control import operator
from broker.settings import Settings, load
from broker.world import there_is_a_log

T = TypeVar("T")

DONE, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
POLL_SEC = 0.1

Config = Annotated[
    str | None, Parameter(name="--config", help="TOML file of the broker's settings; else ORDAIN_CONFIG.")
]
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


def ask(
    data: str | None,
    config: str | None,
    work: Callable[[httpx2.AsyncClient, bool], Awaitable[T]],
    *,
    make: bool = False,
) -> T:
    """Does something as the operator of a data directory; `work` is told whether a broker is serving.

    `make`: it may be the first thing done there. Anything else in a wrong directory must not make a log.
    """
    settings = settings_of(config, data=data)
    if not make:
        there_is_a_log(Path(settings.data))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("critical")
    )  # errors are exceptions here

    async def asking() -> T:
        async with operator(settings) as (client, serving):
            return await work(client, serving)

    return uvloop.run(asking())


async def call(client: httpx2.AsyncClient, method: str, path: str, body: object = None) -> Any:
    """The answer's JSON.

    Raises:
        Failed: the broker refused, in its words.
    """
    response = (
        await client.request(method, path, json=body)
        if body is not None
        else await client.request(method, path)
    )
    answer = response.json()
    if response.is_error:
        code = UNREACHABLE if response.status_code >= 500 else REFUSED
        raise Failed(code, answer["error"]["message"])
    return answer


async def pages(client: httpx2.AsyncClient, path: str) -> list[dict[str, Any]]:
    """All pages of a list of `/v1`."""
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await call(client, "GET", f"{path}?limit=100" + (f"&cursor={cursor}" if cursor else ""))
        found += page["data"]
        cursor = page["next_cursor"]
    return found


def print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be: an id that was cut off is of no use."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
