"""The invariants as pure functions of a recorded history. Each yields one sentence per violation.

Nothing here may be imported from the broker.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from tests.simulation.checkers import hooks as checkers_hooks
from tests.simulation.checkers import streams as checkers_streams
from tests.simulation.checkers.access import c1, c2, c3, c4, o2, s7
from tests.simulation.checkers.erasing import e1, e2, e3
from tests.simulation.checkers.many import one_each, r10
from tests.simulation.checkers.presence import a3, a5, d9, d10, d12, r8
from tests.simulation.checkers.pull import a6, d11, r9
from tests.simulation.checkers.requests import l3, o4, r2, r4, r5, r7
from tests.simulation.checkers.timing import (
    d13,
    fresh,
    heard,
    in_order,
    late_by_true_time,
    salts,
    stood_still,
)
from tests.simulation.checkers.wire import a4, d2, d5, d7, s6
from tests.simulation.facts import (
    ANSWER_EVENT,
    CLOSING,
    FINAL,
    FROM_DEVICE,
    GRACE_MS,
    NEVER,
    TABLE,
    Facts,
    data,
)
from tests.simulation.history import Call, History, Row, Wire


def _succeeded(call: Call, *kinds: str) -> bool:
    return call.kind in kinds and call.status in (200, 201)


COME_BACK_MS = 30_000
CLOCK_SEEN_MS = 2_000  # the broker looks at the wall clock once a second


# --- requests --------------------------------------------------------------------------------------


def r1(facts: Facts) -> Iterator[str]:
    """Every command id in a 200 or 201 answer is in the log, and was durable before the answer."""
    for call in facts.history.calls:
        if not _succeeded(call, "create", "retry", "fan_out"):
            continue
        for command_id in call.ids:
            row = facts.created.get(command_id)
            if row is None:
                yield f"{command_id} was answered {call.status} and is not in the log"
            elif facts.durable(row) > (call.returned or 0):
                yield f"{command_id} was answered {call.status} before it was durable"


def r3(facts: Facts) -> Iterator[str]:
    """One idempotency key gives one command."""
    seen: dict[str, Call] = {}
    for call in facts.history.calls:
        if call.key is None or not _succeeded(call, "create"):
            continue
        first = seen.setdefault(call.key, call)
        if call.body != first.body:
            yield f"key {call.key} was taken with two bodies: {first.ids} and {call.ids}"
        elif call.ids != first.ids:
            yield f"key {call.key} gave two commands: {first.ids} and {call.ids}"
    yield from one_each(facts)


def r6(facts: Facts) -> Iterator[str]:
    """After a cancel that was answered 200, `cancelled` is final and the command is never handed over."""
    sent = {record.command_id for record in facts.publishes}
    for call in facts.history.calls:
        if not _succeeded(call, "cancel"):
            continue
        for command_id in call.ids:
            types = [row["type"] for row in facts.commands.get(command_id, ())]
            if not types or types[-1] != "cancelled":
                yield f"cancel of {command_id} was answered 200 and its log says {types}"
            if "published" in types or command_id in sent:
                yield f"{command_id} was cancelled and handed over"


# --- life ------------------------------------------------------------------------------------------


def l1(facts: Facts) -> Iterator[str]:
    """All transitions are in the table, attempts count from 1, and an event that corrects `timed_out` is
    marked late."""
    for command_id, rows in facts.commands.items():
        state, attempts = "none", 0
        for row in rows:
            event, said = row["type"], data(row)
            allowed, gives = TABLE.get(event, (frozenset[str](), event))
            by_broker = said.get("by") == "broker" or row["data"] is None
            if state not in allowed or (event == "failed" and state == "pending" and not by_broker):
                yield f"{command_id}: {event} after {state} at version {row['version']}"
            if event == "published":
                attempts += 1
                if said.get("attempt", attempts) != attempts:
                    yield f"{command_id}: attempt {said['attempt']} where {attempts} was due"
            if state == "timed_out" and gives in TABLE and row["data"] is not None and not said.get("late"):
                yield f"{command_id}: {event} after timed_out is not marked late"
            state = gives


def l2(facts: Facts) -> Iterator[str]:
    """A command has one final event, and no event follows it."""
    for command_id, rows in facts.commands.items():
        for before, after in pairwise(rows):
            if before["type"] in FINAL:
                yield f"{command_id}: {after['type']} after its final {before['type']}"


def l4(facts: Facts) -> Iterator[str]:
    """Once faults have stopped, every command closes: by `expires_at` + 15 s, or, once acknowledged, by its
    last report + its result timeout + 15 s. A command without expiry closes as well, because its device is
    online then. A start of the listener is the end of a fault: devices have some time to come back. So is the
    moment when a clock that stood since the start goes on; the wall clock is right once all is healed."""
    healed, ended = facts.history.healed_at or 0, facts.history.ended_at or 0
    starts = [row for row in facts.streams.get("system", ()) if data(row).get("mqtt") == "embedded"]
    if starts:
        went_on = healed + CLOCK_SEEN_MS if facts.behind(starts[-1]) else starts[-1]["recorded_at"]
        healed = max(healed, went_on + COME_BACK_MS)
    for command_id, created in facts.created.items() if ended else ():
        due: int = data(created).get("expires_at") or NEVER
        result_ms = round(1000 * facts.definition(command_id).get("result_timeout_sec", 60))
        state = "none"
        for row in facts.commands[command_id]:
            before, state = state, TABLE[row["type"]][1]
            too_late = row["recorded_at"] > max(due, healed) + GRACE_MS
            if too_late and state in CLOSING and before not in CLOSING:
                yield f"{command_id}: {row['type']} came {row['recorded_at'] - due} ms after it was due"
            due = row["recorded_at"] + result_ms if state == "acknowledged" else due
        if state not in CLOSING and (due == NEVER or ended > max(due, healed) + GRACE_MS):
            yield f"{command_id} is {state} at the end, {ended - healed} ms after the faults stopped"


# --- delivery --------------------------------------------------------------------------------------


def d1(facts: Facts) -> Iterator[str]:
    """A durable `published` event precedes every publish on the wire."""
    unnamed: Counter[str] = Counter()
    handed_over: dict[str, list[int]] = defaultdict(list)
    for command_id, created in facts.created.items():
        for row in facts.commands[command_id]:
            if row["type"] == "published" and data(row).get("transport", "mqtt") == "mqtt":
                handed_over[data(created).get("topic", "")].append(facts.durable(row))
    for record in facts.publishes:
        if record.command_id is None:  # a bare payload has no id: match it by its number on the topic
            unnamed[record.topic] += 1
            if sum(seq < record.seq for seq in handed_over[record.topic]) < unnamed[record.topic]:
                yield f"publish {unnamed[record.topic]} on {record.topic} has no durable event before it"
            continue
        event = _handing_over(facts, record)
        if event is None:
            yield f"{record.command_id} attempt {record.attempt} was sent and never recorded as published"
        elif facts.durable(event) > record.seq:
            yield f"{record.command_id} attempt {record.attempt} was sent before its event was durable"


def _handing_over(facts: Facts, record: Wire) -> Row | None:
    for row in facts.commands.get(record.command_id or "", ()):
        by_it = data(row).get("transport", "mqtt") == record.transport
        if row["type"] == "published" and by_it and record.attempt in (None, data(row).get("attempt")):
            return row
    return None


def d3(facts: Facts) -> Iterator[str]:
    """A device that gets ids executes no command twice; a command that is not repeatable is sent once."""
    executed = Counter((run.hardware_id, run.command_id) for run in facts.history.executions)
    for (hardware_id, command_id), times in executed.items():
        if times > 1:
            yield f"{hardware_id} executed {command_id} {times} times"
    sent = Counter(record.command_id for record in facts.publishes)
    for command_id, rows in facts.commands.items():
        if facts.definition(command_id).get("repeatable", True):
            continue
        times = max(sent[command_id], sum(row["type"] == "published" for row in rows))
        if times > 1:
            yield f"{command_id} is not repeatable and was sent {times} times"


def d4(facts: Facts) -> Iterator[str]:
    """The broker publishes nothing after `expires_at`, by its own clock.

    When the bytes left, that clock showed at least the event's `recorded_at`. In the life of the process that
    recorded it, it showed that plus the time since the commit, and as much as it ran since then, if it ran
    all the time. In a later life it may have started again from there.
    """
    starts = [row["position"] for row in facts.rows if row["type"] == "started"]
    for record in facts.publishes:
        row = _handing_over(facts, record)
        commit = facts.commit_of(row) if row else None
        created = facts.created.get(record.command_id or "")
        expires_at = data(created).get("expires_at") if created else None
        if row is None or commit is None or expires_at is None:
            continue
        sender = facts.life_at(record.seq)
        late_by = row["recorded_at"] - expires_at
        if sender is facts.life_at(commit.seq):
            late_by += max(0, record.t - commit.t)
            late_by = max(late_by, late_by_true_time(facts, record, row, starts))
        if (end := sender.true_time(expires_at)) is not None:
            late_by = max(late_by, record.t - end)
        if late_by >= 0:
            yield f"{record.command_id} attempt {record.attempt} was sent {late_by} ms after it expired"


def d6(facts: Facts) -> Iterator[str]:
    """A device first executes its commands in their order of creation.

    Exception: the earlier command was closed before the later one was first handed over. Then its message was
    delayed on the network.
    """
    firsts: dict[str, dict[str, int]] = defaultdict(dict)
    for run in facts.history.executions:
        if facts.definition(run.command_id).get("max_in_flight", 1) == 1 and run.command_id in facts.created:
            firsts[run.hardware_id].setdefault(run.command_id, run.seq)
    for hardware_id, executed in firsts.items():
        done: list[str] = []
        for command_id in sorted(executed, key=executed.__getitem__):
            position = facts.created[command_id]["position"]
            for other in done:
                if facts.created[other]["position"] > position and not _closed_before(
                    facts, command_id, other
                ):
                    yield f"{hardware_id} executed {command_id} after {other}, which was created later"
            done.append(command_id)


def _closed_before(facts: Facts, earlier: str, later: str) -> bool:
    sent = facts.first(later, "published")
    return sent is None or any(
        row["type"] in CLOSING and row["position"] < sent["position"] for row in facts.commands[earlier]
    )


def d8(facts: Facts) -> Iterator[str]:
    """The broker starts no publish after a closing event."""
    closed: dict[str, int] = {}
    for command_id, rows in facts.commands.items():
        closed[command_id] = min(
            (facts.durable(row) for row in rows if row["type"] in CLOSING), default=NEVER
        )
    for record in facts.publishes:
        if record.seq > closed.get(record.command_id or "", NEVER):
            yield f"{record.command_id} attempt {record.attempt} was sent after it was closed"


# --- answers ---------------------------------------------------------------------------------------


def a1(facts: Facts) -> Iterator[str]:
    """When the broker sends its PUBACK for an answer, the durable state already includes that answer."""
    for record in facts.history.wire:
        created = facts.created.get(record.command_id or "")
        event = ANSWER_EVENT.get(record.status or "")
        if record.what != "puback" or record.retain or created is None or event is None:
            continue
        if data(created).get("hardware_id") != record.hardware_id:
            continue
        durable = [row for row in facts.commands[created["stream"]] if facts.durable(row) < record.seq]
        state = next((TABLE[row["type"]][1] for row in durable[::-1] if row["type"] in TABLE), "none")
        # No event is needed for a repeated acknowledgement or progress report, for a deleted device, or for
        # an erased command.
        nobody = min(facts.deleted(created["device_id"]), facts.erased_at(created["stream"])) < record.seq
        told = {TABLE[row["type"]][1] for row in durable if row["type"] in ANSWER_EVENT.values()}
        idle = (TABLE[event][1] == "acknowledged" and "acknowledged" in told) or nobody
        if state in TABLE[event][0] - {"pending"} and not idle:
            yield f"{record.command_id}: {record.status} got its PUBACK while only {state} was durable"


def a2(facts: Facts) -> Iterator[str]:
    """Copies of one answer give one event: never more events than answers, and never two equal events in a
    row."""
    sent = Counter((sent.hardware_id, sent.command_id, sent.status) for sent in facts.history.answers)
    for command_id, rows in facts.commands.items():
        if rows[0]["data"] is None:
            continue
        hardware_id = str(data(rows[0]).get("hardware_id"))
        for status, event in ANSWER_EVENT.items():
            recorded = sum(row["type"] == event and _of_device(row) for row in rows)
            times = sent[hardware_id, command_id, status]
            if status == "acknowledged" and len(facts.definition(command_id).get("transports", ())) > 1:
                # over HTTP, progress is reported as an acknowledgement
                times += sent[hardware_id, command_id, "progress"]
            if recorded > times:
                yield f"{command_id}: {recorded} {event} events of {times} answers"
        for before, after in pairwise(rows):
            if after["type"] in ANSWER_EVENT.values() and _told(before) == _told(after):
                yield f"{command_id}: the same {after['type']} was recorded twice"


def _of_device(row: Row) -> bool:
    """Whether the event comes from the device. The default evidence is not written to the log. An event that
    was erased before anybody saw it does not say who it is from."""
    return row["data"] is not None and data(row).get("evidence", "device_result") in FROM_DEVICE


def _told(row: Row) -> tuple[Any, ...]:
    said = data(row)
    erased = row["version"] if row["data"] is None else None  # erased data cannot be compared: never equal
    return row["type"], said.get("percent"), said.get("note"), erased


# --- log and projections ---------------------------------------------------------------------------


def s1(facts: Facts) -> Iterator[str]:
    """Positions run 1..N and time never falls. An earlier dump is a prefix of a later one, except for erased
    data."""
    dumps = facts.history.dumps
    for index, row in enumerate(facts.history.log, 1):
        if row["position"] != index:
            yield f"found position {row['position']} where {index} was due"
            break
    for before, after in pairwise(facts.history.log):
        if after["recorded_at"] < before["recorded_at"]:
            yield f"recorded_at falls at position {after['position']}"
    for earlier, later in pairwise(dumps):
        yield from _begins_with(later, earlier)


def _begins_with(log: list[Row], earlier: list[Row]) -> Iterator[str]:
    """Is the earlier log a prefix, except for data that was erased since?"""
    if len(log) < len(earlier):
        yield f"the log had {len(earlier)} events and later {len(log)}"
    for before, after in zip(earlier, log, strict=False):
        if before is not after and any(
            before[name] != after[name]
            for name in before
            if name not in ("data", "salt") or after[name] is not None
        ):
            yield f"the event at position {before['position']} was changed"


def o5(facts: Facts) -> Iterator[str]:
    """A backup that is taken while the broker runs is a prefix of the log, and has all that was durable."""
    for backup in facts.history.backups:
        yield from _begins_with(facts.history.log, backup.rows)
        durable = max((each.head for each in facts.history.commits if each.seq < backup.seq), default=0)
        if len(backup.rows) < durable:
            yield f"a backup has {len(backup.rows)} events, and {durable} were durable"


def s2(facts: Facts) -> Iterator[str]:
    """Versions run 1..n in every stream."""
    for stream, rows in facts.streams.items():
        versions = [row["version"] for row in rows]
        if versions != list(range(1, len(rows) + 1)):
            yield f"{stream} has versions {versions}"


def s4(incremental: Mapping[str, Sequence[Any]], rebuilt: Mapping[str, Sequence[Any]]) -> list[str]:
    """Every incrementally updated projection equals the rebuilt one. Arguments: table name to its rows,
    sorted alike."""
    found = []
    for table in sorted(incremental.keys() | rebuilt.keys()):
        kept, fresh = incremental.get(table, ()), rebuilt.get(table, ())
        if len(kept) != len(fresh):
            found.append(f"S4: {table} has {len(kept)} rows and rebuilt {len(fresh)}")
        found += [
            f"S4: {table} has {one} and rebuilt {other}"
            for one, other in zip(kept, fresh, strict=False)
            if one != other
        ]
    return found


CHECKERS: dict[str, Callable[[Facts], Iterator[str]]] = {
    "R1": r1,
    "R2": r2,
    "R3": r3,
    "R4": r4,
    "R5": r5,
    "R6": r6,
    "R7": r7,
    "R8": r8,
    "R9": r9,
    "R10": r10,
    "L1": l1,
    "L2": l2,
    "L3": l3,
    "L4": l4,
    "D1": d1,
    "D2": lambda facts: chain(d2(facts), fresh(facts)),
    "D3": d3,
    "D4": d4,
    "D5": d5,
    "D6": d6,
    "D7": d7,
    "D8": d8,
    "D9": lambda facts: chain(d9(facts), heard(facts)),
    "D10": d10,
    "D11": d11,
    "D12": d12,
    "D13": d13,
    "A1": a1,
    "A2": a2,
    "A3": a3,
    "A4": lambda facts: chain(a4(facts), in_order(facts)),
    "A5": lambda facts: chain(a5(facts), stood_still(facts)),
    "A6": a6,
    "E1": e1,
    "E2": e2,
    "E3": lambda facts: chain(e3(facts), salts(facts)),
    "S1": s1,
    "S2": s2,
    "S5": lambda facts: chain(
        checkers_hooks.s5(facts), checkers_streams.s5(facts), checkers_streams.by_mqtt(facts)
    ),
    "S6": s6,
    "S7": s7,
    "C1": c1,
    "C2": c2,
    "C3": c3,
    "C4": c4,
    "O2": o2,
    "O4": o4,
    "O5": o5,
}


def check(history: History) -> list[str]:
    """All violations of the invariants in CHECKERS, each sentence prefixed with the invariant's name."""
    facts = Facts(history)
    return [f"{name}: {sentence}" for name, checker in CHECKERS.items() for sentence in checker(facts)]
