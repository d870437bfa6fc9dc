"""Brokers for the system tests: real processes, killed at the end of each test; their log lines are searched
for secrets."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.system import zygote
from tests.system.support import SECRET, Broker, Process

NewBroker = Callable[..., Broker]
# No sandbox, because tests may run as root. The other options stop updates and background traffic.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WITHIN_MS = 120_000


@pytest.fixture(autouse=True)
def processes_end() -> Iterator[None]:
    """Ends every process that the test itself started and left running."""
    before = len(Process.started)
    yield
    for process in Process.started[before:]:
        process.kill()
    del Process.started[before:]


@pytest.fixture(scope="session", autouse=True)
def helper_ends() -> Iterator[None]:
    yield
    zygote.end()


@pytest.fixture
def new_broker(tmp_path: Path) -> Iterator[NewBroker]:
    """Creates a broker that is not started yet. Every test fails if a key, token or grant is in a log
    line."""
    brokers: list[Broker] = []

    def make(*options: str, data: Path | None = None) -> Broker:
        brokers.append(Broker(data or tmp_path / "data", *options, cwd=tmp_path))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.kill()
        _end_child(broker)
        for run in broker.runs:
            assert not SECRET.search(run.err.all())


def _end_child(broker: Broker) -> None:
    """Kills a Mosquitto that survived its killed broker, so that no test leaves a process behind."""
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int((broker.data / "mosquitto" / "pid").read_text())
        if b"mosquitto" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def broker(new_broker: NewBroker) -> Broker:
    """A running broker with its own MQTT server."""
    return new_broker().start()


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty page in Debian's Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed (Debian: apt install chromium)", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=WITHIN_MS)
        page = browser.new_page()
        page.set_default_timeout(WITHIN_MS)
        yield page
        browser.close()
