"""`ordain` with tracemalloc, to find what grows in the broker's memory.

Each SIGUSR2 appends to a file: object counts by type, and the lines whose memory grew most since the first
signal. Tracing slows the broker a lot, so ignore the run's figures of time and CPU.
"""

from __future__ import annotations

import gc
import signal
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import FrameType

from broker.cli.main import main as ordain

SHOWN = 25


def main(path: str) -> None:
    """Runs the command line of `ordain` with tracing; `path` is the file for the reports."""
    first: list[tracemalloc.Snapshot] = []

    def look(_signal: int, _frame: FrameType | None) -> None:
        gc.collect()
        now = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
        if not first:
            first.append(now)
        grown = now.compare_to(first[0], "lineno")[:SHOWN]
        types = Counter(type(each).__name__ for each in gc.get_objects()).most_common(SHOWN)
        blocks, (traced, _) = sys.getallocatedblocks(), tracemalloc.get_traced_memory()
        with Path(path).open("a") as file:
            file.write(f"--- {blocks} blocks, {traced / 2**20:.2f} MB traced\n{types}\n")
            file.writelines(f"{line}\n" for line in grown)

    signal.signal(signal.SIGUSR2, look)
    tracemalloc.start()
    ordain()
