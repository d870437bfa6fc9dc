"""The processes of a benchmark: real servers on free ports, and their CPU time.

Each process ends with its `with` block. This module does not measure wall-clock time.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

ROOT = Path(__file__).parents[2]
# Debian installs Mosquitto in /usr/sbin, which is usually only in root's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
READY_WITHIN_SEC = 20
END_WITHIN_SEC = 20
LOOK_AGAIN_SEC = 0.02
# The limits of mosquitto.conf. Without access rules and persistence, which add the same cost to all figures.
MOSQUITTO = """
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
log_dest stderr
log_type error
log_type warning
log_type notice
"""
# High limits, so that the benchmark measures work and not refusals.
CONFIG = """
[limits]
queue_per_name = 1000000
queue_per_device = 1000000
[mqtt_limits]
packets_per_sec = 100000
"""
ORDAIN = "from broker.cli.main import main; main()"
# cProfile sees only the thread of the event loop, which runs the broker's own code.
PROFILED = "import cProfile; from broker.cli.main import main; cProfile.run('main()', {path!r})"


def unused_port() -> int:
    """A port that nobody listens on. It is listened on later, and again after a kill, so it is none of those
    that the system gives to whoever asks for any: from 32,768 on."""
    while True:
        port = random.randrange(30_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def mosquitto() -> str:
    """The full path of the Mosquitto program."""
    found = shutil.which("mosquitto", path=PATH)
    if found is None:
        raise SystemExit("mosquitto is not installed (Debian: apt install mosquitto)")
    return found


def cpu_sec(pid: int) -> float:
    """The CPU time a process has used, in user and system mode, to the clock tick (10 ms)."""
    # The program name is in parentheses and may contain spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def process(arguments: Sequence[str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a program with its standard error in `log`. At the end of the block it gets SIGTERM, and SIGKILL
    after END_WITHIN_SEC."""
    with log.open("wb") as errors:
        running = await asyncio.create_subprocess_exec(
            *arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors
        )
    try:
        yield running
    except BaseException:
        _show_end(log)
        raise
    finally:
        if running.returncode is None:
            running.terminate()
            try:
                async with asyncio.timeout(END_WITHIN_SEC):
                    await running.communicate()
            except TimeoutError:
                running.kill()
                await running.communicate()


@asynccontextmanager
async def mosquitto_server(home: Path) -> AsyncIterator[tuple[int, int]]:
    """Runs a Mosquitto. Yields (port, process id) when it accepts connections."""
    port = unused_port()
    config = home / "mosquitto.conf"
    config.write_text(MOSQUITTO.format(port=port))
    async with process([mosquitto(), "-c", str(config)], home / "mosquitto.log") as server:
        async with asyncio.timeout(READY_WITHIN_SEC):
            while not accepts(port):  # noqa: ASYNC110 - the port of another process
                await asyncio.sleep(LOOK_AGAIN_SEC)
        yield port, server.pid


@asynccontextmanager
async def devices(
    home: Path,
    port: int,
    count: int,
    connections: int,
    answers: Sequence[str],
    tokens: Mapping[str, str] | None = None,
    within: float = READY_WITHIN_SEC,
) -> AsyncIterator[int]:
    """Runs the devices. Yields their process id when all are online. `tokens` by hardware id: each device
    connects as itself."""
    program = [sys.executable, "-m", "scripts.bench.devices", "--port", str(port), "--devices", str(count)]
    program += ["--connections", str(connections), "--answers", *answers]
    if tokens is not None:
        (home / "tokens.json").write_text(json.dumps(tokens))
        program += ["--tokens", str(home / "tokens.json")]
    async with process(program, home / "devices.log") as running:
        assert running.stdout is not None
        async with asyncio.timeout(within):
            if await running.stdout.readline() != b"ready\n":
                raise ConnectionError("the devices did not come online")
        yield running.pid


@asynccontextmanager
async def broker(
    home: Path,
    mqtt_port: int,
    profile: Path | None,
    *,
    own: bool = False,
    within: float = READY_WITHIN_SEC,
) -> AsyncIterator[tuple[int, int]]:
    """Runs `ordain serve` on the data directory `home`. Yields (HTTP port, process id) when it is ready.

    `own`: it is the MQTT server at `mqtt_port` itself.
    """
    port = unused_port()
    config = home / "bench.toml"
    config.write_text(CONFIG)
    code = ORDAIN if profile is None else PROFILED.format(path=str(profile))
    program = [sys.executable, "-c", code, "serve", "--data", str(home), "--config", str(config)]
    where = ["--mqtt-listen", ""] if own else ["--mqtt-url", "mqtt://"]
    program += ["--http", f"127.0.0.1:{port}", where[0], f"{where[1]}127.0.0.1:{mqtt_port}"]
    async with process(program, home / "broker.log") as running:
        async with asyncio.timeout(within):
            while not (accepts(port) and ready(port)):
                if running.returncode is not None:
                    raise ConnectionError("the broker did not start")
                await asyncio.sleep(LOOK_AGAIN_SEC)
        yield port, running.pid


def ordain(*arguments: str) -> str:
    """Runs one `ordain` command and returns its output."""
    program = [sys.executable, "-c", ORDAIN, *arguments]
    return subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _show_end(log: Path) -> None:
    print(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2_000:]}", file=sys.stderr)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx2.TimeoutException:
        return False  # it reads many open commands
