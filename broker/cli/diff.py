"""`ordain diff`: the changes between two points of the log. It only sends requests to the broker."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import msgspec

from broker.cli.base import Config, Data, Json, ask, escaped, print_json
from broker.operations.asking import Client, call


def diff(
    before: str, after: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Show the changes between two points of the log: commands and devices, field by field.

    Parameters
    ----------
    before
        A position of the log, or an RFC 3339 time.
    after
        A later one.
    """

    async def asking(client: Client, _: bool) -> None:
        cursor: str | None = ""
        while cursor is not None:
            asked = {"from": before, "to": after, "limit": "100"} | ({"cursor": cursor} if cursor else {})
            page = await call(client, "GET", f"/v1/diff?{urlencode(asked)}")
            for change in page["data"]:
                if as_json:
                    print_json(change)
                else:
                    print(escaped(_line(change)), flush=True)
            cursor = page["next_cursor"]

    ask(data, config, asking)


def _line(change: dict[str, Any]) -> str:
    old, new = change["before"] or {}, change["after"]
    what = [change["kind"], change["id"], new["hardware_id"]]
    if change["before"] is None:
        return " ".join([*what, "new:", new.get("state", new["type"])])
    changed = [
        f"{field}: {_text(old.get(field))} → {_text(value)}"
        for field, value in new.items()
        if value != old.get(field)
    ]
    return " ".join(what) + "  " + ", ".join(changed)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
