"""The output of `ordain serve` for the person or program that started it: log lines, messages to systemd."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.system import zygote
from tests.system.conftest import NewBroker
from tests.system.support import ORDAIN, WITHIN_SEC, Broker, Device, environment


def test_the_log_says_why_a_device_was_refused_and_from_where(broker: Broker) -> None:
    tokens = {name: broker.device(name) for name in ("lamp", "door", "gone")}
    assert broker.http("DELETE", "/v1/devices/gone").status_code == 200

    for name, token, why in (
        ("lamp", tokens["door"], "wrong token"),
        ("nobody", "dtok_x", "no device has this hardware id"),
        ("gone", tokens["gone"], "the device was deleted"),
        ("service", "sk_live_x", "the password of a service must be a valid API key with events:read"),
    ):
        assert Device(broker.mqtt_port, name, token).say("online", suffix="status") != 0
        line = broker.run.err.wait(f'why="{why}"')
        assert "event=mqtt.refused" in line
        assert f"user={name}" in line
        assert "address=127.0.0.1" in line
    door = Device(broker.mqtt_port, "door", tokens["door"])
    door.say("x", topic="iotee/dev/lamp/rls")
    line = broker.run.err.wait("event=mqtt.denied")
    assert "peer=door" in line
    assert "topic=iotee/dev/lamp/rls" in line
    assert "address=127.0.0.1" in line


def test_log_lines_can_be_json_and_only_from_a_level_on(new_broker: NewBroker, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('log_format = "json"\nlog_level = "warning"\n')
    broker = new_broker("--config", str(config), "--demo", "--http", "127.0.0.1:0")
    (broker.data / "demo").parent.mkdir()
    (broker.data / "demo").write_text("not a directory")

    started = broker.launch()
    line = json.loads(started.err.wait("demo.failed"))

    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["level"], line["event"]) == ("error", "demo.failed")
    assert "Traceback" in line["exception"]
    broker.end()
    assert {json.loads(each)["level"] for each in started.err.all().splitlines()} <= {"warning", "error"}


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("format", ["text", "json"])
def test_under_systemd_lines_have_a_priority_and_no_time_and_the_manager_is_told(
    tmp_path: Path, abstract: bool, format: str
) -> None:
    place = f"@ordain-{os.getpid()}-{format}" if abstract else str(tmp_path / "notify")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        open(tmp_path / "journal", "wb") as journal,
    ):
        manager.settimeout(WITHIN_SEC)
        manager.bind("\0" + place[1:] if abstract else place)
        status = os.fstat(journal.fileno())
        more = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}", "NOTIFY_SOCKET": place}
        started = subprocess.Popen(
            [zygote.program(ORDAIN), "serve", "--http", "127.0.0.1:0", "--mqtt-listen", "127.0.0.1:0"],
            stderr=journal,
            env=environment(ORDAIN_DATA=str(tmp_path / "data"), ORDAIN_LOG_FORMAT=format, **more),
        )
        try:
            assert manager.recv(100) == b"READY=1"
            started.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert started.wait(WITHIN_SEC) == 0
        finally:
            started.kill()
            started.wait()

    lines = (tmp_path / "journal").read_text().splitlines()
    start = r"<6>level=info event=" if format == "text" else r'<6>\{"level": "info", "event": '
    assert lines
    assert all(re.match(start, line) for line in lines), lines
    assert "timestamp" not in "".join(lines)


def test_metrics_can_have_a_listener_of_their_own(tmp_path: Path, new_broker: NewBroker) -> None:
    config = tmp_path / "config.toml"
    config.write_text('metrics = "127.0.0.1:0"\n')
    broker = new_broker("--config", str(config)).start()
    at = broker.run.err.wait("event=metrics.serving").split(" at=")[1].split()[0]
    assert b"ordain_ready 1.0" in urlopen(f"http://{at}/metrics").read()
    for url in (f"http://{at}/healthz", f"{broker.url}/metrics"):
        with pytest.raises(HTTPError, match="404"):
            urlopen(url)
