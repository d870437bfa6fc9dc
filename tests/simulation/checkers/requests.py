"""What requests may rely on: once or not at all, seen afterwards, refused without a trace, closed while full.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tests.simulation.facts import FINAL, TABLE, Facts, data
from tests.simulation.history import Call, Life, Write

CHANGES = ("create", "retry", "fan_out", "cancel", "abandon", "erase", "purge", "report")
# Until the process knows that a write failed, and until a probe of it was answered.
KNOWN_MS = 600
AGAIN_MS = 5_000


def r2(facts: Facts) -> Iterator[str]:
    """R2: a request with an unknown outcome was carried out once or not at all. Each order has a level of its
    own; a retry has the level of the first."""
    seen: dict[tuple[Any, Any], str] = {}
    for command_id, row in facts.created.items():
        level = level_of(row)
        if level is None or data(row).get("retry_of"):
            continue
        first = seen.setdefault((data(row).get("hardware_id"), level), command_id)
        if first != command_id:
            yield f"{command_id} was created by the same order as {first}"


def r4(facts: Facts) -> Iterator[str]:
    """R4: a read shows at least what was answered before it was asked."""
    shown: dict[str, list[tuple[int, int]]] = defaultdict(list)  # by command: seq of the answer, version
    for call in sorted(facts.history.calls, key=lambda call: call.returned or 0):
        if call.returned is None or call.status is None:
            continue
        for command_id, state in told(call):
            known = max((version for seq, version in shown[command_id] if seq < call.invoked), default=0)
            if state is None:
                if known and not facts.erased_at(command_id) < call.returned:
                    yield f"{call.kind} of {command_id} was answered 404 after it was answered before"
                continue
            versions = [at for at, each in enumerate(_states(facts, command_id), 1) if each == state]
            if versions and call.kind == "read" and versions[-1] < known:
                yield f"read of {command_id} showed {state}, older than an answer before it"
            if versions:
                shown[command_id].append((call.returned, versions[0]))


def l3(facts: Facts) -> Iterator[str]:
    """L3: a final state that an answer showed is how the command ended."""
    for call in facts.history.calls:
        for command_id, state in told(call):
            states = _states(facts, command_id)
            if state in FINAL and states and states[-1] != state and facts.history.ended_at is not None:
                yield f"{call.kind} showed {command_id} as {state}, and it ended as {states[-1]}"


def told(call: Call) -> Iterator[tuple[str, str | None]]:
    """The commands that an answer shows, each with its state; None: it does not exist."""
    if call.status == 404 and call.kind == "read":
        yield call.ids[0], None
    if call.status not in (200, 201) or not isinstance(call.answer, dict):
        return
    if call.kind in ("create", "retry", "read", "abandon", "report") or (
        call.kind == "cancel" and "state" in call.answer
    ):
        yield call.answer.get("id", ""), call.answer.get("state")
    elif call.kind == "list":
        for each in call.answer["data"]:
            yield each["id"], each.get("state")


def _states(facts: Facts, command_id: str) -> list[str]:
    return [TABLE[row["type"]][1] for row in facts.commands.get(command_id, ()) if row["type"] in TABLE]


def r5(facts: Facts) -> Iterator[str]:
    """R5: a refused request leaves no event."""
    refused, taken = set[int](), set[int]()
    renewed: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # by old command: retries not refused, made
    for call in facts.history.calls:
        no = call.status is not None and 400 <= call.status < 500
        if call.kind in ("create", "fan_out") and (level := _level_in(call.body)) is not None:
            (refused if no else taken).add(level)
        if call.kind == "retry" and not no:
            renewed[call.body.split("/commands/")[1].split("/")[0]][0] += 1
    for command_id, row in facts.created.items():
        old, level = data(row).get("retry_of"), level_of(row)
        if old:
            renewed[old][1] += 1
        elif level in refused and level not in taken:
            yield f"{command_id} was created by a request that was refused"
    for old, (asked, made) in renewed.items():
        if made > asked:
            yield f"{old} was retried {made} times, {asked} of the requests were not refused"


def r7(facts: Facts) -> Iterator[str]:
    """R7: while the log cannot be written, `/readyz` says so and reads go on."""
    for since, until in _closed(facts):
        for call in facts.history.calls:
            within = call.t > since.t + KNOWN_MS and call.returned is not None and call.returned < until.seq
            if not within:
                continue
            if call.kind == "ready" and call.status != 503:
                yield f"/readyz answered {call.status} while the log could not be written"
            if call.kind in ("read", "list") and (call.status or 0) >= 500:
                yield f"a {call.kind} was answered {call.status} while only the log could not be written"
            if call.kind in CHANGES and call.status == 201:
                yield f"a {call.kind} was answered 201 while the log could not be written"


def _closed(facts: Facts) -> Iterator[tuple[Write, Write | Life]]:
    """From a write that failed to the next one that did not, in one life of the process."""
    events: list[Write | Life] = [*facts.history.writes, *facts.history.lives]
    since: Write | None = None
    for each in sorted(events, key=lambda each: each.seq):
        if isinstance(each, Write) and not each.ok:
            since = since or each
        elif since is not None and (isinstance(each, Write) or each.what not in ("full", "room")):
            yield since, each
            since = None


def o4(facts: Facts) -> Iterator[str]:
    """O4: within 5 s of having space, the same process asks for a write that succeeds. A slow disk may take
    longer to carry it out."""
    events: list[Write | Life] = [*facts.history.writes, *facts.history.lives]
    failing, room, lives = False, None, True
    for each in sorted(events, key=lambda each: each.seq):
        if isinstance(each, Write) and not each.ok:
            failing = lives  # the last write of a killed process is lost with it
            continue
        if not isinstance(each, Write) and each.what in ("up", "down", "ended"):
            lives = each.what == "up"
        at = each.began if isinstance(each, Write) else each.t
        if room is not None and at - room > AGAIN_MS:
            yield f"{at - room} ms after there was space the log had not been written again"
        room = each.t if failing and not isinstance(each, Write) and each.what == "room" else None
        failing = failing and room is not None


def level_of(row: dict[str, Any]) -> int | None:
    params = data(row).get("params")
    level = params.get("level") if isinstance(params, dict) else None
    return level if isinstance(level, int) and level >= 1_000 else None


def _level_in(body: str) -> int | None:
    _, found, rest = body.partition('"level":')
    digits = "".join(ch for ch in rest[:12] if ch.isdigit())
    return int(digits) if found and digits and int(digits) >= 1_000 else None
