"""The inputs that are kept: those that reach each part of the code, and those that once broke a rule.

A file per target, one input per line as base64: `python -m tests.fuzz.corpus` takes over what `make fuzz`
learned, as few inputs as reach the same code.
"""

from __future__ import annotations

import base64
from pathlib import Path

HERE = Path(__file__).parent / "corpus"


def read(name: str) -> list[bytes]:
    """The kept inputs of a target."""
    file = HERE / f"{name}.txt"
    return [base64.b64decode(line) for line in file.read_text().split()] if file.exists() else []
