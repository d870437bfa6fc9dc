"""`ordain serve` with its log in PostgreSQL: kills, restarts, a second broker, the operator's commands."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.postgres import Postgres
from tests.system.conftest import NewBroker
from tests.system.support import Device, executed, refused, until


def test_after_kill_9_a_broker_goes_on_with_its_log_in_postgresql(
    new_broker: NewBroker, database: str, tmp_path: Path
) -> None:
    broker = new_broker("--log", database).start()
    door = Device(broker.mqtt_port, "door-7", broker.device("door-7"))
    done = broker.create("door-7")
    door.next()
    door.say(executed(done))
    broker.reaches(done, "executed")
    left = broker.create("door-7")
    first = json.loads(door.next())

    broker.kill()
    broker.start()
    second = json.loads(door.next())
    door.say(executed(left))

    assert (first["id"], first["attempt"]) == (left, 1)
    assert (second["id"], second["attempt"]) == (left, 2)
    broker.reaches(left, "executed")
    assert not (broker.data / "ordain.db").exists()
    verified = broker.ordain("log", "verify", "--log", database)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "no fault" in verified.stdout
    other = new_broker("--log", database, data=tmp_path / "other").launch()
    assert other.wait() == 3
    assert "is served by another broker: node" in other.err.all()
    assert broker.command(left)["state"] == "executed"
    assert broker.end() == 0


def test_the_broker_refuses_while_postgresql_is_away_and_goes_on_after_that(
    new_broker: NewBroker, postgres: Postgres, database: str
) -> None:
    broker = new_broker("--log", database).start()
    broker.device("door-7")
    before = broker.create("door-7")
    postgres.kill()
    try:
        answer = broker.http("POST", "/v1/devices/door-7/commands", {"type": "lock"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "log: it cannot be written" in broker.not_ready()
    finally:
        postgres.start()
    until(lambda: not broker.not_ready())
    after = broker.create("door-7")
    assert [broker.command(each)["state"] for each in (before, after)] == ["pending", "pending"]
    assert broker.end(signal.SIGTERM) == 0
    assert broker.ordain("log", "verify", ORDAIN_LOG=database).returncode == 0


def test_commands_of_the_operator_take_a_log_in_postgresql(
    new_broker: NewBroker, database: str, tmp_path: Path
) -> None:
    broker = new_broker("--log", database).start()
    broker.device("door-7")
    command = broker.create("door-7")

    def run(*arguments: str) -> str:
        done = broker.ordain(*arguments, "--log", database)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command in run("log", "tail")
    assert f"{command} v1 created" in run("log", "show", command)
    assert json.loads(run("log", "stats", "--json"))["by_type"]["created"] == 1
    assert "match the log" in run("projections", "verify")
    run("log", "checkpoint", "--to", str(tmp_path / "checkpoint"))
    assert "continues the checkpoint" in run("log", "verify", "--against", str(tmp_path / "checkpoint"))
    exported = tmp_path / "log.jsonl"
    run("log", "export", "--to", str(exported))
    assert len(exported.read_text().splitlines()) == 1 + json.loads(run("log", "stats", "--json"))["events"]
    run("log", "export", "--to", str(tmp_path / "one.jsonl"), "--command", command)
    assert command in run("commands", "list")
    run("replay", "--into", f"{tmp_path}/copy")
    found = json.loads(broker.ordain("doctor", "--json", "--log", database).stdout)
    levels = {each["check"]: each["level"] for each in found}
    assert {levels[name] for name in ("format", "chain", "projections", "clock", "broker")} == {"ok"}
    assert any(each["says"].startswith("fsync = off") for each in found), "the server of the tests has it off"
    refused(broker.ordain("backup", str(tmp_path / "b"), "--log", database), 1, "pg_basebackup")
    refused(broker.ordain("log", "compact", "--log", database), 1, "VACUUM")
    assert broker.end() == 0
    assert "rebuilt from" in run("projections", "rebuild")
    assert json.loads(run("send", "door-7", "lock", "--json"))["state"] == "pending"
