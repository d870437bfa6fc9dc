"""Daily work by command line: commands, devices, purges, webhooks, your own Mosquitto, types, completion."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from broker.cli.main import COMMANDS, run
from broker.operations.passwords import CANARIES
from tests.conftest import program, unused_port
from tests.integration.mqtt.test_link import certificate
from tests.system import zygote
from tests.system.conftest import NewBroker
from tests.system.support import (
    ORDAIN,
    SECRET,
    Broker,
    Device,
    environment,
    executed,
    made,
    ordain,
    refused,
    until,
)

OLD = "UPDATE events SET recorded_at = 1000000000000 + position, decided_at = 1000000000000 + position"


def as_json(broker: Broker, *arguments: str) -> Any:
    done = broker.ordain(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def asked(broker: Broker, answer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs one command line, and answers its question."""
    return subprocess.run(
        [zygote.program(ORDAIN), *arguments, "--data", str(broker.data)],
        input=answer,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )


def test_commands_are_listed_shown_cancelled_and_retried(broker: Broker) -> None:
    broker.device("lamp")
    broker.device("door")
    ids = [broker.create("lamp", "on"), broker.create("lamp", "off"), broker.create("door", "on")]

    assert [one["id"] for one in as_json(broker, "commands", "list")] == ids[::-1]
    assert [one["id"] for one in as_json(broker, "commands", "list", "--limit", "1")] == ids[2:]
    lamp = as_json(broker, "commands", "list", "--device", "lamp", "--type", "on", "--limit", "0")
    assert [one["id"] for one in lamp] == ids[:1]
    assert ids[1] in broker.ordain("commands", "list", "--state", "pending").stdout
    refused(broker.ordain("commands", "list", "--state", "open"), 1, "state")
    shown = as_json(broker, "commands", "show", ids[0])
    assert [event["type"] for event in shown["events"]] == ["created"]
    text = broker.ordain("commands", "show", ids[0]).stdout
    assert "created" in text
    assert "grant" not in text

    assert made_words(broker.ordain("commands", "cancel", ids[0])) == [ids[0], "cancelled"]
    again = made(broker.ordain("commands", "retry", ids[0]))

    assert broker.command(again)["retry_of"] == ids[0]
    refused(broker.ordain("commands", "retry", again), 1, "pending")
    refused(broker.ordain("commands", "cancel", "cmd_x"), 1, "cmd_x")


