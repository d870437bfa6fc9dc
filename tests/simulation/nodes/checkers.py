"""N1 to N5: who owned the log when, what each run did and knew, and what each node showed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

from tests.simulation.facts import Facts, data

MOST_CLAIMS = 10
FAILOVER_SEC = 10.0  # a lease, and 5 s
ASKS_WITHIN_MS = 12_000  # a try to connect, a beat that gets no answer, and the pause after it
KNOWS_WITHIN_MS = 1_000


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """Something that only the owner may do: `answered`, `published`, `acknowledged`, or `claimed` the log."""

    seq: int
    t: int
    incarnation: str
    what: str


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One beat of a node, from `began` to `t`. `confirmed`: the database answered."""

    t: int
    incarnation: str
    began: int
    confirmed: bool


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """A node passed a request on to the one that it took for the owner."""

    t: int
    incarnation: str
    owner: str


class Acts:
    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.all: list[Act] = []
        self.claims: list[tuple[int, Act]] = []  # by position, without those that a failover lost
        self.by: list[tuple[int, str]] = []  # the last position of each append, and who appended
        self.arrived: list[tuple[str, str]] = []  # topic and command of what reached the MQTT server
        self.failed_over: float | None = None  # how long nobody answered when the owner was killed, s
        self.looks: list[Look] = []
        self.passed: list[Passed] = []
        self.woken: list[tuple[int, str]] = []  # when a run that was stopped went on, or was killed
        self.began: dict[str, int] = {}  # when each run was started
        self.ended: dict[str, int] = {}  # when it was killed, or told to end
        self.listed: dict[str, list[tuple[int, str]]] = {}  # all events, as each node lists them at the end
        self._now_ms, self._seq = now_ms, itertools.count(1)

    def acted(self, incarnation: str, what: str) -> None:
        self.all.append(Act(seq=next(self._seq), t=self._now_ms(), incarnation=incarnation, what=what))

    def claimed(self, incarnation: str, position: int) -> None:
        self.acted(incarnation, "claimed")
        self.claims.append((position, self.all[-1]))

    def appended(self, incarnation: str, position: int) -> None:
        # What a failover of the database lost was appended by somebody else, or never.
        while self.by and self.by[-1][0] >= position:
            self.by.pop()
        while self.claims and self.claims[-1][0] >= position:
            self.claims.pop()
        self.by.append((position, incarnation))


def check_nodes(acts: Acts, facts: Facts) -> Iterator[str]:
    for name, checker in (("N1", n1), ("N2", n2), ("N2", bare_in_order), ("N3", n3), ("N4", n4), ("N5", n5)):
        yield from (f"{name}: {sentence}" for sentence in checker(acts, facts))


def n1(acts: Acts, facts: Facts) -> Iterator[str]:
    """Each event was appended by the run that had claimed the log before it; terms rise one by one. A run
    that does not learn whether its claim was recorded claims again, but not for ever."""
    owner, last = "", 0
    claims = Counter(data(row)["incarnation"] for row in facts.rows if row["stream"] == "owner")
    for incarnation, times in claims.items():
        if times > MOST_CLAIMS:
            yield f"{incarnation} claimed the log {times} times"
    for row in facts.rows:
        if row["stream"] == "owner":
            owner = data(row)["incarnation"]
            last += 1
            if row["version"] != last:
                yield f"term {row['version']} follows term {last - 1}"
        by = next((who for position, who in acts.by if position >= row["position"]), None)
        if by is not None and owner and by != owner:
            yield f"position {row['position']} was appended by {by} while {owner} owned the log"


def n2(acts: Acts, facts: Facts) -> Iterator[str]:
    """A run does nothing more that only an owner may do once another has claimed the log."""
    owner = ""
    for act in acts.all:
        if act.what == "claimed":
            owner = act.incarnation
        elif act.incarnation != owner:
            yield f"{act.incarnation} {act.what} at {act.t} while {owner} owned the log"


def n3(acts: Acts, facts: Facts) -> Iterator[str]:
    """When the owner is killed, another node answers within a lease and 5 s."""
    if acts.failed_over is not None and acts.failed_over > FAILOVER_SEC:
        yield f"after the owner was killed nobody answered for {acts.failed_over:.1f} s"


def n4(acts: Acts, facts: Facts) -> Iterator[str]:
    """All nodes list the same events in the same order, and streams gave them in that order too."""
    whole = max(acts.listed.values(), key=len, default=[])
    for name, listed in acts.listed.items():
        if listed != whole:
            yield f"node {name} lists {len(listed)} of {len(whole)} events, or in another order"
    place = {position: number for number, (position, _) in enumerate(whole)}
    erased = {row["position"] for row in facts.rows if row["data"] is None}
    for reader in facts.history.readers if acts.listed else ():
        given = [s.position for s in facts.history.streams if s.name == reader and s.position not in erased]
        missing = [position for position in given if position not in place]
        places = [place[position] for position in given if position in place]
        if missing or places != sorted(places):
            yield f"a stream of {reader} gave what nodes do not list, or in another order: {missing[:3]}"


def n5(acts: Acts, facts: Facts) -> Iterator[str]:
    """A lost notification does no harm: from its start to its end each node asks the log again and again, and
    passes requests on to the owner that it found there."""
    claims = [act for _, act in acts.claims]
    for incarnation, began in acts.began.items():
        looks = [look for look in acts.looks if look.incarnation == incarnation]
        woken = [t for t, who in acts.woken if who == incarnation]
        ended = [t for who, t in acts.ended.items() if who == incarnation]
        for before, after in itertools.pairwise([began, *(look.t for look in looks), *ended]):
            if after - before > ASKS_WITHIN_MS and not any(before < t <= after for t in woken):
                yield f"{incarnation} did not ask the log from {before} to {after}"
        for passed in acts.passed:
            if passed.incarnation == incarnation:
                read = [look for look in looks if look.confirmed and look.t + KNOWS_WITHIN_MS < passed.t]
                known = sum(claim.t < look.began for claim in claims for look in read[-1:])
                owners = {claim.incarnation for claim in claims[max(0, known - 1) :]}
                if known and passed.owner not in owners:
                    yield f"{incarnation} passed on to {passed.owner} at {passed.t}, an owner before {owners}"


def bare_in_order(acts: Acts, facts: Facts) -> Iterator[str]:
    """For a device whose messages have no ids, nothing of a command reaches the MQTT server after a later
    command did."""
    latest: dict[str, tuple[int, str]] = {}
    for topic, command_id in acts.arrived:
        created = facts.created.get(command_id)
        if created is None or facts.definition(command_id).get("carries_ids", True):
            continue
        before = latest.get(topic, (0, ""))
        if created["position"] < before[0]:
            yield f"{command_id} arrived on {topic} after {before[1]}, which is younger"
        latest[topic] = max(before, (created["position"], command_id))
