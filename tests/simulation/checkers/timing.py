"""When things happen: attempts wait their time, answers are waited for, presence is heard, messages in order.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.simulation.checkers.wire import CALM_MS, Calm
from tests.simulation.facts import NEVER, Facts, data
from tests.simulation.history import Row, Wire

SLACK_MS = 1_500  # of a commit, and of what waits for it
STOOD_STILL_MS = 10_000
DRAINED_MS = 1_500
BACKLOG_MS = 1_900
MQTT = ("mqtt",)
STOOD_MS = 1_000


def d13(facts: Facts) -> Iterator[str]:
    """D13: an attempt whose bytes the MQTT server took is given its whole `ack_timeout_sec`, counted from
    those bytes, unless link, process or device went away."""
    calm = Calm(facts, slow_too=False)
    taken = _first(facts, "accepted")
    written = {(each.command_id, each.attempt): each for each in reversed(facts.publishes)}
    status = _by_device(facts, "/status")
    for command_id, rows in facts.commands.items():
        patience = 1_000 * facts.definition(command_id).get("ack_timeout_sec", 10)
        for before, after in pairwise(row for row in rows if row["type"] in ("published", "timed_out")):
            by_timer = after["type"] == "published" or data(after).get("reason") == "no_answer"
            attempt = data(before).get("attempt")
            sent, commit = written.get((command_id, attempt)), facts.commit_of(after)
            if sent is None or commit is None or not by_timer or (command_id, attempt) not in taken:
                continue
            decided = facts.true_time(after, after["recorded_at"]) or commit.t
            if before["type"] != "published" or min(decided, commit.t) - sent.t >= patience - 50:
                continue
            heard = status.get(sent.hardware_id, [])
            first, last = bisect_right(heard, sent.t - SLACK_MS), bisect_right(heard, commit.t)
            if first == last and calm.between(sent.t - SLACK_MS, commit.t):
                yield f"{command_id} attempt {attempt} was given {decided - sent.t} ms of {patience}"


def _first(facts: Facts, what: str) -> set[tuple[str | None, int | None]]:
    return {(each.command_id, each.attempt) for each in facts.history.wire if each.what == what}


def _by_device(facts: Facts, suffix: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for each in facts.history.wire:
        if each.what == "delivery" and each.topic.endswith(suffix):
            found[each.hardware_id].append(each.t)
    return found


def stood_still(facts: Facts) -> Iterator[str]:
    """A5: deadlines that passed while the process stood still wait for the answers of that time."""
    for since, end in facts.history.stops():
        if end.what == "resumed" and end.t - since >= STOOD_STILL_MS:
            yield from _hurried(facts, since, end.t)


def _hurried(facts: Facts, since: int, until: int) -> Iterator[str]:
    written = {(each.command_id, each.attempt): each.t for each in facts.publishes}
    for command_id, rows in facts.commands.items():
        if "mqtt" not in facts.definition(command_id).get("transports", MQTT):
            continue
        last = next((row for row in reversed(rows) if row["type"] == "published"), None)
        ended = next((row for row in rows if row["type"] == "timed_out"), None)
        commit = facts.commit_of(ended) if ended is not None else None
        if last is None or ended is None or commit is None or not until <= commit.t < until + DRAINED_MS:
            continue
        patience = 1_000 * facts.definition(command_id).get("ack_timeout_sec", 10)
        due = written.get((command_id, data(last).get("attempt")), 0) + patience
        if data(ended).get("reason") == "no_answer" and since + SLACK_MS < due < until - SLACK_MS:
            yield f"{command_id} timed out {commit.t - until} ms after the process went on"


def heard(facts: Facts) -> Iterator[str]:
    """D9: an attempt counts only if the device was heard live in the present MQTT session."""
    if any(data(row).get("mqtt") == "embedded" for row in facts.streams.get("system", ())):
        return
    live: dict[str, list[Wire]] = defaultdict(list)
    for each in facts.history.wire:
        if each.what == "delivery" and not each.retain:
            live[each.hardware_id].append(each)
    # From the moment the old session ended: the first messages may come before we know that the link is up.
    ups = [(before.seq, up) for before, up in pairwise(facts.history.links) if up.up]
    for command_id, rows in facts.commands.items():
        if facts.definition(command_id).get("presence") != "required":
            continue
        for row in rows:
            counts = data(row).get("counts", True) and data(row).get("transport", "mqtt") == "mqtt"
            if row["type"] != "published" or not counts:
                continue
            before, now = facts.not_durable(row), facts.durable(row)
            # The session in which it was decided: another one may have begun before it was durable.
            decided = facts.true_time(row, row["recorded_at"]) or NEVER
            since, up = next(
                ((seq, up) for seq, up in reversed(ups) if up.seq < before and up.t <= decided), (0, None)
            )
            name = data(rows[0]).get("hardware_id", "")
            if up is not None and not any(
                since < each.seq < now and (each.topic.endswith("/status") or each.t >= up.t + BACKLOG_MS)
                for each in live[name]
            ):
                yield f"{command_id} attempt {data(row).get('attempt')} counts, its device not heard since"


def in_order(facts: Facts) -> Iterator[str]:
    """A4: PUBACKs have the order of the messages (external MQTT server, one session of the link)."""
    if any(data(row).get("mqtt") == "embedded" for row in facts.streams.get("system", ())):
        return
    waiting: list[tuple[str, str | None, str | None]] = []
    changes = iter([*(link.seq for link in facts.history.links if not link.up), 1 << 62])
    change = next(changes)
    for record in facts.history.wire:
        while record.seq > change:
            waiting.clear()
            change = next(changes)
        key = record.topic, record.command_id, record.status
        if record.what == "delivery":
            waiting.append(key)
        elif record.what == "puback" and key in waiting:
            if waiting[0] != key:
                yield f"the PUBACK for {record.topic} overtook that of an earlier message"
                return
            waiting.pop(0)


def fresh(facts: Facts) -> Iterator[str]:
    """D2: once everything is well, a new command reaches its device."""
    healed, ended = facts.history.healed_at, facts.history.ended_at
    if healed is None or ended is None:
        return
    handed = {each.command_id for each in facts.publishes}
    reached = {each.command_id for each in facts.history.wire if each.what == "reached"}
    for call in facts.history.calls:
        if call.kind == "create" and call.key is not None and call.key.startswith(FRESH) and call.ids:
            row = facts.created.get(call.ids[0])
            by_mqtt = facts.definition(call.ids[0]).get("transports", MQTT)
            # A device that asks by itself may take as long as the command lives.
            past = facts.first(call.ids[0], "expired") or "mqtt" in by_mqtt
            ran_out = facts.first(call.ids[0], "expired") or facts.first(call.ids[0], "timed_out")
            named = facts.definition(call.ids[0]).get("carries_ids", True) and list(by_mqtt) == ["mqtt"]
            there = reached if ran_out and named else handed
            if row is None or not past or call.ids[0] in there:
                continue
            if ended > row["recorded_at"] + CALM_MS:
                yield f"{call.ids[0]}, created when all was well, never reached its device"


FRESH = "fresh-"


def salts(facts: Facts) -> Iterator[str]:
    """E3: a row without data has no salt either, or its data could be guessed."""
    if facts.history.ended_at is not None:
        for row in facts.history.log:
            if row["data"] is None and row.get("salt"):
                yield f"position {row['position']} was erased and still has its salt"


def late_by_true_time(facts: Facts, record: Wire, row: Row, starts: list[int]) -> int:
    """How long after its end a command was sent, ms, by true time; within one life of the process.

    After a start with the wall clock before the log's end, the broker's clock stands until the wall clock has
    caught up (lifecycle.md, "Clock"). What is created meanwhile is measured by that clock.
    """
    created = facts.created[record.command_id or ""]
    earlier = reversed(facts.rows[: created["position"]])
    started = next((each for each in earlier if each["type"] == "started"), created)
    begun = facts.commit_of(started)
    made = facts.commit_of(created)
    if begun is None or made is None:
        return -1
    stood = made.t - begun.t - (created["recorded_at"] - started["recorded_at"])
    if stood > STOOD_MS or (started["type"] == "started" and facts.behind(started)):
        return -1
    commit, ttl = facts.commit_of(created), data(created).get("ttl_ms")
    if commit is None or ttl is None or any(created["position"] < at < row["position"] for at in starts):
        return -1
    return record.t - commit.t - int(ttl)
