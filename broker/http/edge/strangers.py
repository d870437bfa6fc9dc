"""HTTP connections on which no key was accepted yet: bounded per address and in all.

Beyond a bound the oldest one is closed for the new one, so that a flood of silent connections leaves room for
clients with keys. The private socket has no such bound.
"""

from __future__ import annotations

from typing import Protocol

PASSED = "ordain.passed"  # in a request's scope: what to call when its key was accepted


class Ends(Protocol):
    def end(self) -> None:
        """Closes the connection at once."""


class Strangers:
    def __init__(self, in_all: int, per_address: int) -> None:
        self.limit = in_all
        self._per_address = per_address
        # Oldest first, because dicts keep their order.
        self._all: dict[Ends, str] = {}
        self._by_address: dict[str, dict[Ends, None]] = {}
        self.closed = 0

    @property
    def open(self) -> int:
        return len(self._all)

    def add(self, connection: Ends, address: str) -> None:
        mine = self._by_address.get(address, {})
        if len(mine) >= self._per_address:
            self._close(next(iter(mine)))
        elif len(self._all) >= self.limit:
            self._close(next(iter(self._all)))
        self._all[connection] = address
        self._by_address.setdefault(address, {})[connection] = None

    def remove(self, connection: Ends) -> None:
        """Call this when a key was accepted on the connection, or when it is closed; twice does no harm."""
        address = self._all.pop(connection, None)
        if address is not None:
            mine = self._by_address[address]
            del mine[connection]
            if not mine:
                del self._by_address[address]

    def _close(self, connection: Ends) -> None:
        self.remove(connection)
        self.closed += 1
        connection.end()
