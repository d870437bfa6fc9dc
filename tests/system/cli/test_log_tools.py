"""Operators' tools on the log, as processes beside a running broker and without one."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from broker.world import DATABASE
from tests.system.support import Broker, refused


def test_diff_shows_changes_field_by_field(broker: Broker) -> None:
    broker.device("door-7")
    command_id = broker.create("door-7", "lock")
    created = broker.http("GET", f"/v1/commands/{command_id}/events").json()["data"][0]["position"]
    broker.http("DELETE", f"/v1/devices/door-7/commands/{command_id}")

    new = broker.ordain("diff", str(created - 1), str(created))
    assert (new.returncode, new.stdout, new.stderr) == (0, f"command {command_id} door-7 new: pending\n", "")
    gone = broker.ordain("diff", str(created), str(created + 1)).stdout
    assert gone == f"command {command_id} door-7  status: pending → cancelled, state: pending → cancelled\n"
    broker.end()
    stopped = broker.ordain("diff", "0", str(created + 1), "--json").stdout.splitlines()
    changes = [json.loads(line) for line in stopped]
    assert [(c["kind"], c["before"]) for c in changes] == [("device", None), ("command", None)]
    refused(broker.ordain("diff", "yesterday", "2"), 1, "from", "yesterday")
    refused(broker.ordain("diff", "2", "1"), 1, "from")


def test_projections_are_verified_beside_the_broker_and_rebuilt_without_it(broker: Broker) -> None:
    broker.device("door-7")
    broker.create("door-7", "lock")
    right = broker.ordain("projections", "verify")
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.startswith("the projections match the log, ")
    refused(broker.ordain("projections", "rebuild"), 3, "another broker", "serves")
    broker.end()

    with closing(sqlite3.connect(broker.data / DATABASE, isolation_level=None)) as sql:
        sql.execute("UPDATE commands SET state = 'executed'")
    refused(broker.ordain("projections", "verify"), 1, "commands, the row of position", "state")
    wrong = broker.ordain("projections", "verify", "--json")
    assert (wrong.returncode, "state" in json.loads(wrong.stdout)["fault"]) == (1, True)
    rebuilt = broker.ordain("projections", "rebuild")
    assert (rebuilt.returncode, rebuilt.stderr) == (0, "")
    assert rebuilt.stdout.startswith("the projections were rebuilt from ")
    assert json.loads(broker.ordain("projections", "verify", "--json").stdout)["fault"] is None


def test_tools_report_a_missing_log_and_create_none(broker: Broker) -> None:
    nothing = str(broker.data / "nothing")
    for command in (("projections", "verify"), ("projections", "rebuild")):
        refused(broker.ordain(*command, "--data", nothing), 3, nothing)
    assert not (broker.data / "nothing").exists()


def test_an_export_beside_the_broker_imports_as_the_same_log(broker: Broker, tmp_path: Path) -> None:
    broker.device("door-7")
    broker.create("door-7", "lock")
    file, other = tmp_path / "log.jsonl", tmp_path / "other"
    out = json.loads(broker.ordain("log", "export", "--to", str(file), "--json").stdout)
    back = broker.ordain("log", "import", "--from", str(file), "--data", str(other))

    assert (back.returncode, back.stderr) == (0, "")
    assert back.stdout == (
        f"{other}: log {out['log_id']} up to position {out['position']}; hash {out['hash']}\n"
    )
    verified = json.loads(broker.ordain("log", "verify", "--json", "--data", str(other)).stdout)
    assert (verified["rows"], verified["hash"], verified["fault"]) == (out["position"], out["hash"], None)
    now = broker.http("GET", "/v1/system").json()["clock"]["now"]
    only = broker.ordain("log", "export", "--type", "created", "--until", now).stdout.splitlines()
    assert [json.loads(line)["type"] for line in only[1:]] == ["created"]
    refused(broker.ordain("log", "import", "--from", str(file)), 1, str(broker.data), "already")
    refused(broker.ordain("log", "export", "--since", "yesterday"), 2, "--since", "yesterday")


def test_a_checkpoint_detects_a_cut_off_log(broker: Broker, tmp_path: Path) -> None:
    broker.device("door-7")
    kept = tmp_path / "checkpoint.jwt"
    done = broker.ordain("log", "checkpoint", "--to", str(kept))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    said = json.loads(broker.ordain("log", "checkpoint", "--json").stdout)
    assert said["checkpoint"] == kept.read_text().strip()
    good = broker.ordain("log", "verify", "--against", str(kept))
    assert good.returncode == 0
    assert "it continues the checkpoint at position" in good.stdout
    thumbprint = good.stdout.split()[-1]
    assert said["thumbprint"] == thumbprint
    refused(broker.ordain("log", "verify", "--against", str(kept), "--key", "noted"), 1, thumbprint, "noted")
    broker.end()

    with closing(sqlite3.connect(broker.data / DATABASE, isolation_level=None)) as sql:
        sql.execute("DELETE FROM events WHERE position = (SELECT max(position) FROM events)")
        sql.execute("DELETE FROM events WHERE position = (SELECT max(position) FROM events)")
    assert broker.ordain("log", "verify").returncode == 0
    cut = broker.ordain("log", "verify", "--against", str(kept), f"--key={thumbprint}")
    refused(cut, 1, "cut off")


def test_show_stats_and_compact_describe_the_log(broker: Broker) -> None:
    broker.device("door-7")
    command_id = broker.create("door-7", "lock")
    shown = broker.ordain("log", "show", command_id, "--json").stdout.splitlines()
    created = json.loads(shown[0])
    assert (created["type"], created["stream"], created["data"]["type"]) == ("created", command_id, "lock")
    assert json.loads(broker.ordain("log", "show", str(created["position"]), "--json").stdout) == created
    assert " registered " in broker.ordain("log", "show", "door-7").stdout.splitlines()[0]
    refused(broker.ordain("log", "show", "99999"), 1, "99999")

    found = json.loads(broker.ordain("log", "stats", "--json").stdout)
    assert (found["by_type"]["created"], found["by_type"]["registered"]) == (1, 1)
    assert found["bytes"][DATABASE] > 0
    refused(broker.ordain("log", "compact"), 3, "another broker")
    broker.end()
    assert broker.ordain("log", "compact").stdout.endswith(" after\n")
    assert broker.ordain("log", "stats").stdout.startswith("log id ")


def test_redecide_repeats_the_decisions_about_a_command(broker: Broker, tmp_path: Path) -> None:
    broker.device("door-7")
    command_id = broker.create("door-7", "lock")
    broker.http("DELETE", f"/v1/devices/door-7/commands/{command_id}")
    file = tmp_path / "one.jsonl"
    assert broker.ordain("log", "export", "--command", command_id, "--to", str(file)).returncode == 0

    steps = broker.ordain("log", "redecide", str(file), "--json")

    assert (steps.returncode, steps.stderr) == (0, "")
    found = [json.loads(line) for line in steps.stdout.splitlines()]
    assert [(step["type"], step["input"], step["fault"]) for step in found] == [
        ("created", "create", None),
        ("cancelled", "cancel", None),
    ]
    file.write_bytes(file.read_bytes().replace(b'"type":"cancelled"', b'"type":"expired"'))
    refused(broker.ordain("log", "redecide", str(file)), 1, str(file))
    refused(broker.ordain("log", "import", "--from", str(file), "--data", str(tmp_path / "x")), 1, command_id)
