"""S5 for streams: each wanted event arrives once, in order, and only after it is durable.

Nothing here may be imported from the broker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tests.simulation.checkers.hooks import is_wanted
from tests.simulation.facts import Facts
from tests.simulation.history import BY_MQTT


def by_mqtt(facts: Facts) -> Iterator[str]:
    """Every event of a command reaches the MQTT server at least once, in order, when it is durable."""
    if not facts.history.mqtt_events:
        return
    rows = {row["position"]: row for rows in facts.commands.values() for row in rows}
    got: dict[str, int] = {}
    seen = set[int]()
    for each in facts.history.streams:
        if each.name != BY_MQTT:
            continue
        row = rows.get(each.position)
        if row is None or facts.durable(row) > each.seq:
            yield f"{BY_MQTT} had position {each.position} before it was durable"
            continue
        missing = [other["position"] for other in facts.commands[row["stream"]]]
        before = got.get(row["stream"], missing[0] - 1)
        if any(before < position < each.position and position not in seen for position in missing):
            yield f"{BY_MQTT} had position {each.position} before an earlier one of its command"
        got[row["stream"]] = max(before, each.position)
        seen.add(each.position)
    for position in rows:
        if position <= (facts.history.hooked_until or 0) and position not in seen:
            yield f"{BY_MQTT} never had position {position}"


def s5(facts: Facts) -> Iterator[str]:
    for name, event in facts.history.readers.items():
        left = deque(row for row in facts.history.log if is_wanted(row, [event] if event else []))
        for seen in facts.history.streams:
            if seen.name != name:
                continue
            if not left or seen.position != left[0]["position"]:
                due = left[0]["position"] if left else "nothing"
                yield f"the reader of {name} got position {seen.position} where {due} was due"
                break
            row = left.popleft()
            if not seen.type.endswith(f".{row['type']}.v1"):
                yield f"the reader of {name} got {seen.type} at position {seen.position}: {row['type']}"
            if facts.durable(row) > seen.seq:
                yield f"the reader of {name} got position {seen.position} before it was durable"
        until = facts.history.hooked_until or 0
        if left and left[0]["position"] <= until:
            yield f"the reader of {name} never got position {left[0]['position']}"
