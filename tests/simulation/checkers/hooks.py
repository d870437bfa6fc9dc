"""S5 for webhooks: each wanted event arrives at least once, in order per device, and only after it is
durable.

Nothing here may be imported from the broker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tests.simulation.facts import NO_COMMANDS, Facts
from tests.simulation.history import Call, Row


def s5(facts: Facts) -> Iterator[str]:
    """Checks every endpoint, as described by the answer that created it."""
    for call in facts.history.calls:
        if call.kind == "webhook" and call.status == 201:
            yield from _endpoint(facts, call)


def _endpoint(facts: Facts, call: Call) -> Iterator[str]:
    url, events, start = call.answer["url"], call.answer["events"], call.answer["cursor"]
    own = [row for row in facts.history.log if row.get("project", "acme") == "acme"]
    wanted = {row["position"]: row for row in own if is_wanted(row, events)}
    # per device: positions that the receiver has not taken yet
    left: dict[str, list[int]] = defaultdict(list)
    for position, each in wanted.items():
        if position >= start:  # earlier events are sent only on request (redrive)
            left[each["device_id"]].append(position)
    ids: dict[int, str] = {}
    for hook in facts.history.hooks:
        if hook.url != url:
            continue
        row = wanted.get(hook.position)
        if row is None or not hook.type.endswith(f".{row['type']}.v1"):
            yield f"{url} got {hook.type} at position {hook.position}, which is not wanted or not in the log"
            continue
        if facts.durable(row) > hook.seq:
            yield f"{url} got position {hook.position} before it was durable"
        if ids.setdefault(hook.position, hook.id) != hook.id:
            yield f"{url} got position {hook.position} under two ids"
        waiting = left[row["device_id"]]
        if hook.position in waiting and waiting[0] != hook.position:
            yield f"{url} got position {hook.position} before {waiting[0]} of the same device was taken"
        if hook.taken and hook.position in waiting:
            waiting.remove(hook.position)
    until = facts.history.hooked_until or 0
    for device_id, waiting in left.items():
        for position in waiting:
            if position <= until:
                yield f"{url} never got position {position}, of {device_id}"


def is_wanted(row: Row, events: list[str]) -> bool:
    stream = row["stream"]
    outward = stream.startswith("device/") or ("/" not in stream and stream not in NO_COMMANDS)
    return outward and (not events or row["type"] in events)
