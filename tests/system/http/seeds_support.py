"""Runs the examples on other systems' pages unchanged: their curl commands and the JSON they expect.

Only values that must differ are replaced: the base address, the key, and the invented ids.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from typing import Any

from tests.system.support import WITHIN_SEC, environment

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")


def curl(example: str, **substitutes: str) -> tuple[int, Any]:
    """Runs an example and returns (status, JSON). `substitutes` maps texts of the example to their
    replacements."""
    for theirs, ours in substitutes.items():
        assert theirs in example, f"{theirs} is not in the example"
        example = example.replace(theirs, ours)
    command = [*shlex.split(example.replace("\\\n", " ")), "-s", "-w", "\n%{http_code}", "--noproxy", "*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_SEC, env=environment())
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def unlike(expected: Any, found: Any, path: str = "") -> list[str]:
    """The differences in form between an example and an answer: names, order, types, null. Extra names are
    allowed.

    Times must look like times, tokens and ids like tokens and ids; tests compare the other texts.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return [f"{path}: {found!r} is no object"]
        names = [name for name in found if name in expected]
        wrong = [] if names == list(expected) else [f"{path}: has {names}, not {list(expected)}"]
        return wrong + [
            each for name in names for each in unlike(expected[name], found[name], f"{path}.{name}")
        ]
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return [f"{path}: {found!r:.80} is no list of {len(expected)}"]
        pairs = enumerate(zip(expected, found, strict=True))
        return [each for n, (one, other) in pairs for each in unlike(one, other, f"{path}[{n}]")]
    if type(expected) is not type(found):
        return [f"{path}: {found!r} where {expected!r} is shown"]
    if isinstance(expected, str):
        for is_such in (
            TIME.fullmatch,
            re.compile(r"eyJ[\w.-]+").match,
            re.compile(r"(cmd|dev)_\w+").fullmatch,
        ):
            if is_such(expected) and not is_such(found):
                return [f"{path}: {found!r} is not like {expected!r}"]
    return []