def made_words(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_terminal_does_not_obey_what_a_device_wrote(broker: Broker) -> None:
    steering = "\x1b]0;title\x07\x1b[2J \x9b31m \u202e\nok"
    token = broker.device("sly")
    named = broker.http("PATCH", "/v1/devices/sly", {"name": steering})
    assert named.status_code == 200
    device = Device(broker.mqtt_port, "sly", token)
    listening = device.listen()
    command = broker.create("sly", "on", params={"text": steering})
    device.next(listening)
    assert device.say(json.dumps({"id": command, "status": "failed", "error": steering})) == 0
    broker.reaches(command, "failed")
    events = broker.http("GET", f"/v1/commands/{command}/events").json()["data"]
    first, last = (str(events[at]["position"]) for at in (0, -1))

    for words in (
        ["explain", command], ["commands", "show", command], ["log", "show", command],
        ["devices", "show", "sly"], ["diff", first, last],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            done = broker.ordain(*words, *more)
            assert done.returncode == 0, done.stderr
            assert "\\u009b31m" in done.stdout, words
            assert all(line.isprintable() for line in done.stdout.split("\n")), words
    assert as_json(broker, "devices", "show", "sly")["name"] == steering


def test_devices_are_shown_with_presence_get_new_tokens_and_are_deleted(broker: Broker) -> None:
    device = Device(broker.mqtt_port, "lamp", broker.device("lamp"))
    listening = device.listen()
    until(lambda: as_json(broker, "devices", "list")[0]["presence"] == "online" or None)
    assert " online " in broker.ordain("devices", "list").stdout

    token = made(broker.ordain("devices", "token", "lamp"))

    assert SECRET.match(token)
    assert listening.wait() != 0
    assert Device(broker.mqtt_port, "lamp", token).say("online", suffix="status") == 0
    command_id = broker.create("lamp", "on")
    shown = as_json(broker, "devices", "show", "lamp")
    assert (shown["hardware_id"], shown["open_commands"]) == ("lamp", [command_id])
    assert "presence" in broker.ordain("devices", "show", "lamp").stdout
    refused(broker.ordain("devices", "delete", "lamp"), 1, "open")
    assert made_words(broker.ordain("devices", "delete", "lamp", "--force")) == [shown["id"], "deleted"]
    refused(broker.ordain("devices", "show", "lamp"), 1, "lamp")


def test_a_purge_asks_first_and_a_dry_run_erases_nothing(new_broker: NewBroker) -> None:
    broker = new_broker()
    made(broker.ordain("devices", "add", "lamp", "--type", "generic"))
    old = made(broker.ordain("send", "lamp", "on"))
    broker.ordain("commands", "cancel", old)
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:  # it is from the year 2001
        sql.execute(OLD)
        sql.execute("UPDATE commands SET closed_at = 1000000000009")
    purge = ("purge", "--older-than-days", "30")

    assert as_json(broker, *purge, "--dry-run")["commands"] == 1
    for answer in ("n\n", "\n", ""):
        done = asked(broker, answer, *purge)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Erase 1 commands created before" in done.stderr
        assert "--yes" in done.stderr
    assert as_json(broker, "commands", "show", old)["id"] == old

    assert "1 commands" in asked(broker, "y\n", *purge).stdout
    refused(broker.ordain("commands", "show", old), 1, old)
    assert "0 commands" in asked(broker, "", *purge).stdout
    assert as_json(broker, *purge, "--yes")["deleted"] == 0


def test_a_purge_of_device_events_asks_first(broker: Broker) -> None:
    broker.device("lamp")
    for number in range(3):
        changed = broker.operator("PATCH", "/v1/devices/lamp", {"attributes": {"n": number}})
        assert changed.status_code == 200
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:  # they are from the year 2001
        sql.execute(OLD)
    purge = ("purge", "--device-events", "--older-than-days", "30")

    assert as_json(broker, *purge, "--dry-run")["erased"] == 2
    assert "Erase 2 device events replaced before" in asked(broker, "n\n", *purge).stderr
    assert "2 device events" in asked(broker, "y\n", *purge).stdout
    assert as_json(broker, *purge)["erased"] == 0


def test_the_list_of_webhooks_says_why_deliveries_fail(new_broker: NewBroker, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('webhook_allow = ["127.0.0.0/8"]')
    broker = new_broker("--config", str(config)).start()
    url = f"http://127.0.0.1:{unused_port()}/"
    assert broker.http("POST", "/v1/webhooks", {"url": url}).status_code == 201
    broker.device("lamp")
    broker.create("lamp", "on")

    (hook,) = until(
        lambda: (
            hooks if (hooks := as_json(broker, "webhooks", "list"))[0]["last_failure"] is not None else None
        )
    )

    assert "Connect" in hook["last_failure"]["error"]
    line = broker.ordain("webhooks", "list").stdout.splitlines()[1]
    assert f"position {hook['failing']['position']} failed" in line
    assert "Connect" in line


def test_a_mosquitto_with_the_password_file_accepts_devices_canary_and_broker(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    port = unused_port()
    passwords, config = tmp_path / "passwd", tmp_path / "mosquitto.conf"
    rules = (Path(__file__).parents[3] / "docs" / "mosquitto.acl").read_text()
    (tmp_path / "acl").write_text(rules)
    config.write_text(
        f"user root\nlistener {port} 127.0.0.1\npassword_file {passwords}\nacl_file {tmp_path}/acl\n"
        "allow_anonymous false\nuse_username_as_clientid true\n"
    )
    broker = new_broker("--mqtt-url", f"mqtt://ordain:s%23cret@127.0.0.1:{port}")
    token = made(broker.ordain("devices", "add", "lamp", "--type", "generic"))
    url = {"ORDAIN_MQTT_URL": f"mqtt://ordain:s%23cret@127.0.0.1:{port}"}

    written = broker.ordain("mqtt", "passwd-file", "--to", str(passwords), **url)

    assert written.stdout == f"{passwords}: 5 users\n", written.stderr
    assert passwords.stat().st_mode & 0o777 == 0o600
    names = {line.partition(":")[0] for line in passwords.read_text().splitlines()}
    assert names == {"lamp", "ordain", *CANARIES}
    plain = broker.ordain("mqtt", "passwd-file", "--no-canary")
    assert {line.partition(":")[0] for line in plain.stdout.splitlines()} == names - {"ordain"}
    server = subprocess.Popen([program("mosquitto"), "-c", str(config)])
    try:
        broker.start()
        broker.run.err.wait("event=mqtt.link_up")
        device = Device(port, "lamp", token)
        device.subscribe()
        device.online()
        command_id = broker.create("lamp", "on")
        device.next(device.listen("rls", "-c"))
        device.say(executed(command_id))
        broker.reaches(command_id, "executed")
        for _ in range(2):  # the canary keeps its tokens: the file stays right
            assert "no device can use another's topics" in broker.canary()
    finally:
        server.kill()
        server.wait()


def test_a_private_authority_of_an_mqtt_server_holds_for_link_demo_and_doctor(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    certificate(tmp_path)
    port, passwords = unused_port(), tmp_path / "passwd"
    url = f"mqtts://ordain:secret@127.0.0.1:{port}"
    (tmp_path / "mosquitto.conf").write_text(
        f"user root\nlistener {port} 127.0.0.1\npassword_file {passwords}\nallow_anonymous false\n"
        f"certfile {tmp_path}/cert.pem\nkeyfile {tmp_path}/key.pem\n"
    )
    (tmp_path / "config.toml").write_text(f'mqtt_url = "{url}"\nmqtt_ca = "{tmp_path}/cert.pem"\n')
    config = ("--config", str(tmp_path / "config.toml"))
    broker = new_broker(*config, "--mqtt-url", url, "--demo").start()
    until(lambda: len(as_json(broker, "devices", "list")) == 3 or None)
    assert broker.ordain("mqtt", "passwd-file", "--to", str(passwords), *config).returncode == 0

    server = subprocess.Popen([program("mosquitto"), "-c", str(tmp_path / "mosquitto.conf")])
    try:
        broker.run.err.wait("event=mqtt.link_up")
        sent = broker.ordain("send", "demo_lock", "lock", "--wait", "--ttl", "0", "--timeout", "300")
        assert "executed" in sent.stdout, sent.stderr
        assert "no client connects without a password" in broker.ordain("doctor", *config).stdout
        untrusted = broker.ordain("doctor").stdout
        assert "could not be checked" in untrusted
    finally:
        server.kill()
        server.wait()


TYPE = """
name = "lamp"
payload = "json"
[commands.on]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TYPE.replace("json", "yaml"), ("type.toml", "payload", "yaml")),
        (TYPE.replace("lamp", "generic"), ("generic", "Ordain itself")),
        (TYPE + "colour = 1", ("colour",)),
        ("name = ", ("TOML",)),
    ],
)
def test_a_wrong_type_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "type.toml").write_text(text)

    assert run(["types", "check", str(tmp_path / "type.toml"), "--json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "usage"
    assert all(word in error["message"] for word in words), error


def test_a_type_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "type.toml"
    assert run(["types", "check", str(missing)]) == 2
    assert capsys.readouterr().err == f"ordain: {missing}: cannot be read: No such file or directory\n"


def test_a_valid_type_file_is_named_too_also_with_a_byte_order_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "type.toml").write_text(TYPE, "utf-8-sig")

    assert run(["types", "check", str(tmp_path / "type.toml")]) == 0
    assert "lamp is a valid device type: on" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0

    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "passwd-file" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "word"),
    [
        (("explain", "cmd_x"), 1, "not_found", "cmd_x"),
        (("send", "lamp", "on", "nonsense"), 2, "usage", "key=value"),
        (("log", "show", "cmd_x"), 1, "refused", "cmd_x"),
        (("keys", "list", "--nonsense"), 2, "usage", "--nonsense"),
        (("keys", "list", "--data", "/nowhere"), 3, "unavailable", "/nowhere"),
        (("devices", "add", "a/b", "--type", "generic"), 1, "invalid_request", "hardware_id"),
    ],
)
def test_with_json_an_error_is_json_too(
    tmp_path: Path, arguments: tuple[str, ...], exit_code: int, code: str, word: str
) -> None:
    made(ordain("devices", "add", "lamp", "--type", "generic", data=tmp_path / "data"))

    done = ordain(*arguments, "--json", ORDAIN_DATA=str(tmp_path / "data"))

    assert (done.returncode, done.stdout) == (exit_code, "")
    error = json.loads(done.stderr)["error"]
    assert error["code"] == code
    assert word in error["message"] + json.dumps(error.get("details"))
