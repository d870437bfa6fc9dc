"""S5 for streams: each wanted event arrives once, in order, and only after it is durable.

Nothing here may be imported from the broker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tests.simulation.checkers.hooks import is_wanted
from tests.simulation.facts import Facts


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
