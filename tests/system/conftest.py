"""Brokers for the system tests: real processes, killed at the end, and their log lines looked through."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.support import SECRET, Broker

NewBroker = Callable[..., Broker]


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
