"""The soak at a small size; `make soak` runs the full ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.system.support import ROOT, environment

ENDS_WITHIN_SEC = 600


def soaked(home: Path, *arguments: str) -> dict[str, Any]:
    """The figures of a soak run without faults."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.soak", "--json", "--dir", str(home), *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=ENDS_WITHIN_SEC,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["faults"] == []
    assert done.returncode == 0
    figures: dict[str, Any] = report["figures"]
    return figures


def test_a_queue_for_returning_devices_is_executed_once_and_in_order_through_two_kill_9(
    tmp_path: Path,
) -> None:
    size = ("--devices", "20", "--count", "400", "--ack-timeout", "1")

    figures = soaked(tmp_path, "backlog", *size)

    assert figures["log: executed"] == 400
    assert figures["log: started"] == 3


def test_answers_that_wait_at_the_server_for_a_dead_broker_count_after_their_timeout(
    tmp_path: Path,
) -> None:
    size = ("--devices", "20", "--rate", "20", "--seconds", "4", "--time-out", "1")

    figures = soaked(tmp_path, "away", *size, "--how", "broker-killed")

    assert figures["log: executed"] == figures["log: created"]
