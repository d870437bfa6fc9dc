"""How a node becomes the owner of a log: not before the last owner has shown no sign of life for a lease.

A sign of life is a beat: its number rises. No clock of another machine and none of the database decides.
A log that is taken although its owner lives is safe, because every append carries its term; but the two would
take it from each other again and again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from broker.log.postgresql.log import PostgresLog
from broker.log_url import Address
from broker.seams import Broken, Fenced, InUse, Node, Unknown, View

logger = structlog.get_logger()

LEASE_SEC = 5.0
BEAT_SEC = 1.0


class OwnedLog(PostgresLog):
    """A log that its node owns from `prepare` on, and as long as nobody claims a later term."""

    def __init__(
        self,
        where: Address,
        node: Node,
        now: Callable[[], int],
        predecessor: str | None = None,
        closed: Callable[[], None] = lambda: None,
        lease_sec: float = LEASE_SEC,
        beat_sec: float = BEAT_SEC,
    ) -> None:
        """`now`: the clock of this node, ms. `predecessor`: an incarnation that has ended, because it ran
        where this one runs now. `closed` is called when everything is closed."""
        super().__init__(where, node.incarnation)
        self._node, self._now, self._predecessor = node, now, predecessor
        self._closed, self._lease_sec, self._beat_sec = closed, lease_sec, beat_sec

    async def prepare(self, log_id: str, cursor_key: str) -> None:
        """As `PostgresLog.prepare`; then claims the log, at once if its last owner is known to have ended.

        While its owner lives nothing is changed: the tables of another release would end the owner.

        Raises:
            InUse: the owner lives.
            Conflict: another node claimed it at the same moment.
        """
        ended = self._predecessor
        if not self.term and (found := await self.view()) and (before := _owner(found)) is not None:
            if before.incarnation != ended:
                await self._silent(before)
            ended = before.incarnation
        await super().prepare(log_id, cursor_key)
        if self.term:
            return
        first = _owner(await self.beat(self._node))
        if first is not None and first.incarnation != ended:
            await self._silent(first)
        await self.own(self._node.name, self._node.address, self._now())
        if first is not None:
            await self.leave(first)

    async def _silent(self, first: Node) -> None:
        """Waits until the owner has shown no sign of life for a lease, or has left in order."""
        for _ in range(round(self._lease_sec / self._beat_sec) + 1):
            await asyncio.sleep(self._beat_sec)
            view = await self.view()
            owner = None if view is None else _owner(view)
            if owner is None:
                return
            if (owner.incarnation, owner.beat) != (first.incarnation, first.beat):
                where = f" at {owner.address}" if owner.address else ""
                raise InUse(f"{self.where.shown} is served by another broker: node {owner.name}{where}")

    async def keep(self) -> None:
        """Shows that this node lives, for ever.

        Raises:
            Fenced: another node has claimed the log.
        """
        while True:
            try:
                view = await self.beat(self._node)
            except Unknown as error:
                logger.warning("log.no_beat", error=str(error))
            else:
                if view.term != self.term:
                    raise Fenced(view.term)
            await asyncio.sleep(self._beat_sec)

    async def close(self) -> None:
        try:
            if self.term:
                with suppress(Unknown, Broken):  # then the next owner waits for a lease
                    await self.leave(self._node)
            await super().close()
        finally:
            self._closed()


def _owner(view: View) -> Node | None:
    """The owner, if it is still on the list of nodes."""
    return next((node for node in view.nodes if node.incarnation == view.owner), None)
