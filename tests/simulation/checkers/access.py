"""Who may see and do what: names, secrets, other projects, ended keys, bounds, and slow subscribers.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

from tests.simulation.checkers.hooks import is_wanted
from tests.simulation.checkers.wire import SLOW_MS, Calm
from tests.simulation.facts import CLOSING, Facts, data
from tests.simulation.history import Call

ENDS_WITHIN_MS = 5_000
GRANT = "eyJ"
ANSWERED_MS = 10_000
CAUGHT_UP_MS, TOLD_MS = 15_000, 5_000


def s7(facts: Facts) -> Iterator[str]:
    """S7: every command names the key that asked for it; no secret is in any log line."""
    actors = {each.who: each.actor for each in facts.history.secrets if each.actor}
    for call in facts.history.calls:
        if call.kind not in ("create", "retry", "fan_out") or call.status != 201:
            continue
        for command_id in call.ids:
            row = facts.created.get(command_id)
            if row is not None and call.who in actors and row.get("actor") != actors[call.who]:
                yield f"{command_id} was created by {row.get('actor')}, asked for by {actors[call.who]}"
    for line in facts.history.lines:
        if GRANT in line:
            yield f"a grant is in a log line: {line[:60]}"
        for each in facts.history.secrets:
            if each.value and each.value in line:
                yield f"the secret of {each.who} is in a log line: {line[:60]}"


def c1(facts: Facts) -> Iterator[str]:
    """C1: for another project a command does not exist: the same answer as for an invented id."""
    shapes: dict[str, set[str]] = defaultdict(set)
    for call in facts.history.calls:
        if call.kind != "pry" or call.status in (None, 503):
            continue
        if call.status != 404:
            yield f"another project's request for {call.ids} was answered {call.status}"
        shape = json.dumps([call.status, call.answer])
        for each in call.ids:
            shape = shape.replace(each, "ID")
        shapes[call.body.split(" ")[0].replace(call.ids[0], "ID")].add(shape)
    for path, found in shapes.items():
        if len(found) > 1:
            yield f"{path} shows whether an id of another project exists: {sorted(found)}"


def c2(facts: Facts) -> Iterator[str]:
    """C2: a revoked key or an old token stops working within 5 s."""
    for call in facts.history.calls:
        if call.status is None or call.status in (401, 503):
            continue
        each = call.secret
        if each is not None and each.ended is not None and call.t > each.ended + ENDS_WITHIN_MS:
            yield f"{call.kind} with the ended secret of {call.who} was answered {call.status}"


def c3(facts: Facts) -> Iterator[str]:
    """C3: every bound holds, and the requests of another project go through while one floods."""
    for name, (seen, most) in facts.history.bounds.items():
        if seen > most:
            yield f"{name}: {seen} of at most {most}"
    yield from _queues(facts)
    calm = Calm(facts)
    for call in facts.history.calls:
        if call.kind != "create" or call.who != "rival" or call.status is None:
            continue
        if call.status == 429 and _waiting(facts, call) >= min(facts.history.most):
            continue  # while the broker's clock stands, nothing expires
        took = (call.answered_at or call.t) - call.t
        if calm.between(call.t - ENDS_WITHIN_MS, call.t + took) and (
            call.status != 201 or took > ANSWERED_MS
        ):
            yield f"a create of another project was answered {call.status} after {took} ms"


def _waiting(facts: Facts, call: Call) -> int:
    """How many commands this caller already had waiting."""
    mine = [each for each in facts.history.calls if each.who == call.who and each.invoked < call.invoked]
    rows = [facts.commands.get(command_id, ()) for each in mine for command_id in each.ids]
    return sum(
        bool(found) and not any(row["type"] in CLOSING and facts.durable(row) < call.invoked for row in found)
        for found in rows
    )


def _queues(facts: Facts) -> Iterator[str]:
    in_all, of_name = facts.history.most
    open_now: dict[str, dict[str, str]] = defaultdict(dict)  # by device: open command and its name
    for row in facts.rows:
        mine = open_now[row["device_id"]]
        if row["type"] == "created":
            name = mine[row["stream"]] = data(row).get("type", "")
            if len(mine) > in_all or list(mine.values()).count(name) > of_name:
                yield f"{row['stream']} was taken while its device had {len(mine) - 1} open commands"
        elif row["type"] in CLOSING:
            mine.pop(row["stream"], None)


def c4(facts: Facts) -> Iterator[str]:
    """C4: a subscriber that reads gets an event within 5 s, whatever other subscribers do."""
    calm, history = Calm(facts), facts.history
    for name, event in history.readers.items():
        got = {seen.position: seen.t for seen in history.streams if seen.name == name}
        spans, since = list[tuple[int, int]](), None
        for each in history.reading:
            if each.name == name and since is not None and not each.on:
                spans.append((since, each.t))
            if each.name == name:
                since = (each.t if since is None else since) if each.on else None
        wanted = [row for row in history.log if is_wanted(row, [event] if event else [])]
        for row in wanted:
            commit = facts.commit_of(row)
            if commit is None or not calm.between(commit.t - CAUGHT_UP_MS, commit.t + TOLD_MS):
                continue
            for start, end in spans:
                reads = start + CAUGHT_UP_MS < commit.t and commit.t + TOLD_MS < end
                if reads and got.get(row["position"], end + TOLD_MS) > commit.t + TOLD_MS:
                    yield f"the reader of {name} did not get position {row['position']} in time"


def o2(facts: Facts) -> Iterator[str]:
    """O2: a process that is asked to end does so within 10 s, and answers the requests that it had."""
    stopping = None
    slow = [each for each in facts.history.writes if each.t - each.began > SLOW_MS]
    for each in facts.history.lives:
        if each.what == "stopping":
            stopping = each
        elif each.what == "ended" and stopping is not None:
            excused = any(write.t > stopping.t and write.began < each.t for write in slow)
            if each.t - stopping.t > 10_000 and not excused:
                yield f"the process ended {each.t - stopping.t} ms after it was asked to"
            stopping = None
        elif each.what in ("paused", "down", "full"):
            stopping = None
