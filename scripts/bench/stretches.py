"""Prints for each HTTP route how long its largest input blocks the event loop at most, in CPU time.

`.venv/bin/python -m scripts.bench.stretches`. The rule is 10 ms. The client runs in the same loop and counts
too, and so does what other programs on the same core do to its caches.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from tests.integration.http.test_largest import longest_by_route


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = await longest_by_route(Path(directory))
    for (method, route), sec in sorted(found.items(), key=lambda each: -each[1]):
        print(f"{sec * 1_000:6.1f} ms  {method.upper()} {route}")


if __name__ == "__main__":
    asyncio.run(main())
