"""`ordain doctor` prints its findings; its exit code is 0 also with warnings, and 1 with a fault.

`ordain nodes` lists the brokers that share a log, as the log itself shows them.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import httpx2
import msgspec
from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, print_json, print_table, settings_of
from broker.control import ask_alone
from broker.domain.events import OWNER, Owned
from broker.opening import open_to_read
from broker.operations import doctor as looks
from broker.operations.asking import REFUSED, Failed
from broker.operations.doctor import Finding
from broker.seams import Readable

BROKEN_LOG = (
    "format",
    "file",
    "chain",
    "projections",
)  # after a fault here, no request may use the broken log


def doctor(
    *,
    canary: Annotated[bool, Parameter(negative="")] = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check everything a broker depends on, and say how to correct problems. A broker may run or not.

    Parameters
    ----------
    canary
        Also check the MQTT server's access rules as a device. The first run registers three devices for it,
        and keeps their tokens in the data directory.
    """
    settings = settings_of(config, data=data)
    found = list(looks.postgresql(settings) if settings.log else looks.files(Path(settings.data)))

    async def asking(client: httpx2.AsyncClient, serving: bool) -> list[Finding]:
        return [
            *await looks.broker(client, serving),
            *await looks.mqtt(client, serving, settings, canary=canary),
        ]

    if not any(each.level == "fault" and each.check in BROKEN_LOG for each in found):
        found += ask_alone(settings, asking)
    faults = sum(each.level == "fault" for each in found)
    if as_json:
        print_json([each._asdict() for each in found])
    else:
        for each in found:
            print(f"{each.level:8}{each.check:12}{each.says}" + (f"\n{'':20}→ {each.do}" if each.do else ""))
    if faults:
        raise Failed(REFUSED, f"{faults} fault{'s' if faults > 1 else ''} found")


# --- nodes ---

nodes = App(name="nodes", help="Nodes: list the brokers that share a log.")

WAIT_SEC = 2.5  # two beats, and a little more


@nodes.command(name="list")
def list_nodes(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """List the brokers that share a log in PostgreSQL, with their roles.

    It looks twice, 2.5 seconds apart: a node whose sign of life has not changed is `silent`. No broker has to
    run. The term is the number of times that the log has had an owner.
    """
    settings = settings_of(config, data=data)
    if not settings.log:
        raise Failed(REFUSED, "this log is a file of its data directory: one broker serves it")
    with closing(open_to_read(settings)) as sql:
        before = {row[0]: row[3] for row in _rows(sql)}
        time.sleep(WAIT_SEC)
        term, owner = _owner(sql)
        found = [_node(row, before.get(row[0]), owner) for row in _rows(sql)]
    if as_json:
        print_json({"term": term, "nodes": found})
        return
    print(f"term {term}")
    print_table(
        ("name", "role", "address", "incarnation"),
        [(each["name"], each["role"], each["address"] or "", each["incarnation"]) for each in found],
    )


def _rows(sql: Readable) -> list[Any]:
    return sql.execute(
        "SELECT incarnation, name, address, beat, draining FROM nodes ORDER BY name, incarnation"
    ).fetchall()


def _owner(sql: Readable) -> tuple[int, str | None]:
    """The term, and the run of a process that has claimed it."""
    row = sql.execute(
        "SELECT version, data FROM events WHERE stream = ? ORDER BY version DESC LIMIT 1", (OWNER,)
    ).fetchone()
    return (0, None) if row is None else (row[0], msgspec.json.decode(row[1], type=Owned).incarnation)


def _node(row: Any, before: int | None, owner: str | None) -> dict[str, Any]:
    incarnation, name, address, beat, draining = row
    role = "leaving" if draining else "owner" if incarnation == owner else "door"
    return {
        "name": name,
        "role": "silent" if beat == before else role,
        "address": address,
        "incarnation": incarnation,
    }
