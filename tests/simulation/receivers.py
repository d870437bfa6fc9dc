"""Services that receive webhooks, and the network to them: answers come late, wrong or never.

Each request that arrives goes into the history, with its outcome; nothing else is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from broker.seams import Answer
from tests.simulation.history import History
from tests.simulation.loop import SimLoop

URLS = ("https://one.example/hook", "https://two.example/hook")
REFUSALS = (500, 502, 429, 503, 404)


class Receivers:
    """`trouble`: for each URL the probability (0 to 1) that a request fails."""

    def __init__(self, loop: SimLoop, history: History) -> None:
        self.trouble = dict.fromkeys(URLS, 0.1)
        self._random = loop.rng("receivers")
        self._history = history

    def heal(self) -> None:
        self.trouble = dict.fromkeys(URLS, 0.0)

    # --- the seam ---

    async def fault(self, url: str) -> str | None:
        return None

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_sec: float) -> Answer:
        draw = self._random
        wrong = draw.random() < self.trouble[url]
        kind = draw.choice(("lost", "unanswered", "refused", "refused"))
        await asyncio.sleep(draw.uniform(0.001, 0.2))
        if wrong and kind == "lost":
            return Answer(error="the request was lost")
        taken = not (wrong and kind == "refused")
        event = msgspec.json.decode(body)
        self._history.hooked(url, headers["webhook-id"], int(event["id"]), event["type"], taken=taken)
        if wrong and kind == "unanswered":
            await asyncio.sleep(timeout_sec)
            return Answer(error="no answer")
        await asyncio.sleep(draw.uniform(0.001, 0.2))
        if taken:
            return Answer(status=200)
        status = draw.choice(REFUSALS)
        return Answer(status=status, retry_after=draw.choice((None, "1", "30")))
