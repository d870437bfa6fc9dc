"""The invariants of presence, answers without id, one-way types, timeouts while the link is down, and
retries.

Pure functions of a recorded history, like those in `life`. Nothing may be imported from the broker.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from tests.simulation.facts import CLOSING, NEVER, Facts, data
from tests.simulation.history import Answer, Row, Wire

# The longest time in ms from decision to durable event, on the slowest simulated disk.
COMMIT_MS = 2_000
IDLESS_PAUSE_MS = 1_000
DOUBLED_MS = 20_000
RETRIABLE = CLOSING - {"executed"}


def r8(facts: Facts) -> Iterator[str]:
    """Only a command that ended without success is retried; an abandon answered 200 ended its command as
    `timed_out`."""
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
    """No command is handed over by MQTT to a device that is known to be offline.

    With the embedded server, a device is offline until it connects after the server's start. With an external
    server, a device is offline if its last presence event since the start is `offline`. Exception: a retained
    `online` message that came after the device's last `online` event, because no event records it.
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
    # Both may have been taken in one commit: a message that came before that commit may be the later one.
    since = facts.not_durable(online) if online else 0
    return any(
        record.what == "delivery"
        and record.retain
        and record.hardware_id == hardware_id
        and since < record.seq < facts.durable(row)
        for record in facts.history.wire
    )


def d10(facts: Facts) -> Iterator[str]:
    """A one-way command is done only after the MQTT server has accepted it."""
    accepted: dict[str, int] = {}
    for record in facts.history.wire:
        if record.what == "accepted" and record.command_id is not None:
            accepted.setdefault(record.command_id, record.seq)
    for command_id, rows in facts.commands.items():
        for row in rows:
            if data(row).get("evidence") != "mqtt_puback":
                continue
            if facts.definition(command_id).get("completes_on") != "published":
                yield f"{command_id} was completed by a PUBACK, but its type does not complete on `published`"
            if accepted.get(command_id, NEVER) > facts.durable(row):
                yield f"{command_id} was completed before the MQTT server accepted it"


def d12(facts: Facts) -> Iterator[str]:
    """The log holds at most twice `max_attempts` counting attempts of a command, whatever ended them."""
    for command_id, rows in facts.commands.items():
        most = 2 * facts.definition(command_id).get("max_attempts", 5)
        counted = sum(row["type"] == "published" and data(row).get("counts", True) for row in rows)
        if counted > most:
            yield f"{command_id} has {counted} counting attempts, at most {most} are allowed"


def a3(facts: Facts) -> Iterator[str]:
    """An answer without id is assigned only to a command that was sent before the device gave the answer.

    A pause follows each end, so that a duplicated or late answer does not match the next command.
    """
    yield from _hasty(facts)
    said: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in facts.history.answers:
        if answer.command_id is None:
            event = {"progress": "progressed"}.get(answer.status, answer.status)
            said[answer.hardware_id, event].append(answer)
    first: dict[str, Wire] = {}
    for record in facts.publishes:
        first.setdefault(record.command_id or "", record)
    for command_id, rows in facts.commands.items():
        hardware_id = str(data(rows[0]).get("hardware_id"))
        for row in rows:
            if data(row).get("evidence") != "inferred":
                continue
            sent, durable = first.get(command_id), facts.durable(row)
            answers = [each for each in said[hardware_id, row["type"]] if each.seq < durable]
            if _doubled(facts, hardware_id, durable) or _overdue(facts, row, sent, answers):
                continue
            if (sent is None or sent.seq > durable) and _restarted(facts, rows, row):
                continue
            if sent is None or not any(sent.seq < each.seq for each in answers):
                yield f"{command_id}: {row['type']} was inferred from an answer older than the command"


def _doubled(facts: Facts, hardware_id: str, before: int) -> bool:
    """Whether some command recently reached the device more often than the broker sent it. The device then
    executes it twice and answers twice, and the second answer cannot be told from an answer to the next
    command. Counted per command: messages of others that are still under way must not hide it."""
    wire = [each for each in facts.history.wire if each.hardware_id == hardware_id and each.seq < before]
    extra: Counter[str | None] = Counter()
    for each in wire:
        extra[each.command_id] += (each.what == "reached") - (each.what == "publish")
    return any(
        each.what == "reached" and extra[each.command_id] > 0 and each.t > wire[-1].t - DOUBLED_MS
        for each in wire
    )


def _restarted(facts: Facts, rows: list[Row], row: Row) -> bool:
    """Whether the broker started between the first `published` and this event. Then it does not know that the
    bytes never left."""
    handed_over = next((each["position"] for each in rows if each["type"] == "published"), row["position"])
    return any(each["type"] == "started" for each in facts.rows[handed_over : row["position"] - 1])


def _overdue(facts: Facts, row: Row, sent: Wire | None, answers: list[Answer]) -> bool:
    """Whether the device answered as the command was about to be sent, and later than the broker waits for
    answers to what timed out before. Such an answer can be taken for one to the next command."""
    ends = [
        (facts.true_time(each, each["recorded_at"]) or NEVER) + _pause_ms(facts, each)
        for each in facts.rows[: row["position"] - 1]
        if each["type"] == "timed_out" and each["device_id"] == row["device_id"]
    ]
    if sent is None or not ends:
        return False
    return any(max(ends) <= each.t and sent.t - COMMIT_MS < each.t <= sent.t for each in answers)


def _pause_ms(facts: Facts, row: Row) -> int:
    """How long the lane of a device without ids is shut after this end."""
    late_sec = facts.definition(row["stream"])["late_answer_sec"] if row["type"] == "timed_out" else 0
    return round(1_000 * late_sec) or IDLESS_PAUSE_MS


def _hasty(facts: Facts) -> Iterator[str]:
    # per device and command: the end of the pause, in ms
    quiet: dict[str, dict[str, int]] = defaultdict(dict)
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
            # overwrites the longer pause of `timed_out`: the late answer has come
            ended[command_id] = at + _pause_ms(facts, row)


def a5(facts: Facts) -> Iterator[str]:
    """No command times out while the MQTT link is down, because the device's answer may be waiting at the
    server."""
    links, started = facts.history.links, 0
    for row in facts.rows:
        if row["type"] == "started":
            started = facts.durable(row)
        commit = facts.commit_of(row)
        if row["type"] != "timed_out" or data(row).get("evidence", "timer") != "timer" or commit is None:
            continue
        if "mqtt" not in facts.definition(row["stream"]).get("transports", ("mqtt",)):
            continue  # a device without MQTT does not answer there
        decided = facts.true_time(row, row["recorded_at"]) or commit.t  # its commit may be slow
        life = [link for link in links if started < link.seq < commit.seq and link.t <= decided]
        if not any(link.up for link in life):
            yield f"{row['stream']} timed out before the link was up once"
        elif not life[-1].up and decided - life[-1].t > COMMIT_MS:
            yield f"{row['stream']} timed out, the link down for {decided - life[-1].t} ms"
