"""Generates the parts of the docs that come from the code: the state diagram and the vocabulary tables.

`python -m scripts.draw` rewrites these parts between their markers. A test compares them with the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from broker.domain.lifecycle import FINAL, TRANSITIONS, State
from scripts import vocabulary

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
VOCABULARY = ROOT / "docs" / "vocabulary.md"


def life() -> str:
    """The transition table as a Mermaid state diagram. Events between the same two states share an arrow."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for state, events in TRANSITIONS.items():
        arrows: dict[State, list[str]] = {}
        for event, found in events.items():
            arrows.setdefault(found, []).append(event)
        start = "[*]" if state is State.NONE else state.value
        lines += [f"    {start} --> {found.value}: {', '.join(names)}" for found, names in arrows.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state in FINAL]
    return "\n".join([*lines, "```"]) + "\n"


DRAWN: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    README: {"life": life},
    VOCABULARY: {
        "states": vocabulary.states,
        "fields": vocabulary.fields,
        "calls": vocabulary.calls,
    },
}


def drawn(page: Path) -> str:
    """The text of a page with its generated parts brought up to date."""
    text = page.read_text()
    for name, draw in DRAWN[page].items():
        begin, end = f"<!-- {name}: drawn by scripts/draw.py -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + draw() + end + after
    return text


if __name__ == "__main__":
    for page in DRAWN:
        page.write_text(drawn(page))
