"""Requests that wait until a command is closed. A wait only reads; it never changes a command.

It ends early, with the command still open, when the broker stops, when its key is revoked, or when the
project already has too many waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from broker.domain.cloudevents import Wanted
from broker.domain.lifecycle import CommandState
from broker.engine.commands import Caller
from broker.subscriptions.feed import Feed, Subscription


class Waits:
    """`most`: limit of waits per project at a time."""

    def __init__(self, feed: Feed, most: int) -> None:
        self._feed = feed
        self._most = most
        self._open: dict[Subscription, Caller] = {}
        self._closing = False

    @property
    def open(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Ends every wait and begins no new one, because the broker stops."""
        self._closing = True
        for subscription in self._open:
            subscription.end()

    def revoked(self, actor: str) -> None:
        for subscription, caller in self._open.items():
            if caller.actor == actor:
                subscription.end()

    async def closed(
        self,
        caller: Caller,
        state: CommandState,
        sec: float,
        look: Callable[[], Awaitable[CommandState]],
    ) -> CommandState:
        """Returns the command when it is closed, or as it is after `sec` seconds.

        `state`: the durable command. `look`: reads it again.
        """
        others = sum(other.project == caller.project for other in self._open.values())
        if state.closed or self._closing or others >= self._most:
            return state
        time = asyncio.get_running_loop().time
        until = time() + sec
        wanted = Wanted(project=state.project, device=state.device_id, command_id=state.id)
        with self._feed.subscribed(wanted, self._feed.head) as subscription:
            self._open[subscription] = caller
            try:
                state = await look()  # it may have closed before the subscription began
                # A late answer may already have corrected the event that closed it, so look each time.
                while not state.closed and (left := until - time()) > 0:
                    if await subscription.next(left) is None:
                        break
                    state = await look()
            finally:
                del self._open[subscription]
        return state if state.closed else await look()
