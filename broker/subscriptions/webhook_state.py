"""One webhook in memory: its endpoint, its worker while one runs, and what was sent lately."""

from __future__ import annotations

import asyncio
from collections import deque

from broker.subscriptions.webhook_queue import Pending, Progress
from broker.subscriptions.webhook_worker import Attempt, Endpoint, Worker

ATTEMPTS = 1_000


class Webhook:
    """One endpoint and its delivery state. `attempts`: the latest since the process started, numbered."""

    def __init__(self, endpoint: Endpoint, progress: Progress) -> None:
        self.endpoint = endpoint
        self.attempts: deque[tuple[int, Attempt]] = deque(maxlen=ATTEMPTS)
        self.worker: Worker | None = None
        self.task: asyncio.Task[None] | None = None
        self.changing = asyncio.Lock()
        self.resending = False
        self.at_rest = progress  # progress while no worker runs
        self.saved: Progress | None = None

    @property
    def progress(self) -> Progress:
        return self.at_rest if self.worker is None else self.worker.window.progress()

    @property
    def at_ease(self) -> bool:
        """Nothing changes before the next commit."""
        return self.worker is None or not self.worker.window.open

    @property
    def cursor(self) -> int:
        """All wanted events before this position are delivered."""
        return self.at_rest.cursor if self.worker is None else self.worker.window.cursor

    @property
    def failing(self) -> Pending | None:
        """The event that has failed for the longest time."""
        if self.worker is not None:
            return self.worker.window.failing()
        failed = [pending for pending in self.at_rest.open if pending.failed_since is not None]
        return min(failed, key=lambda pending: pending.failed_since or 0, default=None)

    def is_open(self, position: int) -> bool:
        if self.worker is not None:
            return self.worker.window.is_open(position)
        open = {pending.position for pending in self.at_rest.open}
        return position > self.at_rest.reached or position in open

    def note(self, attempt: Attempt) -> None:
        number = self.attempts[-1][0] + 1 if self.attempts else 1
        self.attempts.append((number, attempt))
