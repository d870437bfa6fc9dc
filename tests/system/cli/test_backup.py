"""Backups beside a running broker: a backup is a complete prefix of the log or is not created; restoring
works."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.system.conftest import NewBroker
from tests.system.support import Broker, ordain, refused


def rows(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as sql:
        return sql.execute("SELECT * FROM events ORDER BY position").fetchall()


def test_a_backup_taken_while_commands_arrive_is_a_prefix_of_the_log(broker: Broker, tmp_path: Path) -> None:
    broker.device("lamp-1")
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(broker.create, "lamp-1", f"on-{n % 4}") for n in range(200)]
        files = [tmp_path / f"backup-{number}" for number in range(3)]
        made = [broker.ordain("backup", str(file), "--json") for file in files]
        assert all(len(one.result()) > 4 for one in busy)
    full = rows(broker.data / "ordain.db")
    for file, done in zip(files, made, strict=True):
        assert done.returncode == 0, done.stderr
        kept = rows(file)
        assert kept == full[: len(kept)]
        assert json.loads(done.stdout)["position"] == len(kept)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(tmp_path.glob("*.part")) == []


def test_a_restored_log_continues_its_open_commands(new_broker: NewBroker, tmp_path: Path) -> None:
    broker = new_broker().start()
    broker.device("lamp-1")
    kept = broker.create("lamp-1", "on", params={"a": 1})
    assert broker.ordain("backup", str(tmp_path / "b")).returncode == 0
    lost = broker.create("lamp-1", "off")
    assert broker.end() == 0
    done = ordain("restore", "--yes", str(tmp_path / "b"), data=tmp_path / "new")
    assert done.returncode == 0, done.stderr
    # A backup does not hold the pepper of the keys: the operator keeps a copy of it.
    shutil.copy(broker.data / "key.pepper", tmp_path / "new" / "key.pepper")
    again = new_broker(data=tmp_path / "new").start()
    again.key = broker.key
    assert again.command(kept)["params"] == {"a": 1}
    assert again.http("GET", f"/v1/commands/{lost}").status_code == 404
    assert again.verified()


def test_a_restored_log_gets_a_new_log_id(broker: Broker, tmp_path: Path) -> None:
    made = json.loads(broker.ordain("backup", str(tmp_path / "b"), "--json").stdout)
    found = json.loads(
        ordain("restore", "--yes", str(tmp_path / "b"), "--json", data=tmp_path / "new").stdout
    )
    assert found["log_id"].startswith("log_")
    assert found["log_id"] != made["log_id"]
    assert (found["position"], found["hash"]) == (made["position"], made["hash"])


def test_a_live_database_file_is_restored_with_all_answered_commands(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker().start()
    broker.device("lamp-1")
    last = broker.create("lamp-1", "on")
    assert (broker.data / "ordain.db-wal").stat().st_size > 0
    done = ordain("restore", "--yes", str(broker.data / "ordain.db"), data=tmp_path / "new")
    assert done.returncode == 0, done.stderr
    # A backup does not hold the pepper of the keys: the operator keeps a copy of it.
    shutil.copy(broker.data / "key.pepper", tmp_path / "new" / "key.pepper")
    again = new_broker(data=tmp_path / "new").start()
    again.key = broker.key
    assert again.command(last)["state"] == "pending"
    assert again.verified()


def test_no_existing_file_is_overwritten(broker: Broker, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    refused(broker.ordain("backup", str(there)), 1, str(there), "already exists")
    assert there.read_text() == "mine"
    assert broker.ordain("backup", str(tmp_path / "b")).returncode == 0
    refused(broker.ordain("restore", "--yes", str(tmp_path / "b")), 1, "already has a log")


@pytest.mark.parametrize("damage", ["a changed row", "cut off", "no database"])
def test_a_damaged_backup_is_refused_and_no_log_is_created(
    broker: Broker, tmp_path: Path, damage: str
) -> None:
    broker.device("lamp-1")
    broker.create("lamp-1", "on")
    file, new = tmp_path / "b", tmp_path / "new"
    assert broker.ordain("backup", str(file)).returncode == 0
    if damage == "a changed row":
        with closing(sqlite3.connect(file)) as sql, sql:
            sql.execute("UPDATE events SET actor = 'somebody' WHERE type = 'created'")
    else:
        file.write_bytes(file.read_bytes()[:20_000] if damage == "cut off" else b"nothing of the kind")
    done = ordain("restore", "--yes", str(file), data=new)
    assert done.returncode != 0
    assert str(file) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (new / "ordain.db").exists()


def test_restore_shows_the_keys_that_will_be_valid_and_needs_a_yes(broker: Broker, tmp_path: Path) -> None:
    made = broker.ordain("keys", "create", "--project", "acme", "--scope", "devices:write", "--name", "door")
    assert made.returncode == 0
    assert broker.ordain("backup", str(tmp_path / "b")).returncode == 0
    done = ordain("restore", str(tmp_path / "b"), data=tmp_path / "new")
    assert done.returncode == 1
    assert "project acme  scopes devices:write  'door'" in done.stderr
    assert "--yes" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_link_at_the_target_is_not_followed(broker: Broker, tmp_path: Path) -> None:
    broker.device("lamp-1")
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    for command in (("backup",), ("log", "export", "--to"), ("log", "checkpoint", "--to")):
        refused(broker.ordain(*command, str(tmp_path / "b")), 1, "already exists")
    assert sorted(path.name for path in tmp_path.glob("b*")) == ["b"]
    assert not (tmp_path / "elsewhere").exists()
