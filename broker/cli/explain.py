"""`ordain explain`: why a command is in its state, and what happens next. It only sends a request."""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import quote

import httpx2

from broker.cli.base import Config, Data, Json, ask, print_json
from broker.operations.asking import call


def explain(command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Explain why a command is in its state, and what happens next.

    Parameters
    ----------
    command_id
        The command's id, cmd_….
    """

    async def asking(client: httpx2.AsyncClient, serving: bool) -> dict[str, Any]:
        found: dict[str, Any] = await call(
            client, "GET", f"/v1/commands/{quote(command_id, safe='')}/explain"
        )
        if not serving and found["next"] is not None:
            print("ordain: no broker serves this log; the command waits until one does", file=sys.stderr)
        return found

    found = ask(data, config, asking)
    if as_json:
        print_json(found)
    else:
        print(found["summary"])
