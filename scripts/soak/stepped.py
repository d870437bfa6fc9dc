"""The broker with a wall clock that a soak can step. The monotonic clock is not changed, as in a real step.

The step is a number of ns in a file of 8 bytes, which both processes map.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

from broker.cli.main import main as ordain


class Step:
    """The file. The broker adds what it says to the time of the machine."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8)

    def set(self, seconds: float) -> None:
        self._shared[:] = round(seconds * 1e9).to_bytes(8, "little", signed=True)

    def get_ns(self) -> int:
        return int.from_bytes(self._shared[:], "little", signed=True)


def main(path: str) -> None:
    step, now_ns = Step(Path(path)), time.time_ns
    time.time_ns = lambda: now_ns() + step.get_ns()
    time.time = lambda: time.time_ns() / 1e9
    ordain()
