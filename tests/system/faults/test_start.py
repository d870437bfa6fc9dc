"""Starting: the demo for newcomers, and starts that must be refused with a one-sentence error."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from broker.cli.main import run
from broker.settings import Settings, load
from tests.system.conftest import NewBroker
from tests.system.support import (
    WITHIN_SEC,
    Broker,
    Device,
    environment,
    made,
    one_sentence,
    ordain,
    refused,
    until,
)


def bash(text: str, cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, timeout=WITHIN_SEC, env=environment(), cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def welcome(broker: Broker) -> dict[str, str]:
    """What the demo prints, line by line: the key, a command to send, a look at it, the log, the docs."""
    broker.run.out.wait("# docs ")
    lines = [line for line in broker.run.out.so_far().splitlines() if line]
    key, send, look, log = (line for line in lines if not line.startswith("#"))
    return {
        "key": key,
        "send": f"{key}; {send}",
        "look": f"{key}; {look}",
        "log": log,
        "docs": lines[-1].split()[-1],
    }


def test_each_line_the_demo_prints_can_be_pasted(new_broker: NewBroker, tmp_path: Path) -> None:
    broker = new_broker("--demo", data=tmp_path / "some where").start()

    printed = welcome(broker)
    answer, status = bash(printed["send"] + r" -w '\n%{http_code}'", tmp_path).rsplit("\n", 1)

    assert status == "201"
    assert '"status":"pending"' in answer
    until(lambda: '"state":"executed"' in bash(printed["look"], tmp_path))
    assert httpx2.get(printed["docs"], timeout=WITHIN_SEC, trust_env=False).status_code == 200
    assert "executed" in bash(printed["log"], tmp_path)


def test_a_restarted_demo_keeps_its_key_and_devices(new_broker: NewBroker, tmp_path: Path) -> None:
    broker = new_broker("--demo").start()
    key = welcome(broker)["key"]
    broker.run.kill()

    printed = welcome(broker.start())

    assert printed["key"] == key
    bash(printed["send"], tmp_path)
    until(lambda: '"state":"executed"' in bash(printed["look"], tmp_path))


def test_the_demo_leaves_out_deleted_devices_and_devices_of_others(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker("--demo")
    token = made(broker.ordain("devices", "add", "ABC123", "--type", "iotee_device"))
    printed = welcome(broker.start())
    broker.run.err.wait("demo.device_left_out hardware_id=ABC123")
    device = Device(broker.mqtt_port, "ABC123", token)
    assert device.say("online", suffix="status") == 0
    path = f"{broker.url}/v1/devices/demo_lock"
    writer = {"X-API-Key": printed["key"].removeprefix("export KEY=")}
    assert httpx2.delete(path, headers=writer, timeout=WITHIN_SEC, trust_env=False).is_success
    broker.end()

    printed = welcome(broker.start())

    broker.run.err.wait("demo.device_left_out hardware_id=demo_lock")
    bash(printed["send"], tmp_path)
    until(lambda: '"state":"executed"' in bash(printed["look"], tmp_path))


def test_a_second_broker_on_a_directory_is_refused_and_the_first_goes_on(broker: Broker) -> None:
    broker.device("lamp")

    second = broker.launch()

    assert second.wait() == 3
    one_sentence(second.err.all(), str(broker.data), str(broker.runs[0].process.pid))
    assert broker.create("lamp")
    assert (broker.data / "ordain.sock").exists()
    assert broker.verified()


def test_two_brokers_with_separate_directories_are_independent(
    broker: Broker, new_broker: NewBroker, tmp_path: Path
) -> None:
    other = new_broker(data=tmp_path / "other").start()

    broker.device("lamp")
    other.device("lamp")

    assert broker.create("lamp") != other.create("lamp")
    assert broker.http("GET", "/v1/commands").json() != other.http("GET", "/v1/commands").json()


@pytest.mark.parametrize("option", ["--http", "--mqtt-listen"])
def test_a_port_in_use_is_named(new_broker: NewBroker, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:{1}".format(*taken.getsockname())
        started = new_broker(option, address).launch()

        assert started.wait() == 2
        one_sentence(started.err.all(), option.strip("-").replace("-", "_"), address, "in use")


@pytest.mark.parametrize("address", ["192.0.2.1:80", "no-such-host.invalid:80"])
def test_an_address_of_another_machine_is_refused(new_broker: NewBroker, address: str) -> None:
    started = new_broker("--http", address).launch()

    assert started.wait() == 2
    one_sentence(started.err.all(), address)


@pytest.mark.parametrize(
    ("arguments", "toml", "words"),
    [
        ((), 'htpp = "127.0.0.1:80"', ("config.toml", "htpp")),
        ((), "http = 80", ("config.toml", "http = 80", "must be text")),
        ((), "[limits]\nqueue_per_device = 0", ("config.toml", "limits.queue_per_device = 0", "at least 1")),
        ((), "[limits]\nqueue = 0", ("config.toml", "limits.queue", "queue_per_device")),
        ((), "limits = 3", ("config.toml", "limits = 3", "table")),
        ((), "projects = 3", ("config.toml", "projects = 3", "[projects.<name>]")),
        ((), "[projects]\nacme = 3", ("config.toml", "projects.acme = 3", "table")),
        ((), "[projects.'a/b']", ("config.toml", "projects.a/b", "letters")),
        ((), "[projects.acme]\nqueue_per_name = 0", ("projects.acme.queue_per_name = 0", "at least 1")),
        ((), "[projects.acme]\nparams_bytes = '9'", ("projects.acme.params_bytes = '9'", "a whole number")),
        (
            (),
            "[projects.acme]\ncommands_per_minute = -1",
            ("projects.acme.commands_per_minute = -1", "from 0"),
        ),
        ((), "[projects.acme]\nbody_bytes = 9", ("projects.acme.body_bytes", "queue_per_device")),
        ((), 'mqtt_server = "mosquito"', ("config.toml", "mqtt_server = 'mosquito'")),
        ((), 'mqtt_url = ["mqtt://user:hidden@host"]', ("config.toml", "mqtt_url")),
        ((), "http = ", ("config.toml", "TOML")),
        ((), 'http = "nowhere"', ("http", "nowhere", "HOST:PORT")),
        ((), 'prefix = "a/b"', ("prefix", "a/b")),
        ((), 'mqtt_url = "http://127.0.0.1"', ("mqtt_url", "mqtt")),
        (("--config", "missing.toml"), "", ("missing.toml", "No such file")),
        (("--http", "127.0.0.1:99999"), "", ("http", "99999")),
        (("--mqtt-listen", ":1883"), "", ("mqtt_listen", ":1883")),
        (("--mqtt-listen", f"{'a' * 64}:1883"), "", ("mqtt_listen", "aaa")),
        (("--mqtt-url", "mqtt://user:hidden/slash@host"), "", ("mqtt_url", "%2F")),
        (("--mqtt-url", "mqtt://user:hid#den@host"), "", ("mqtt_url", "%23")),
        (("--mqtt-url", "mqtt://user:p@ss#hidden@host"), "", ("mqtt_url", "%23")),
        (("--mqtt-url", "mqtt://user:hidden@host#x"), "", ("mqtt_url", "fragment")),
        ((), 'mqtt_ca = "ca.pem"', ("mqtt_ca = 'ca.pem'", "mqtts://")),
        ((), 'mqtt_url = "mqtts://h"\nmqtt_key = "k.pem"', ("mqtt_key = 'k.pem'", "mqtt_certificate")),
        ((), 'mqtt_url = "mqtts://h"\nmqtt_ca = "no.pem"', ("mqtt_ca = 'no.pem'", "No such file")),
        ((), "http_keep_alive_sec = 0", ("http_keep_alive_sec = 0", "from 1 to")),
        ((), 'http = "::1:8080"', ("http = '::1:8080'", "brackets")),
        ((), 'log_level = "loud"', ("log_level = 'loud'", "warning")),
        ((), 'log_format = "xml"', ("log_format = 'xml'", "json")),
        (("--mqtt-url", "mqtt://user:hidden\N{CARE OF}@host"), "", ("mqtt_url", "://host")),
        (("--mqtt-url", "mqtt://[user:hidden@host"), "", ("mqtt_url", "percent")),
        (("--mqtt-url", f"mqtt://user:hidden@{'a' * 64}"), "", ("mqtt_url", "://host")),
        (("--nonsense",), "", ("--nonsense",)),
        (("--http",), "", ("--http",)),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    toml: str,
    words: tuple[str, ...],
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(toml)
    monkeypatch.setenv("ORDAIN_CONFIG", str(config))
    monkeypatch.setenv("ORDAIN_DATA", str(tmp_path / "data"))

    code = run(["serve", *arguments])

    assert code == 2
    said = capsys.readouterr().err
    one_sentence(said, *words)
    assert "hidden" not in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("format", ["3", "one", None])
def test_a_log_of_another_format_is_refused_by_every_command_and_not_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str | None,
) -> None:
    data = tmp_path / "data"
    monkeypatch.setenv("ORDAIN_DATA", str(data))
    assert run(["devices", "add", "lamp", "--type", "generic"]) == 0
    with closing(sqlite3.connect(data / "ordain.db")) as sql, sql:
        sql.execute("DELETE FROM meta WHERE key = 'format'")
        if format is not None:
            sql.execute("INSERT INTO meta VALUES ('format', ?)", (format,))
    database = (data / "ordain.db").read_bytes()
    capsys.readouterr()
    words = (f"its format is {format or 'missing'}", "reads 1 to 2")

    for command in (
        ("serve", "--http", "127.0.0.1:0", "--mqtt-listen", "127.0.0.1:0"),
        ("keys", "list"),
        ("log", "tail"),
        ("log", "verify"),
        ("log", "compact"),
        ("log", "export"),
        ("projections", "verify"),
        ("backup", str(tmp_path / "new.db")),
        ("replay", "--into", "stdout"),
        ("restore", str(data / "ordain.db"), "--data", str(tmp_path / "other")),
    ):
        assert run([*command]) == 3
        one_sentence(capsys.readouterr().err, *words)
    assert run(["doctor", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["check"], finding["level"]) == ("format", "fault")
    assert words[0] in finding["says"]

    assert (data / "ordain.db").read_bytes() == database
    assert not (tmp_path / "new.db").exists()
    assert not (tmp_path / "other").exists()


def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(b'\xef\xbb\xbfprefix = "acme"\n')

    assert load({}, {}, str(config)).prefix == "acme"


def test_with_ipv6_addresses_the_broker_its_demo_and_the_doctor_work(new_broker: NewBroker) -> None:
    broker = new_broker("--demo", "--http", "[::1]:0", "--mqtt-listen", "[::1]:0").start()

    assert broker.url.startswith("http://[::1]:")
    assert broker.http("GET", "/v1/devices").status_code == 200
    assert broker.url in welcome(broker)["send"]
    assert broker.ordain("send", "demo_lock", "lock", "--wait").returncode == 0
    assert "no client connects without a password" in broker.ordain("doctor").stdout


@pytest.mark.parametrize("broken", ["demo", "demo/demo_lock.sqlite3"])
def test_a_demo_that_fails_is_logged_and_the_broker_goes_on(new_broker: NewBroker, broken: str) -> None:
    broker = new_broker("--demo")
    (broker.data / broken).parent.mkdir(parents=True)
    (broker.data / broken).write_text("this is neither a directory nor a database\n" * 100)

    broker.start()

    assert "why=" in broker.run.err.wait("event=demo.failed")
    assert broker.device("lamp")
    assert broker.end() == 0


def test_an_idle_http_connection_is_kept_as_long_as_the_setting_says(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("http_keep_alive_sec = 1\n")
    broker = new_broker("--config", str(config)).start()
    place = httpx2.URL(broker.url)
    with socket.create_connection((place.host, place.port or 0), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        while connection.recv(4096):
            pass  # the end of the connection, long before the default of 75 s

    assert Settings().http_keep_alive_sec == 75


def test_a_data_path_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")

    refused(ordain("serve", data=tmp_path / "data"), 3, str(tmp_path / "data"))


def test_a_file_that_is_not_a_database_is_named_and_not_changed(tmp_path: Path) -> None:
    database = tmp_path / "ordain.db"
    database.write_text("precious " * 1_000)

    refused(ordain("keys", "list", data=tmp_path), 3, str(database), "not a database")
    refused(ordain("log", "verify", data=tmp_path), 3, str(database), "not a database")
    assert database.read_text() == "precious " * 1_000
