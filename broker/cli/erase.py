"""`ordain delete` and `ordain purge`: erase commands permanently. The log records that they were erased."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, ask, print_json
from broker.operations.asking import call


def delete(command_id: str, /, *, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """Erase one closed command permanently. A pending command is cancelled first.

    Parameters
    ----------
    command_id
        The command's id.
    """
    path = f"/commands/{quote(command_id, safe='')}"
    gone = ask(data, config, lambda client, _: call(client, "DELETE", path))
    if as_json:
        print_json(gone)
    else:
        print(f"{gone['deleted']} erased")


def purge(
    *,
    older_than_days: Annotated[int, Parameter(name="--older-than-days")],
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Erase permanently all closed commands that are older than a number of days.

    A command is older if it was created before midnight (UTC) that many days ago.

    Parameters
    ----------
    older_than_days
        0 to 36500; 0 erases all closed commands created before today.
    """
    body = {"older_than_days": older_than_days}
    purged = ask(data, config, lambda client, _: call(client, "POST", "/commands/purge", body))
    if as_json:
        print_json(purged)
    else:
        print(f"{purged['deleted']} commands created before {purged['cutoff_date']} erased")
