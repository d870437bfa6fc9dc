"""The order of the site's sections, a hook of MkDocs. A page needs no entry: its folder decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECTIONS = {
    "Tutorials": "tutorials",
    "How-to": "how-to",
    "Reference": "reference",
    "Explanation": "explanation",
    "Decisions": "decisions",
    "Examples": "examples",
}
# The order in which a reader should do these pages; all others are sorted by name.
FIRST = ["index.md", "first-command.md", "first-device.md", "first-service.md"]


def on_config(config: Any) -> Any:
    """Gives the site its navigation: sections in reading order, pages by name."""
    docs = Path(config.docs_dir)
    others = {path.parent.name for path in docs.glob("*/*.md")} - set(SECTIONS.values())
    nav: list[Any] = ["index.md"]
    for title, folder in [*SECTIONS.items(), *((name.title(), name) for name in sorted(others))]:
        names = sorted(path.name for path in (docs / folder).glob("*.md"))
        names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
        nav.append({title: [f"{folder}/{name}" for name in names]})
    config.nav = [*nav, "CONTRIBUTING.md", "SECURITY.md"]
    return config
