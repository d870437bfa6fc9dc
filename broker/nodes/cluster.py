"""This node among the others: it beats, waits for its turn to own the log, and says who the owner is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import msgspec
import structlog

from broker.http.edge.services import NodeFacts, NodesFacts
from broker.log.postgresql.log import PostgresLog
from broker.nodes.membership import Membership
from broker.seams import Conflict, Fenced, Node, Unknown, View

logger = structlog.get_logger()

BEAT_SEC = 1.0
LOOK_SEC = 0.25  # how often the end of a lease is looked for
SILENT_MS = 2_500


class Cluster:
    """`now`: ms of a clock that never steps and runs on while the machine sleeps; `wall`: Unix time, ms."""

    def __init__(self, log: PostgresLog, node: Node, now: Callable[[], int], wall: Callable[[], int]) -> None:
        self.node = node
        self.members = Membership(node.incarnation)
        self.lapsed: Callable[[], None] = lambda: None
        self.looked: Callable[[], None] = lambda: None
        self._log, self._now, self._wall = log, now, wall
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._notify = False
        self._due = asyncio.Event()
        self._beating = asyncio.Lock()

    # --- what is known ---

    @property
    def term(self) -> int:
        """The current term, as far as this node knows."""
        return self.members.view.term

    @property
    def owns(self) -> bool:
        """Whether this node has claimed the log and nobody after it, as far as it knows."""
        return self._log.term > 0 and self.members.view.owner == self.node.incarnation

    def holds(self) -> bool:
        """Whether this node may act as the owner now. Asked before every byte that follows from owning."""
        return not self.node.draining and self.members.holds(self._log.term, self._now())

    def lives(self, node: Node) -> bool:
        return self.members.lives(node.incarnation, self._now())

    def silent_ms(self, node: Node) -> int:
        return self.members.silent_ms(node.incarnation, self._now())

    @property
    def beat_age_ms(self) -> int | None:
        """Since when this node's own beats are not confirmed; None: none ever was."""
        confirmed = self.members.confirmed
        return None if confirmed is None else self._now() - confirmed

    def facts(self) -> NodesFacts:
        found = []
        for node in sorted(self.members.view.nodes, key=lambda node: (node.name, node.incarnation)):
            role: Literal["owner", "door", "leaving", "silent"] = "door"
            if not self.lives(node):
                role = "silent"
            elif node.draining:
                role = "leaving"
            elif node.incarnation == self.members.view.owner:
                role = "owner"
            found.append(NodeFacts(node.name, node.address, role, self.silent_ms(node)))
        return NodesFacts(self.term, found)

    async def change(self, within_sec: float) -> None:
        """Waits until something about the nodes has changed, or that long."""
        await asyncio.wait({self._changed}, timeout=within_sec)

    # --- beating ---

    async def run(self) -> None:
        """Beats, for ever.

        Raises:
            Fenced: this node owned the log, and another one has claimed it.
        """
        while True:
            for event in (self._due, self._log.notified):
                event.clear()
            await self.beat()
            waits = [asyncio.ensure_future(event.wait()) for event in (self._due, self._log.notified)]
            try:
                await asyncio.wait(waits, timeout=self._pause(), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()

    def _pause(self) -> float:
        """Shorter while the owner is silent: the end of its lease shall not be seen late."""
        owner = self.members.owner
        return BEAT_SEC if owner is None or self.silent_ms(owner) < SILENT_MS else LOOK_SEC

    async def beat(self) -> None:
        async with self._beating:  # the log has one connection for it
            await self._beat()

    async def _beat(self) -> None:
        began, notify, self._notify = self._now(), self._notify, False
        try:
            view = await self._log.beat(self.node, notify=notify)
        except Unknown as error:
            self._notify = self._notify or notify
            logger.warning("node.no_beat", error=str(error))
            return
        before = self.members.view
        self.members.took(view, began, self._now())
        if self._log.term and view.term > self._log.term and not self.node.draining:
            raise Fenced(view.term)
        if (before.term, before.owner) != (view.term, view.owner):
            logger.info("node.owner", term=view.term, owner=_name(view))
        self.wake()

    def wake(self) -> None:
        """Wakes those that wait for a change."""
        self.looked()
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def hurry(self) -> None:
        """Beats at once, and makes the other nodes look."""
        self._notify = True
        self._due.set()

    async def watch(self) -> None:
        """Calls `lapsed` when this node owns the log and must not act as its owner any more, for ever."""
        held = False
        while True:
            holds = self.holds()
            if held and not holds and not self.node.draining:
                logger.error("node.lapsed", term=self._log.term, beat_age_ms=self.beat_age_ms)
                self.lapsed()
            held = holds
            await asyncio.sleep(LOOK_SEC)

    # --- owning ---

    async def claimed(self) -> None:
        """Waits for this node's turn, claims the log, and returns when it may act as the owner."""
        while not self.holds():
            if not self._log.term and self.members.may_claim(self._now()):
                await self._claim()
            await self.change(BEAT_SEC)

    async def _claim(self) -> None:
        before = self.members.owner
        try:
            term = await self._log.own(self.node.name, self.node.address, self._wall())
        except (Conflict, Unknown) as error:
            logger.info("node.not_claimed", why=str(error))
            return
        logger.info("node.claimed", term=term)
        if before is not None and before.incarnation != self.node.incarnation:
            with suppress(Unknown):
                await self._log.leave(before)
        self.hurry()

    async def release(self) -> None:
        """Lets another node claim the log at once. This one has recorded its last event."""
        self.node = msgspec.structs.replace(self.node, draining=True)
        self._notify = True
        await self.beat()


def _name(view: View) -> str | None:
    return next((node.name for node in view.nodes if node.incarnation == view.owner), view.owner)
