"""Tickets: a web page opens an event stream with a ticket instead of a key.

The browser's `EventSource` cannot send headers, and a key must not be in a URL, because proxies log URLs. A
ticket may be in a URL: it opens one connection, within a minute. Tickets are kept in memory only.
"""

from __future__ import annotations

from typing import NamedTuple

from broker.engine.commands import Caller
from broker.engine.ids import new_secret
from broker.engine.keys import Keys
from broker.engine.writer import Writer

OF_TICKET = "tkt_"
LIFE_MS = 60_000
MOST = 10_000  # unused tickets; one more drops the oldest


class Ticket(NamedTuple):
    caller: Caller
    expires_at: int  # Unix time in ms


class Tickets:
    def __init__(self, writer: Writer, keys: Keys) -> None:
        self._writer, self._keys = writer, keys
        self._unused: dict[str, Ticket] = {}

    @property
    def unused(self) -> int:
        return len(self._unused)

    def issue(self, caller: Caller) -> tuple[str, int]:
        """A new ticket with the caller's rights, and when it expires (Unix time in ms)."""
        now = self._writer.now()
        while self._unused:
            oldest = next(iter(self._unused))
            if self._unused[oldest].expires_at > now and len(self._unused) < MOST:
                break
            del self._unused[oldest]
        secret = new_secret(OF_TICKET, self._writer.entropy)
        self._unused[secret] = Ticket(caller, now + LIFE_MS)
        return secret, now + LIFE_MS

    def use(self, secret: str) -> Caller | None:
        """Returns the caller of a ticket and uses the ticket up. None if the ticket is unknown, used or
        expired, or if its key was revoked or has expired."""
        ticket = self._unused.pop(secret, None)
        if ticket is None or ticket.expires_at <= self._writer.now() or not self.good(ticket.caller):
            return None
        return ticket.caller

    def good(self, caller: Caller) -> bool:
        """Whether the key that got the ticket is still valid."""
        return not self._keys.has_ended(caller.actor)
