"""A database that the first release wrote is opened, served and verified by this one.

`0.1.0.db.gz` is that file: a log of format 1, with the projections and the key of that time. It must never
change.
"""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing
from pathlib import Path

from broker.world import DATABASE
from tests.golden.write import HERE
from tests.system.conftest import NewBroker

KEY = "sk_live_pgWKAFgaIrIt5QRyQz0uRP7Ytrg1fkTNMSmQOsHUVZc"  # of its project
OPEN = ("pending", "published", "acknowledged")


def test_a_database_of_the_first_release_is_opened_served_and_verified(
    tmp_path: Path, new_broker: NewBroker
) -> None:
    broker = new_broker()
    broker.data.mkdir(mode=0o700)
    broker.key = KEY
    (broker.data / DATABASE).write_bytes(gzip.decompress((HERE / "0.1.0.db.gz").read_bytes()))
    with closing(sqlite3.connect(broker.data / DATABASE)) as sql:
        before: dict[str, str] = dict(sql.execute("SELECT id, state FROM commands").fetchall())
        types: dict[str, str] = dict(sql.execute("SELECT stream, group_concat(type) FROM events GROUP BY 1"))
    assert len(set(before.values())) == 8

    broker.start()

    for command_id, state in before.items():
        if state not in OPEN:  # time goes on for the others
            assert broker.command(command_id)["state"] == state
            assert ",".join(broker.events(command_id)) == types[command_id]
    device = broker.http("GET", "/v1/devices/lamp-1").json()
    assert device["type"] == "generic"
    new = broker.create("lamp-2", "open")
    assert broker.http("DELETE", f"/v1/devices/lamp-2/commands/{new}").status_code == 200
    assert broker.command(new)["state"] == "cancelled"
    assert broker.ordain("projections", "verify").returncode == 0
    assert broker.verified()
    assert broker.end() == 0
    assert (broker.data / f"{DATABASE}.format-1").exists()
    export, copy = tmp_path / "log.jsonl", str(tmp_path / "copy")
    export.write_text(broker.ordain("log", "export").stdout)
    assert broker.ordain("log", "import", "--from", str(export), "--data", copy).returncode == 0
