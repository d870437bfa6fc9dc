"""The command line with and without a running broker: output, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from devices.agent import Agent, Call, CommandFailed
from tests.system.conftest import NewBroker
from tests.system.support import (
    ORDAIN,
    SECRET,
    WITHIN_SEC,
    Broker,
    Process,
    environment,
    made,
    ordain,
    refused,
    running,
    until,
)

CREATE_KEY = ("keys", "create", "--project", "acme", "--scope", "devices:read", "--scope", "devices:write")
Answering = Callable[[str], Callable[[], Agent]]


def status(broker: Broker, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx2.get(f"{broker.url}/v1/devices", headers=headers, timeout=WITHIN_SEC, trust_env=False)
    return answer.status_code


def door(broker: Broker) -> Callable[[], Agent]:
    """Registers door-7 and returns a reference device for it: `lock` succeeds, `jam` fails."""
    token = made(broker.ordain("devices", "add", "door-7", "--type", "generic"))

    def make() -> Agent:
        agent = Agent(
            "door-7", token, f"mqtt://127.0.0.1:{broker.mqtt_port}", clean_session=True, grants="none"
        )

        @agent.command("lock")
        async def lock(call: Call) -> object:
            return {"got": call.params}

        @agent.command("jam")
        async def jam(call: Call) -> None:
            raise CommandFailed("jammed", "the bolt does not move")

        return agent

    return make


# --- keys ------------------------------------------------------------------------------------------


def test_a_running_broker_accepts_a_new_key_and_refuses_a_revoked_one_at_once(broker: Broker) -> None:
    key = made(broker.ordain(*CREATE_KEY, "--name", "for a test"))
    assert status(broker, key) == 200

    listed = json.loads(broker.ordain("keys", "list", "--json").stdout)
    assert [(one["project"], one["name"], one["revoked_at"]) for one in listed] == [
        ("acme", "for a test", None)
    ]
    assert broker.ordain("keys", "revoke", listed[0]["id"]).stdout == f"{listed[0]['id']} revoked\n"

    assert status(broker, key) == 401
    table = broker.ordain("keys", "list").stdout
    assert listed[0]["id"] in table
    assert not SECRET.search(table + json.dumps(listed))
    refused(broker.ordain("keys", "revoke", "key_unknown"), 1, "key_unknown")


def test_one_key_is_shown_with_its_limits_and_its_devices_but_not_its_secret(broker: Broker) -> None:
    limits = ("--requests-per-minute", "90", "--expires", "2h")
    devices = ("--device-prefix", "gate-", "--device", "door-7", "--device", "door-8")
    made(broker.ordain(*CREATE_KEY, "--name", "a door's", *limits, *devices))
    [listed] = json.loads(broker.ordain("keys", "list", "--json").stdout)

    shown = broker.ordain("keys", "show", listed["id"])

    fields = dict(line.split(": ", 1) for line in shown.stdout.splitlines())
    assert shown.returncode == 0
    assert (fields["id"], fields["name"], fields["project"]) == (listed["id"], "a door's", "acme")
    assert (fields["scopes"], fields["devices"]) == ("devices:read devices:write", "door-7 door-8")
    assert (fields["device prefixes"], fields["requests per minute"]) == ("gate-", "90")
    assert (fields["last used at"], fields["commands per minute"]) == ("-", "-")
    assert fields["expires at"] == listed["expires_at"] is not None
    assert json.loads(broker.ordain("keys", "show", listed["id"], "--json").stdout) == listed
    assert not SECRET.search(shown.stdout)
    refused(broker.ordain("keys", "show", "key_unknown"), 1, "key_unknown")


def test_keys_and_devices_made_without_a_broker_exist_when_it_starts(new_broker: NewBroker) -> None:
    broker = new_broker()
    key = made(broker.ordain(*CREATE_KEY))
    made(broker.ordain("devices", "add", "door-7", "--type", "generic", "--project", "acme"))
    sent = made(broker.ordain("send", "door-7", "lock"))

    broker.start()

    headers = {"Authorization": f"Bearer {key}"}
    url = f"{broker.url}/v1/commands/{sent}"
    answer = httpx2.get(url, headers=headers, timeout=WITHIN_SEC, trust_env=False)
    assert answer.json()["status"] == "pending"


def test_without_a_broker_its_settings_are_required_and_another_prefix_is_refused(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    config = tmp_path / "site.toml"
    config.write_text('prefix = "site1"')
    broker = new_broker("--config", str(config)).start()
    broker.device("door-7")
    made(broker.ordain("send", "door-7", "lock"))
    broker.end()

    refused(broker.ordain("send", "door-7", "unlock"), 2, "prefix = 'iotee'", "'site1'", "--config")
    made(broker.ordain("send", "door-7", "unlock", "--config", str(config)))

    shown = broker.ordain("log", "tail", "--json", "--config", str(config)).stdout.splitlines()
    created = [row["data"] for row in map(json.loads, shown) if row["type"] == "created"]
    assert [data["topic"] for data in created] == ["site1/dev/door-7/rls"] * 2


def test_an_invalid_name_is_not_used_in_a_path_and_a_count_cannot_be_negative(broker: Broker) -> None:
    broker.device("lamp")

    refused(broker.ordain("keys", "revoke", "key_1?x"), 1, "key_1?x")
    refused(broker.ordain("send", "lamp/commands?", "lock"), 1)
    refused(broker.ordain("send", "lamp?x", "lock"), 1)
    refused(broker.ordain("log", "tail", "-f", "-n", "-5"), 2, "-5")


def test_a_key_as_json_has_its_secret_project_and_scopes(tmp_path: Path) -> None:
    done = ordain(*CREATE_KEY, "--json", "--data", str(tmp_path / "data"))

    key = json.loads(done.stdout)
    assert SECRET.fullmatch(key["key"])
    assert (key["project"], key["scopes"]) == ("acme", ["devices:read", "devices:write"])


# --- devices and sending ---------------------------------------------------------------------------


def test_devices_are_added_and_listed(broker: Broker) -> None:
    token = made(broker.ordain("devices", "add", "door-7", "--type", "generic", "--id", "front"))
    both = json.loads(broker.ordain("devices", "add", "ABC", "--type", "iotee_device", "--json").stdout)

    assert SECRET.fullmatch(token.removesuffix(".front"))
    assert SECRET.fullmatch(both["device_token"].removesuffix(f".{both['id']}"))
    listed = json.loads(broker.ordain("devices", "list", "--json").stdout)
    assert [(one["hardware_id"], one["type"]) for one in listed] == [
        ("ABC", "iotee_device"),
        ("door-7", "generic"),
    ]
    table = broker.ordain("devices", "list").stdout
    assert "front" in table
    assert not SECRET.search(table)
    refused(broker.ordain("devices", "add", "door-7", "--type", "generic"), 1, "door-7", "taken")
    refused(broker.ordain("devices", "add", "new", "--type", "toaster"), 1, "toaster", "iotee_device")


def test_a_command_is_sent_with_its_parameters_and_waited_for(broker: Broker) -> None:
    pairs = ("for_sec:=5", "name=Front door", 'users:=["a", "b"]', "note=", "version=1.10", "pin=0042")
    with running(door(broker)):
        done = broker.ordain("send", "door-7", "lock", *pairs, "--wait", "--json")
        short = broker.ordain("send", "door-7", "lock", "--wait")
        failed = broker.ordain("send", "door-7", "jam", "--wait")

    assert done.returncode == 0, done.stderr
    command = json.loads(done.stdout)
    params = {"for_sec": 5, "name": "Front door", "users": ["a", "b"], "note": "", "version": "1.10"}
    params["pin"] = "0042"
    assert (command["state"], command["params"], command["result"]) == ("executed", params, {"got": params})
    assert (short.returncode, short.stdout.split(maxsplit=1)[1]) == (0, 'executed {"got":{}}\n')
    refused(failed, 1, "failed")
    assert "the bolt does not move" in failed.stdout


def test_send_errors_name_the_fault(broker: Broker) -> None:
    broker.device("door-7", "recorder")

    refused(broker.ordain("send", "door-7", "lock", "nonsense"), 2, "nonsense", "key=value")
    refused(broker.ordain("send", "door-8", "lock"), 1, "door-8")
    refused(broker.ordain("send", "door-7", "fly"), 1, "fly")
    refused(broker.ordain("send", "door-7"), 2, "COMMAND")
    typed = broker.ordain(
        "send", "door-7", "start_recording", "max_duration_sec=60", "upload_immediately=false", "--json"
    )
    params = {"max_duration_sec": 60, "upload_immediately": False}
    assert json.loads(typed.stdout)["params"] == params, typed.stderr
    refused(broker.ordain("send", "door-7", "start_recording", "max_duration_sec=x"), 1, "max_duration_sec")
    refused(broker.ordain("send", "door-7", "start_recording", "metadata:={"), 2, "not JSON")
    waited = broker.ordain("send", "door-7", "stop_recording", "--wait", "--timeout", "0.2")
    refused(waited, 1, "pending", "0.2 s")


def test_waiting_without_a_broker_is_refused_and_names_the_recorded_command(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made(ordain("devices", "add", "door-7", "--type", "generic", data=data))

    done = ordain("send", "door-7", "lock", "--wait", data=data)

    refused(done, 3, "cmd_", "no broker")


def test_refusals_are_the_same_without_a_broker(tmp_path: Path) -> None:
    data = tmp_path / "data"

    refused(ordain("keys", "create", "--project", "a/b", "--scope", "admin", data=data), 1, "project", "a/b")
    refused(ordain("keys", "revoke", "key_unknown", data=data), 1, "key_unknown")
    refused(ordain("devices", "add", "door-7", "--type", "toaster", data=data), 1, "toaster")


def test_no_command_creates_a_log_in_a_wrong_directory(tmp_path: Path) -> None:
    data = tmp_path / "elsewhere"

    for arguments in (("keys", "list"), ("send", "door-7", "lock"), ("devices", "list"), ("purge", "1")):
        done = ordain(*arguments, data=data)
        assert done.returncode in (2, 3)
        assert not data.exists()
    refused(ordain("explain", "cmd_x", data=data), 3, f"there is no log at {data}")


# --- the log ---------------------------------------------------------------------------------------


def test_the_log_is_followed_as_it_grows(broker: Broker) -> None:
    broker.device("lamp")
    tail = Process(ORDAIN, "log", "tail", "-f", "--data", str(broker.data))
    tail.out.wait(" registered ")

    command_id = broker.create("lamp")

    assert " created " in tail.out.wait(command_id)
    tail.signal(signal.SIGINT)
    assert tail.wait() == 130
    assert tail.err.all() == ""


def test_the_tail_of_the_log_has_as_many_lines_as_asked_for(broker: Broker) -> None:
    broker.device("lamp")
    command_id = broker.create("lamp")

    lines = broker.ordain("log", "tail", "-n", "2", "--json").stdout.splitlines()

    assert [json.loads(line)["type"] for line in lines] == ["defined", "created"]
    assert json.loads(lines[1])["stream"] == command_id


def test_a_closed_pipe_is_no_error(broker: Broker) -> None:
    for number in range(20):
        broker.device(f"lamp-{number}")

    piped = f"{ORDAIN} log tail -n 1000 | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", piped], capture_output=True, text=True, timeout=WITHIN_SEC,
        env=environment(ORDAIN_DATA=str(broker.data), PYTHONUNBUFFERED="1"),
    )  # fmt: skip

    assert done.stderr == ""
    assert done.stdout.startswith("1 ")


TAMPERED = {
    "UPDATE events SET data = replace(data, 'lamp', 'lump') WHERE position = 3": "position 3",
    "UPDATE events SET data = CAST(replace(data, 'lamp', 'lump') AS BLOB) WHERE position = 3": "position 3",
    "UPDATE events SET actor = 'nobody' WHERE position = 3": "position 3",
    "DELETE FROM events WHERE position = 3": "position 3",
    "UPDATE events SET data = NULL, salt = NULL WHERE position = 4": "position 4",
}


def test_a_changed_or_missing_row_of_the_log_is_found_and_named(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker().start()
    for number in range(4):
        broker.device(f"lamp-{number}")
    assert broker.verified()
    broker.end()
    assert broker.verified()
    untouched = (broker.data / "ordain.db").read_bytes()

    for statement, place in TAMPERED.items():
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        (copy / "ordain.db").write_bytes(untouched)
        with closing(sqlite3.connect(copy / "ordain.db", isolation_level=None)) as sql:
            sql.execute(statement)
        refused(ordain("log", "verify", data=copy), 1, place)


def test_a_row_changed_under_a_running_broker_is_found(broker: Broker) -> None:
    broker.device("lamp")
    with closing(sqlite3.connect(broker.data / "ordain.db", isolation_level=None)) as sql:
        sql.execute("UPDATE events SET project = 'other' WHERE position = 2")

    refused(broker.ordain("log", "verify"), 1, "position 2")
    found = broker.ordain("log", "verify", "--json")
    assert found.returncode == 1
    assert "position 2" in json.loads(found.stdout)["fault"]


# --- where the data is -----------------------------------------------------------------------------


def test_a_data_directory_may_be_deeper_than_the_maximum_socket_path(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker(data=tmp_path / ("deep" * 20) / ("deeper" * 20)).start()

    broker.device("lamp")

    assert made(broker.ordain("send", "lamp", "lock"))
    assert broker.end() == 0
    assert not (broker.data / "ordain.sock").exists()


def test_the_command_line_works_while_the_broker_is_starting(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.launch()
    until(lambda: (broker.data / "ordain.lock").exists())

    made(broker.ordain(*CREATE_KEY))
    broker.run.err.wait("event=broker.serving")


def test_concurrent_command_lines_wait_for_each_other(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    runs = [
        Process(ORDAIN, "devices", "add", f"lamp-{number}", "--type", "generic", "--data", data)
        for number in range(4)
    ]

    assert [(run.wait(), run.err.all()) for run in runs] == [(0, "")] * 4


def test_a_missing_log_is_reported_and_not_created(tmp_path: Path) -> None:
    for command in (("log", "tail"), ("log", "verify")):
        refused(ordain(*command, data=tmp_path / "nothing"), 3, str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as somebody else")
def test_another_users_data_cannot_be_read(broker: Broker) -> None:
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    probe = subprocess.run([*nobody, ORDAIN, "--version"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip("another user cannot run this checkout's program")
    for command in (("keys", "list"), ("log", "tail"), ("log", "verify"), ("serve",)):
        done = subprocess.run(
            [*nobody, ORDAIN, *command], capture_output=True, text=True, timeout=WITHIN_SEC,
            env=environment(ORDAIN_DATA=str(broker.data), ORDAIN_HTTP="127.0.0.1:0"),
        )  # fmt: skip
        refused(done, 3, "Permission denied")


def test_help_and_version_work() -> None:
    shown = ordain("--help")

    assert shown.returncode == 0
    for word in ("serve", "keys", "devices", "send", "log", "Exit codes: 0 done; 1 refused"):
        assert word in shown.stdout
    assert ordain("--version").returncode == 0
    refused(ordain("fly"), 2, "fly")
