"""How long the command line and the broker take to start, beside a bare Python of the same interpreter.

CPU times include the child's whole life: starting Python, importing, working, ending.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from scripts.bench import processes

COMMANDS = {"--help": ("--help",), "keys list": ("keys", "list")}

Figures = dict[str, list[float]]


async def starts(home: Path, rounds: int) -> Figures:
    """Figures: CPU seconds of `python -c pass` and of `ordain` commands that ask a running broker; seconds
    until `ordain serve` is ready, on an existing log; its ratio to the bare Python's time."""
    figures: Figures = {}
    async with processes.mosquitto_server(home) as (mqtt_port, _):
        for number in range(rounds + 1):
            found: dict[str, float] = {}
            since = time.perf_counter()
            found["python -c pass, CPU s"] = _cpu_sec(home, "-c", "pass")
            bare = time.perf_counter() - since
            since = time.perf_counter()
            async with processes.broker(home, mqtt_port, None):
                ready = time.perf_counter() - since
                found["ordain serve until ready, s"] = ready
                found["ordain serve until ready / bare Python"] = ready / bare
                for name, arguments in COMMANDS.items():
                    used = await asyncio.to_thread(_cpu_sec, home, "-c", processes.ORDAIN, *arguments)
                    found[f"ordain {name}, CPU s"] = used
            if number:  # round 0 is the warm-up, and makes the log
                for name, value in found.items():
                    figures.setdefault(name, []).append(value)
    return figures


def _cpu_sec(home: Path, *arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"ORDAIN_DATA": str(home)}
    subprocess.run(
        [sys.executable, *arguments],
        cwd=processes.ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
