"""`ordain migrate`: a log moves from a data directory into PostgreSQL, whole or not at all."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.postgres import Postgres
from tests.system.conftest import NewBroker
from tests.system.support import Broker, Device, executed, refused


def lived_in(new_broker: NewBroker) -> tuple[Broker, str, str]:
    """A stopped broker with an executed and an open command."""
    broker = new_broker().start()
    door = Device(broker.mqtt_port, "door-7", broker.device("door-7"))
    done = broker.create("door-7", "lock", params={"name": "Größe"})
    door.next()
    door.say(executed(done))
    broker.reaches(done, "executed")
    left = broker.create("door-7", "lock", ttl_sec=3_600)
    assert broker.end() == 0
    return broker, done, left


def test_a_moved_log_has_the_same_hashes_keys_and_open_commands(new_broker: NewBroker, database: str) -> None:
    broker, done, left = lived_in(new_broker)
    before = json.loads(broker.ordain("log", "verify", "--json").stdout)

    moved = broker.ordain("migrate", "--from", str(broker.data), "--to", database, "--json")

    assert moved.returncode == 0, moved.stderr
    assert json.loads(moved.stdout)["hash"] == before["hash"]
    after = json.loads(broker.ordain("log", "verify", "--json", "--log", database).stdout)
    assert after == before
    refused(broker.ordain("send", "door-7", "lock"), 3, "was moved to postgresql://ordain@")
    broker.start("--log", database)
    assert broker.command(done)["state"] == "executed"
    assert broker.command(left)["state"] in ("pending", "published")
    assert broker.command(done)["params"] == {"name": "Größe"}
    assert broker.end() == 0
    assert "match the log" in broker.ordain("projections", "verify", "--log", database).stdout


def test_a_log_that_was_moved_or_a_database_that_has_one_is_refused(
    new_broker: NewBroker, database: str, tmp_path: Path
) -> None:
    broker, *_ = lived_in(new_broker)
    other = new_broker(data=tmp_path / "other")
    assert other.ordain("keys", "create", "--project", "p", "--scope", "devices:read").returncode == 0
    assert broker.ordain("migrate", "--from", str(broker.data), "--to", database).returncode == 0
    again = broker.ordain("migrate", "--from", str(broker.data), "--to", database)
    assert again.returncode == 0, again.stderr  # it ends what may have been interrupted
    taken = broker.ordain("migrate", "--from", str(other.data), "--to", database)
    refused(taken, 1, "already has a log")
    refused(broker.ordain("migrate", "--from", str(broker.data), "--to", "mysql://x/y"), 2, "--to")


def test_an_interrupted_move_is_not_served_and_can_be_ended(
    new_broker: NewBroker, postgres: Postgres, database: str
) -> None:
    broker, done, _ = lived_in(new_broker)
    assert broker.ordain("migrate", "--from", str(broker.data), "--to", database).returncode == 0
    with closing(sqlite3.connect(broker.data / "ordain.db", isolation_level=None)) as sql:
        sql.execute("DELETE FROM meta WHERE key = 'moved_to'")
        log_id = sql.execute("SELECT value FROM meta WHERE key = 'log_id'").fetchone()[0]
    postgres.sql("test", f"INSERT INTO ordain.meta VALUES ('arriving', '{log_id}')")

    run = broker.launch("--log", database)
    assert run.wait() == 3
    assert "is not complete: run ordain migrate" in run.err.all()
    assert broker.ordain("migrate", "--from", str(broker.data), "--to", database).returncode == 0

    broker.start("--log", database)
    assert broker.command(done)["state"] == "executed"
    assert broker.end() == 0
