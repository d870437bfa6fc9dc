"""Prints how long the largest input of each HTTP route, and the largest packets of MQTT clients, block the
event loop at most, in CPU time.

`.venv/bin/python -m scripts.bench.stretches`. The rule is 10 ms. The HTTP client runs in the same loop and
counts too, and so does what other programs on the same core do to its caches.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from tests.integration.http.test_largest import longest_by_route
from tests.integration.mqtt.test_largest_packets import longest_by_packet


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = await longest_by_route(Path(directory))
    for (method, route), sec in sorted(found.items(), key=lambda each: -each[1]):
        print(f"{sec * 1_000:6.1f} ms  {method.upper()} {route}")
    with tempfile.TemporaryDirectory() as directory:
        by_packet = await longest_by_packet(Path(directory))
    for what, sec in sorted(by_packet.items(), key=lambda each: -each[1]):
        print(f"{sec * 1_000:6.1f} ms  {what}")


if __name__ == "__main__":
    asyncio.run(main())
