"""What crosses the wire: every hand-over, to nobody else, with a grant that allows it; answers in time.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterator

from tests.simulation.facts import CLOSING, Facts, data
from tests.simulation.history import Row, Wire

CALM_MS = 30_000  # after the faults end: sessions, presence and pauses settle
WRITTEN_MS = 2_000
TAKEN_MS = 1_000
SLOW_MS = 400
EARLY_MS = 15_000
MENDED_MS = 400_000
DAY_MS = 86_400_000
LEEWAY_MS = 3_000
WAITED_MS = 1_000


class Calm:
    """Whether nothing disturbed the broker between two moments: its process, its link, its disk."""

    def __init__(self, facts: Facts, *, slow_too: bool = True) -> None:
        history = facts.history
        disturbed = [(each.t, each.t) for each in history.lives]
        disturbed += [(each.t, each.t) for each in history.links]
        disturbed += [
            (each.began, each.t)
            for each in history.writes
            if not each.ok or (slow_too and each.t - each.began > SLOW_MS)
        ]
        self._disturbed = sorted(disturbed)
        self._longest = max((until - since for since, until in disturbed), default=0)

    def between(self, since: int, until: int) -> bool:
        first = bisect_left(self._disturbed, (since - self._longest, 0))
        last = bisect_right(self._disturbed, (until, until))
        return not any(end >= since for _, end in self._disturbed[first:last])


def d2(facts: Facts) -> Iterator[str]:
    """D2: without faults, the bytes of every hand-over by MQTT are written, unless the command ends first, an
    earlier attempt is answered first, or they wait behind the device's own window."""
    healed, ended = facts.history.healed_at, facts.history.ended_at
    if healed is None or ended is None:
        return
    wire = facts.history.wire
    written = {(each.command_id, each.attempt) for each in wire if each.what in ("publish", "queued")}
    calm = Calm(facts, slow_too=False)
    for command_id, rows in facts.commands.items():
        for row in rows:
            at, said = row["recorded_at"], data(row)
            if row["type"] != "published" or said.get("transport", "mqtt") != "mqtt":
                continue
            soon = [each["type"] for each in rows if at <= each["recorded_at"] <= at + WRITTEN_MS]
            replaced = CLOSING.intersection(soon) or soon.count("published") > 1
            replaced = replaced or (said.get("attempt", 1) > 1 and "acknowledged" in soon)
            if not healed + CALM_MS < at < ended - WRITTEN_MS or replaced:
                continue
            commit = facts.commit_of(row)
            if commit is None or not calm.between(commit.t - WRITTEN_MS, commit.t + WRITTEN_MS):
                continue
            if _left(facts, row["device_id"], at):
                continue
            if not written.intersection({(command_id, said.get("attempt")), (command_id, None)}):
                yield f"{command_id} attempt {said.get('attempt')} was recorded and never sent"


def _left(facts: Facts, device_id: str, at: int) -> bool:
    """Was the device away then, or did it leave at about that time?"""
    rows = [
        row for row in facts.streams.get(f"device/{device_id}", ()) if row["type"] in ("online", "offline")
    ]
    before = [row["type"] for row in rows if row["recorded_at"] <= at]
    left = any(row["type"] == "offline" and abs(row["recorded_at"] - at) < WRITTEN_MS for row in rows)
    return left or before[-1:] == ["offline"]


def d5(facts: Facts) -> Iterator[str]:
    """D5: what a device gets carries a grant for this device, command and parameters, which ends with the
    command."""
    for each in facts.history.granted:
        if each.fault is not None:
            yield f"{each.hardware_id} got {each.command_id} with a wrong grant: {each.fault}"
        created = facts.created.get(each.command_id)
        expires_at = data(created).get("expires_at") if created else None
        if expires_at is not None and each.exp > expires_at:
            yield f"the grant of {each.command_id} ends {each.exp - expires_at} ms after the command"
        if each.exp > each.t + 2 * DAY_MS:  # the broker's clock may be a day ahead
            yield f"the grant of {each.command_id} is valid for more than a day"


