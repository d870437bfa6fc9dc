"""A really full disk: a small file system of its own that the tests fill and empty."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import NewBroker
from tests.system.support import Broker, ordain, refused, until

SIZE = "4m"
FULL = "log: it cannot be written"


class Disk:
    """A mounted file system, and the file that fills it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ballast = root / "ballast"

    def fill(self) -> None:
        with self.ballast.open("ab", buffering=0) as file:
            while os.statvfs(self.root).f_bavail:
                file.write(b"x" * 4_096)

    def empty(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(root)]
    done = subprocess.run(mounting, capture_output=True, text=True)
    if done.returncode != 0:
        why = f"a file system of a few MB cannot be mounted here: {done.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    yield Disk(root)
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def refused_for_want_of_space(broker: Broker) -> bool:
    answer = broker.http("POST", "/v1/devices/lamp/commands", {"type": "lock"})
    if answer.status_code == 201:
        return False
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
    assert answer.headers["Retry-After"]
    return True


def test_on_a_full_disk_creates_are_503_reads_work_and_with_space_creates_work_again(
    disk: Disk, new_broker: NewBroker
) -> None:
    broker = new_broker(data=disk.root / "data").start()
    broker.device("lamp")
    first = broker.create("lamp")

    disk.fill()
    until(lambda: refused_for_want_of_space(broker))
    assert refused_for_want_of_space(broker)

    assert broker.command(first)["state"] == "pending"
    assert broker.http("GET", "/v1/devices/lamp/commands").status_code == 200
    assert broker.not_ready() == [FULL]
    assert broker.http("GET", "/healthz").status_code == 200
    assert broker.verified()

    disk.empty()
    until(lambda: not broker.not_ready())
    second = broker.create("lamp")

    assert broker.command(second)["state"] == "pending"
    assert broker.verified()
    assert broker.end() == 0
    assert len(broker.runs) == 1


def test_the_command_line_reports_a_full_disk(disk: Disk, new_broker: NewBroker) -> None:
    broker = new_broker(data=disk.root / "data").start()
    broker.device("lamp")
    disk.fill()
    until(lambda: refused_for_want_of_space(broker))

    refused(broker.ordain("keys", "create", "--project", "p", "--scope", "admin"), 3, "the log", "written")
    refused(broker.ordain("send", "lamp", "lock"), 3, "the log", "written")
    assert broker.ordain("keys", "list").returncode == 0


def test_the_broker_stops_cleanly_on_a_full_disk_and_starts_again_with_space(
    disk: Disk, new_broker: NewBroker
) -> None:
    broker = new_broker(data=disk.root / "data").start()
    broker.device("lamp")
    command_id = broker.create("lamp")
    disk.fill()
    until(lambda: refused_for_want_of_space(broker))

    assert broker.end() == 0
    disk.empty()
    broker.start()

    assert broker.command(command_id)["state"] == "pending"
    assert broker.verified()


def test_a_start_on_a_full_disk_is_refused_in_one_sentence(disk: Disk) -> None:
    disk.fill()

    refused(ordain("serve", "--http", "127.0.0.1:0", data=disk.root / "data"), 3, "No space left")
    create = ("keys", "create", "--project", "acme", "--scope", "admin")
    refused(ordain(*create, data=disk.root / "data"), 3, "No space left")
