"""The inputs that the tests replay: found by `make fuzz`, each reaching code that no smaller one reaches.

One file per target, one input per line as base64. `python -m tests.fuzz.corpus` writes them from `.fuzz`.
What once broke a rule is a test of its own next to what was mended, and a line here or in `seeds.py`.
"""

from __future__ import annotations

import base64
from pathlib import Path

HERE = Path(__file__).parent / "corpus"
LEARNED = Path(__file__).parents[2] / ".fuzz"
MOST_INPUTS, MOST_BYTES = 80, 400


def read(name: str) -> list[bytes]:
    """The kept inputs of a target."""
    file = HERE / f"{name}.txt"
    return [base64.b64decode(line) for line in file.read_text().split()] if file.exists() else []


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for directory in sorted(path for path in LEARNED.iterdir() if path.is_dir()):
        found = {file.read_bytes() for file in directory.glob("[!s]*")}  # seed-… is what it began with
        small = sorted(
            (data for data in found if len(data) <= MOST_BYTES), key=lambda data: (len(data), data)
        )
        step = max(1, len(small) // MOST_INPUTS)
        lines = [base64.b64encode(data).decode() for data in small[::step][:MOST_INPUTS]]
        (HERE / f"{directory.name}.txt").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
