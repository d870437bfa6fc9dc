"""Draws the life of a command as an SVG picture, from the transition table.

Places of the states are set by hand; arrows and labels follow from the table, so none can be missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from broker.domain.lifecycle import FINAL, TRANSITIONS, State

WIDTH, HEIGHT = 880, 310
BOX = (124, 36)
PLACES = {
    State.NONE: (14, 110),
    State.PENDING: (150, 110),
    State.PUBLISHED: (345, 110),
    State.ACKNOWLEDGED: (590, 110),
    State.EXECUTED: (805, 110),
    State.CANCELLED: (80, 270),
    State.EXPIRED: (225, 270),
    State.TIMED_OUT: (445, 270),
    State.FAILED: (700, 270),
}
# How far an arrow bends from a straight line, in pixels. Arrows that are not listed: 0.
BENDS = {
    (State.PUBLISHED, State.EXECUTED): 120,
    (State.ACKNOWLEDGED, State.TIMED_OUT): 16,
    (State.TIMED_OUT, State.ACKNOWLEDGED): 16,
}
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1f2933}.s{font-weight:600;text-anchor:middle}"
    ".e{font-size:12px;text-anchor:middle;fill:#52606d;paint-order:stroke;stroke:#fff;stroke-width:4px}path{fill:none;stroke:#52606d;stroke-width:1.4}"
    "rect{fill:#e6f0ff;stroke:#2563b0}rect.final{fill:#eef1f4;stroke:#52606d}rect.page{fill:#fff;stroke:none}"
)


def picture() -> str:
    """The whole SVG. Events between the same two states share an arrow. An arrow without a label stands for
    the event that has the name of the new state."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>The life of a command</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0,0L8,4L0,8z" style="fill:#52606d;stroke:none"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        *(line for start, end, events in _arrows() for line in _arrow(start, end, events)),
        *(line for state in PLACES for line in _box(state)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrows() -> Iterator[tuple[State, State, list[str]]]:
    for start, events in TRANSITIONS.items():
        for end in dict.fromkeys(events.values()):
            names = [event for event, found in events.items() if found is end]
            yield start, end, [] if names == [end.value] and start is not end else names


def _arrow(start: State, end: State, events: list[str]) -> list[str]:
    (x1, y1), (x2, y2) = PLACES[start], PLACES[end]
    if start is end:
        top = y1 - BOX[1] / 2
        path = f"M{x1 - 18},{top:.0f}C{x1 - 34},{top - 44:.0f} {x1 + 34},{top - 44:.0f} {x1 + 18},{top:.0f}"
        middle = (float(x1), top - 38)
    else:
        length = math.dist((x1, y1), (x2, y2))
        bend = BENDS.get((start, end), 0)
        control = ((x1 + x2) / 2 + bend * (y2 - y1) / length, (y1 + y2) / 2 - bend * (x2 - x1) / length)
        begin, finish = _border(start, control), _border(end, control)
        path = "M{:.0f},{:.0f}Q{:.0f},{:.0f} {:.0f},{:.0f}".format(*begin, *control, *finish)
        middle = ((begin[0] + finish[0]) / 2, (begin[1] + 2 * control[1] + finish[1]) / 4 - 6)
    lines = [f'<path d="{path}" marker-end="url(#a)"/>']
    for above, event in enumerate(reversed(events)):
        lines.append(f'<text class="e" x="{middle[0]:.0f}" y="{middle[1] - 14 * above:.0f}">{event}</text>')
    return lines


def _border(state: State, towards: tuple[float, float]) -> tuple[float, float]:
    """Where the line from a box's middle to a point leaves the box."""
    x, y = PLACES[state]
    dx, dy = towards[0] - x, towards[1] - y
    width, height = (12, 12) if state is State.NONE else BOX
    shrink = max(abs(dx) / (width / 2), abs(dy) / (height / 2))
    return x + dx / shrink, y + dy / shrink


def _box(state: State) -> list[str]:
    x, y = PLACES[state]
    if state is State.NONE:
        return [f'<circle cx="{x}" cy="{y}" r="6" fill="#1f2933"/>']
    kind = ' class="final"' if state in FINAL else ""
    width, height = BOX
    return [
        f'<rect{kind} x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="6"/>',
        f'<text class="s" x="{x}" y="{y + 5}">{state.value}</text>',
    ]
