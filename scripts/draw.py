"""Draws the life of a command from the code into README.md, between its two markers.

`python -m scripts.draw` rewrites the picture; a test compares it with the code.
"""

from __future__ import annotations

from pathlib import Path

from broker.lifecycle import FINAL, TRANSITIONS, State

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- life: drawn by scripts/draw.py -->\n", "<!-- /life -->"


def life() -> str:
    """The transition table as a Mermaid state diagram; events that lead the same way share an arrow."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for state, events in TRANSITIONS.items():
        arrows: dict[State, list[str]] = {}
        for event, found in events.items():
            arrows.setdefault(found, []).append(event)
        start = "[*]" if state is State.NONE else state.value
        lines += [f"    {start} --> {found.value}: {', '.join(names)}" for found, names in arrows.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state in FINAL]
    return "\n".join([*lines, "```"]) + "\n"


def drawn(text: str) -> str:
    """The README with the picture as the code has it now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + BEGIN + life() + end + after


if __name__ == "__main__":
    README.write_text(drawn(README.read_text()))