def d7(facts: Facts) -> Iterator[str]:
    """D7: nothing is retained, and nothing goes to another device."""
    for record in facts.publishes:
        if record.retain:
            yield f"a message to {record.topic} was sent retained"
        created = facts.created.get(record.command_id or "")
        if created is not None and data(created).get("hardware_id") not in (None, record.hardware_id):
            yield f"{record.command_id} went to {record.hardware_id}, which is another device"


def a4(facts: Facts) -> Iterator[str]:
    """A4: while nothing is wrong with process, link and disk, every message gets its PUBACK within a second,
    whatever came before it."""
    if any(data(row).get("mqtt") == "embedded" for row in facts.streams.get("system", ())):
        return  # there a device that leaves takes its own PUBACKs with it
    calm = Calm(facts)
    late = list(_late(facts))
    for record in late:
        if calm.between(record.t - 2 * TAKEN_MS, record.t + TAKEN_MS) and record.t < _end(facts) - TAKEN_MS:
            yield f"a message on {record.topic} waited for more than {TAKEN_MS} ms for its PUBACK"


def _late(facts: Facts) -> Iterator[Wire]:
    """Deliveries without a PUBACK, or with one that came late."""
    waiting: dict[tuple[str, str | None, str | None], deque[Wire]] = defaultdict(deque)
    downs = deque(link for link in facts.history.links if not link.up)
    for record in facts.history.wire:
        while downs and downs[0].seq < record.seq:
            down = downs.popleft()  # what waited then gets no PUBACK any more
            yield from (each for left in waiting.values() for each in left if down.t - each.t > TAKEN_MS)
            waiting.clear()
        key = record.topic, record.command_id, record.status
        if record.what == "delivery":
            waiting[key].append(record)
        elif record.what == "puback" and waiting[key]:
            first = waiting[key].popleft()
            if record.t - first.t > TAKEN_MS:
                yield first
    for left in waiting.values():
        yield from left


def _end(facts: Facts) -> int:
    return max((commit.t for commit in facts.history.commits), default=0)


def s6(facts: Facts) -> Iterator[str]:
    """S6: in one life of the process no step of the wall clock lets a command expire early.

    Judged by true time; the moment of a commit may be some seconds after that of its event.
    """
    behind = [row for row in facts.rows if row["type"] == "started" and facts.behind(row)]
    begun = [commit.t for row in behind if (commit := facts.commit_of(row))]
    stood = [(since, end.t) for since, end in facts.history.stops()]
    for command_id, created in facts.created.items():
        ttl = data(created).get("ttl_ms")
        for row in facts.commands[command_id]:
            by_time = row["type"] == "expired" or data(row).get("reason") == "ttl"
            if ttl is None or not by_time:
                continue
            life = facts.life_of(row)
            if life is None or facts.life_of(created) is not life:
                continue
            first, last = facts.commit_of(created), facts.commit_of(row)
            if first is None or last is None:
                continue
            # A process that starts with a clock before its log takes a new one once it is mended. Until then
            # its clock stands, and what is created has the time that the clock shows.
            if any(0 <= first.t - at < MENDED_MS for at in begun) or _stood(facts, created):
                continue
            # It was decided before its write was asked for, maybe while the write before that took long.
            own = [write.began for write in facts.history.writes if write.ok and write.t == first.t]
            asked = [
                write.began
                for write in facts.history.writes
                if write.ok and own and own[0] - WAITED_MS <= write.t <= first.t
            ]
            # Or before the process stood still, which then wrote it first of all.
            asked += [since for since, until in stood if own and own[0] - WAITED_MS <= until <= first.t]
            if (took := last.t - min([first.t, *asked])) < ttl - EARLY_MS:
                yield f"{command_id} had {ttl} ms and ended by time after {took} ms"


def _stood(facts: Facts, created: Row) -> bool:
    """Whether the clock of the process still stood when it created this command. A clock that has stood since
    the start moves by no more than 1 ms for each event."""
    starts = (row for row in reversed(facts.rows[: created["position"]]) if row["type"] == "started")
    started = next(starts, None)
    if started is None or not facts.behind(started):
        return False
    return bool(created["recorded_at"] - started["recorded_at"] <= created["position"] - started["position"])
