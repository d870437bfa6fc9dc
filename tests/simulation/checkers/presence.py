"""The invariants of presence, answers without id, one-way types, time while nobody hears, and retries.

Pure functions of a recorded history like those of `checkers`; nothing may be imported from the broker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tests.simulation.facts import CLOSING, NEVER, Facts, data
from tests.simulation.history import Row

# How long before it was durable an event can have been decided, on the slowest disk of the simulation.
COMMIT_MS = 2_000
IDLESS_PAUSE_MS = 1_000
DOUBLED_MS = 20_000
RETRIABLE = CLOSING - {"executed"}


def r8(facts: Facts) -> Iterator[str]:
    """What is retried had ended badly; giving up, answered 200, ended it as `timed_out`."""
    for command_id, row in facts.created.items():
        old = data(row).get("retry_of")
        state = facts.state_at(old, row["position"]) if old else "failed"
        if state not in RETRIABLE:
            yield f"{command_id} retries {old}, which was {state}"
    for call in facts.history.calls:
        if call.kind == "abandon" and call.status == 200:
            ends = (row for row in facts.commands.get(call.ids[0], ()) if row["type"] == "timed_out")
            if min(map(facts.durable, ends), default=NEVER) > (call.returned or 0):
                yield f"giving up {call.ids[0]} was answered 200 before it was durable"


def d9(facts: Facts) -> Iterator[str]:
    """Nothing is handed over by MQTT to a device known offline.

    With the embedded server that is each not heard of since its start. With another one an `offline` that is
    the last word since the start; a retained `online` that came after the device was last online leaves it
    open, because no event tells of that.
    """
    embedded = False
    online: dict[str, Row] = {}
    offline: dict[str, Row] = {}
    for row in facts.rows:
        device_id = row["device_id"]
        if row["type"] == "started":
            embedded = data(row).get("mqtt") == "embedded"
            online.clear()
            offline.clear()
        elif row["type"] == "online":
            online[device_id] = row
            offline.pop(device_id, None)
        elif row["type"] == "offline":
            offline[device_id] = row
        elif row["type"] == "published" and _needs_presence(facts, row):
            away = device_id in offline or (embedded and device_id not in online)
            if away and (embedded or not _retained_since(facts, row, online.get(device_id))):
                yield f"{row['stream']} was handed over at position {row['position']}, its device offline"


def _needs_presence(facts: Facts, row: Row) -> bool:
    by_mqtt = data(row).get("transport", "mqtt") == "mqtt"
    return by_mqtt and facts.definition(row["stream"]).get("presence") == "required"


def _retained_since(facts: Facts, row: Row, online: Row | None) -> bool:
    hardware_id = data(facts.created[row["stream"]]).get("hardware_id")
    since = facts.durable(online) if online else 0
    return any(
        record.what == "delivery"
        and record.retain
        and record.hardware_id == hardware_id
        and since < record.seq < facts.durable(row)
        for record in facts.history.wire
    )


def d10(facts: Facts) -> Iterator[str]:
    """A one-way command is done only when the MQTT server has taken it."""
    accepted: dict[str, int] = {}
    for record in facts.history.wire:
        if record.what == "accepted" and record.command_id is not None:
            accepted.setdefault(record.command_id, record.seq)
    for command_id, rows in facts.commands.items():
        for row in rows:
            if data(row).get("evidence") != "mqtt_puback":
                continue
            if facts.definition(command_id).get("completes_on") != "published":
                yield f"{command_id} was called done by a PUBACK, which says nothing of its type"
            if accepted.get(command_id, NEVER) > facts.durable(row):
                yield f"{command_id} was called done before the MQTT server had it"


def a3(facts: Facts) -> Iterator[str]:
    """An answer without id is taken for what was sent before the device gave it.

    So that a doubled or late one finds no other command, each end is followed by a pause.
    """
    yield from _hasty(facts)
    said: dict[tuple[str, str], list[int]] = defaultdict(list)
    for answer in facts.history.answers:
        if answer.command_id is None:
            event = {"progress": "progressed"}.get(answer.status, answer.status)
            said[answer.hardware_id, event].append(answer.seq)
    first: dict[str, int] = {}
    for record in facts.publishes:
        first.setdefault(record.command_id or "", record.seq)
    for command_id, rows in facts.commands.items():
        hardware_id = str(data(rows[0]).get("hardware_id"))
        for row in rows:
            if data(row).get("evidence") != "inferred":
                continue
            sent, durable = first.get(command_id, NEVER), facts.durable(row)
            if _doubled(facts, hardware_id, durable):
                continue
            if not any(sent < seq < durable for seq in said[hardware_id, row["type"]]):
                yield f"{command_id}: {row['type']} is taken from an answer older than the command"


def _doubled(facts: Facts, hardware_id: str, before: int) -> bool:
    """Did the device get something lately that we sent once? It does it twice, and answers whenever it has.

    Nothing in such an answer tells it from the next command's.
    """
    lately = [each for each in facts.history.wire if each.hardware_id == hardware_id and each.seq < before]
    lately = [each for each in lately if each.t > lately[-1].t - DOUBLED_MS]
    reached = sum(each.what == "reached" for each in lately)
    return reached > sum(each.what == "publish" for each in lately)


def _hasty(facts: Facts) -> Iterator[str]:
    quiet: dict[str, dict[str, int]] = defaultdict(dict)  # until when, by device and command
    for row in facts.rows:
        command_id, at = row["stream"], row["recorded_at"]
        definition = facts.definition(command_id)
        if definition.get("carries_ids", True):
            continue
        ended = quiet[row["device_id"]]
        state = facts.state_at(command_id, row["position"])
        if row["type"] == "published" and state == "pending" and at < max(ended.values(), default=0):
            yield f"{command_id} was handed over {max(ended.values()) - at} ms too soon after another's end"
        if row["type"] in CLOSING and state != "pending":
            pause = 1_000 * definition["late_answer_sec"] if row["type"] == "timed_out" else IDLESS_PAUSE_MS
            ended[command_id] = at + round(pause)  # the late answer, once it came, is waited for no longer


def a5(facts: Facts) -> Iterator[str]:
    """Nobody is timed out by the clock while no answer can be heard: what was PUBACKed comes later."""
    links, started = facts.history.links, 0
    for row in facts.rows:
        if row["type"] == "started":
            started = facts.durable(row)
        commit = facts.commit_of(row)
        if row["type"] != "timed_out" or data(row).get("evidence", "timer") != "timer" or commit is None:
            continue
        if "mqtt" not in facts.definition(row["stream"]).get("transports", ("mqtt",)):
            continue  # it cannot be answered there
        life = [link for link in links if started < link.seq < commit.seq]
        if not any(link.up for link in life):
            yield f"{row['stream']} timed out before the link was up once"
        elif not life[-1].up and commit.t - life[-1].t > COMMIT_MS:
            yield f"{row['stream']} timed out, the link down for {commit.t - life[-1].t} ms"
