"""Fixtures that every room of the tests may use: a free port, a real MQTT server and a real PostgreSQL.

The servers are Mosquitto and PostgreSQL themselves, never stand-ins; without them a test fails and says what
to install.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from tests import sdk_driver
from tests.postgres import Postgres

# A time limit in a test ends a hang; it does not judge how fast the machine is.
settings.register_profile("ordain", deadline=None)
settings.load_profile("ordain")

# A background job starts with SIGINT ignored, and its children inherit that. With Python's handler in this
# process, each child starts with the default again.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

READY_WITHIN_SEC = 200
LOOK_AGAIN_SEC = 0.01
NOTE = "note"  # a property of a test
# Debian puts the server where only root's PATH leads.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
# It would give up root's rights and then not be able to read a test's own directory.
AS_US = "user root\n"

MINIMAL = """
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
"""


def program(name: str) -> str:
    """The full path of a program of Mosquitto's."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.fail(
            f"{name} is not installed (Debian: apt install mosquitto mosquitto-clients)", pytrace=False
        )
    return found


def _own_ports() -> Iterator[int]:
    """The ports of this test process, again and again. The other processes of this run have others: a port is
    listened on only later, and again after a kill. Runs beside each other share their ports, and only begin
    elsewhere. The system gives those from 32,768 on to whoever asks for any."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, each = 10_000, 500
    mine = first + number % 40 * each
    start = os.getpid() % each  # elsewhere than a run beside this one
    return cycle([mine + (start + step) % each for step in range(each)])


_ports = _own_ports()


def unused_port() -> int:
    """A port that this process has not given out lately, and that nobody listens on."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Mosquitto:
    """One Mosquitto with its own directory: `kill()` is SIGKILL, `start()` again keeps the port."""

    host = "127.0.0.1"

    def __init__(self, config: str, port: int, home: Path) -> None:
        self.port = port
        self.home = home
        self._process: subprocess.Popen[bytes] | None = None
        (home / "test.conf").write_text(AS_US + config)

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"

    def start(self) -> None:
        """Returns when the port accepts a connection."""
        assert self._process is None, "already running"
        with (self.home / "test.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("mosquitto"), "-c", "test.conf"], cwd=self.home, stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_WITHIN_SEC
        while not self._accepts():
            try:
                self._process.wait(LOOK_AGAIN_SEC)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            self.kill()
            pytest.fail(f"Mosquitto did not start:\n{self.log()}", pytrace=False)

    def kill(self) -> None:
        """As a power cut would: nothing is saved. Does nothing if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self) -> str:
        return (self.home / "test.log").read_text()

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) == 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The tests stay until the end: to search them for garbage again and again takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests that passed noted with `record_property(NOTE, …)`: nobody sees their output."""
    passed: list[pytest.TestReport] = terminalreporter.getreports("passed")
    for report in passed:
        for name, value in report.user_properties:
            if name == NOTE:
                terminalreporter.write_line(f"NOTE {report.nodeid}: {value}", yellow=True)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command line, run in a test, says how to log: not for the tests after it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session", autouse=True)
def driver_ends() -> Iterator[None]:
    yield
    sdk_driver.end_driver()


@pytest.fixture
def free_port() -> int:
    return unused_port()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running Mosquitto that lets everybody in and keeps nothing on disk."""
    port = unused_port()
    home = tmp_path / "mosquitto"
    home.mkdir()
    server = Mosquitto(MINIMAL.format(port=port), port, home)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL, one for all tests of this process."""
    server = Postgres()
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def _database(postgres: Postgres) -> str:
    return postgres.create("test")


@pytest.fixture
def database(postgres: Postgres, _database: str) -> Iterator[str]:
    """The URL of an empty database."""
    yield _database
    postgres.clear("test")
