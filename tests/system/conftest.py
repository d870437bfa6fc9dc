"""Brokers for the system tests: real processes, killed at the end, and their log lines looked through."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.system.support import SECRET, Broker

NewBroker = Callable[..., Broker]
# No sandbox: tests may run as root. Quiet: it is not to look for updates meanwhile.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WITHIN_MS = 30_000


@pytest.fixture
def new_broker(tmp_path: Path) -> Iterator[NewBroker]:
    """Makes a broker that is not started yet. No key, token or grant may be in a log line of any test."""
    brokers: list[Broker] = []

    def make(*options: str, data: Path | None = None) -> Broker:
        brokers.append(Broker(data or tmp_path / "data", *options, cwd=tmp_path))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.kill()
        _end_child(broker)
        assert not SECRET.search(broker.said())


def _end_child(broker: Broker) -> None:
    """A Mosquitto that did not die with its killed broker: no test leaves a process behind."""
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
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page()
        page.set_default_timeout(WITHIN_MS)
        yield page
        browser.close()
