"""Bugs of several nodes, planted on purpose. The checkers must find each one in its seeds.

They replace parts of the real nodes, log client or core, but for two: the database checks the term, and the
simulated link fences the wire as the real one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from broker.domain.cloudevents import Entry, Wanted
from broker.domain.events import Pending
from broker.log.chain import Row
from broker.log.postgresql.log import PostgresLog
from broker.nodes.asked import Asked
from broker.nodes.cluster import Cluster
from broker.nodes.entrance import Entrance
from broker.nodes.membership import Membership
from broker.seams import Batch, Node, Placed
from broker.subscriptions.feed import Feed
from tests.simulation.nodes import world
from tests.simulation.nodes.database import SimDatabase
from tests.simulation.nodes.process import NodeLink
from tests.simulation.nodes.world import Ran, simulate_nodes
from tests.simulation.planting import Planted


class NodesBug(Planted, frozen=True, kw_only=True):
    """One of the `seeds` must find it, with these `faults` only. A quick one that does comes first."""

    seeds: tuple[int, ...]
    faults: tuple[str, ...] = ()

    def run(self, seed: int) -> Ran:
        with self.planted():
            return simulate_nodes(seed, self.faults)


_cluster = Cluster.__init__


def _by_wall_clock(
    self: Cluster, log: PostgresLog, node: Node, now: Callable[[], int], wall: Callable[[], int]
) -> None:
    _cluster(self, log, node, wall, wall)


_as_data = world.as_data


def _without_incarnation(batch: Batch, incarnation: str, of_tables: str) -> list[Any]:
    """Numbers the batches of all runs as if there were only one."""
    return _as_data(batch, "node", of_tables)


def _not_noticed(self: PostgresLog, connection: Any, message: Any) -> None:
    """Takes the warning for success."""


def _never_read_again(self: Feed) -> None:
    """Subscribers get only what this writer told itself."""
    self._told = self.head


_committed = Feed._committed


def _own_only(self: Feed, events: list[Pending], placed: Placed) -> None:
    self._told = placed.first - 1
    _committed(self, events, placed)


def _holds_for_ever(self: Membership, term: int, now: int) -> bool:
    return (self.view.owner, self.view.term) == (self.incarnation, term)


def _may_claim_at_once(self: Membership, now: int) -> bool:
    return self.owner is None or self.owner.incarnation != self.incarnation


_page = Feed.page
_BEGAN: WeakKeyDictionary[Feed, int] = WeakKeyDictionary()


def _began(self: Feed, events: list[Pending], placed: Placed) -> None:
    _BEGAN.setdefault(self, placed.first - 1)
    _committed(self, events, placed)


async def _only_of_this_run(self: Feed, wanted: Wanted, after: int, limit: int) -> tuple[list[Entry], int]:
    """Lists only what this run has recorded."""
    return await _page(self, wanted, max(after, _BEGAN.get(self, 0)), limit)


class _Told(asyncio.Event):
    """Counts how often it was set. `known`: the owner that a node knew at that count."""

    times = -1

    def __init__(self) -> None:
        super().__init__()
        self.known: tuple[int, Node | None] = (-1, None)

    def set(self) -> None:
        self.times += 1
        super().set()


_find_owner = Entrance.owner


async def _owner_as_told(self: Entrance, until: float) -> Node | None:
    """Looks who the owner is only if a notification came."""
    log, found = self.cluster._log, await _find_owner(self, until)
    if not isinstance(log.notified, _Told):
        log.notified = _Told()
    if found is None or log.notified.known[0] != log.notified.times or log.notified.known[1] is None:
        log.notified.known = (log.notified.times, found)
    return None if found is None else log.notified.known[1]


BUGS = (
    NodesBug(
        name="the term is not checked",
        caught_by=frozenset({"N1"}),
        patches=((SimDatabase, "_check_term", lambda self, term: None),),
        seeds=tuple(range(20)),
        faults=("_stop_amid_requests",),
    ),
    NodesBug(
        name="the lease is measured by the wall clock",
        caught_by=frozenset({"N2"}),
        patches=((Cluster, "__init__", _by_wall_clock),),
        seeds=tuple(range(20)),
        faults=("_part_and_step_clock",),
    ),
    NodesBug(
        name="batches are numbered without the incarnation",
        caught_by=frozenset({"N3", "L4", "O3"}),
        patches=((world, "as_data", _without_incarnation),),
        seeds=tuple(range(20)),
    ),
    NodesBug(
        name="a warning is taken for success",
        caught_by=frozenset({"R1", "A1", "D1", "S1"}),
        patches=((PostgresLog, "_noticed", _not_noticed),),
        seeds=(3, *range(20)),
        faults=("_fail_over",),
    ),
    NodesBug(
        name="the feed has only the writer's own events",
        caught_by=frozenset({"S5"}),
        patches=((Feed, "reread", _never_read_again), (Feed, "_committed", _own_only)),
        seeds=tuple(range(20)),
        faults=("_lose_replies",),
    ),
    NodesBug(
        name="a door repeats every request",
        caught_by=frozenset({"R2", "R5"}),
        patches=((Asked, "repeatable", True),),
        seeds=(2, *range(20)),
        faults=("_kill_amid_requests",),
    ),
    NodesBug(
        name="the wire is not fenced",
        caught_by=frozenset({"N2"}),
        patches=(
            (NodeLink, "_may_send", lambda self: True),
            (NodeLink, "cut", lambda self: None),
            (NodeLink, "_name", lambda self: f"ordain-{self._machine}"),
        ),
        seeds=tuple(range(20)),
        faults=("_stop_amid_requests",),
    ),
    NodesBug(
        name="the time of the log is taken for the owner's clock",
        caught_by=frozenset({"L4", "N3", "L6"}),
        patches=((Row, "decided", property(lambda self: self.recorded_at)),),
        seeds=(4, *range(20)),
    ),
    NodesBug(
        name="an owner holds the log until it learns of the next one",
        caught_by=frozenset({"N2"}),
        patches=((Membership, "holds", _holds_for_ever),),
        seeds=(1, *range(20)),
        faults=("_part_from_database",),
    ),
    NodesBug(
        name="a node claims the log without waiting for the end of the lease",
        caught_by=frozenset({"N2"}),
        patches=((Membership, "may_claim", _may_claim_at_once),),
        seeds=(2, *range(20)),
    ),
    NodesBug(
        name="a node lists only the events that it recorded itself",
        caught_by=frozenset({"N4"}),
        patches=((Feed, "_committed", _began), (Feed, "page", _only_of_this_run)),
        seeds=tuple(range(20)),
        faults=("_kill_owner",),
    ),
    NodesBug(
        name="a door learns of a new owner only by notifications",
        caught_by=frozenset({"N5"}),
        patches=((Entrance, "owner", _owner_as_told),),
        seeds=(1, *range(20)),
        faults=("_lose_notifications", "_kill_owner"),
    ),
)
