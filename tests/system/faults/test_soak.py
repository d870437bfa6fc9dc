"""The soak at a small size; `make soak` runs the full ones."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.soak.proxy import Proxy
from tests.conftest import unused_port
from tests.streams import stream_server
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


def test_under_more_load_than_it_holds_requests_are_refused_and_what_was_accepted_is_executed(
    tmp_path: Path,
) -> None:
    # As fast as 32 connections can, so that more wait than fit however slow the warm-up was.
    size = ("--devices", "2", "--warm-up", "40", "--seconds", "0.02", "--times", "100", "--queue", "2")

    figures = soaked(tmp_path, "overload", *size)

    assert figures["log: executed"] == figures["log: created"]


def test_under_real_faults_every_command_is_executed_once_and_backups_are_prefixes(tmp_path: Path) -> None:
    size = ("--devices", "4", "--rate", "10", "--minutes", "0.1", "--seed", "1")

    figures = soaked(tmp_path, "faults", *size)

    assert figures["log: executed"] == figures["log: created"] == 60


async def test_a_half_open_connection_passes_nothing_and_is_cut_in_the_end() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def asked(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        return reader, writer

    async with stream_server(echo) as port:
        proxy = Proxy(unused_port(), port)
        await proxy.start()
        reader, writer = await asked(proxy.port)
        halving = asyncio.create_task(proxy.halve(0.2))
        await asyncio.sleep(0)
        writer.write(b"2")
        _, later = await asked(proxy.port)  # a new connection works

        assert await reader.read() == b""
        await halving
        for each in (writer, later):
            each.close()
        proxy.close()
