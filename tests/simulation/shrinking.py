"""Makes a red run smaller: what is left is what its fault needs.

Each try is a run of the same seed with fewer parts. It needs no luck and no state: the result depends only on
the seed and on the code.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from tests.simulation.tide import Parts

LEAST = {"spells": 1, "devices": 1, "clients": 0}


def shrunk(names: tuple[str, ...], red: Callable[[Parts], bool]) -> Parts:
    """The fewest spells, devices and clients, and then as few of the named parts as possible. `red` runs the
    seed with these parts and says whether the fault is still there."""
    parts = Parts(only=names)
    for bound, least in LEAST.items():
        for fewer in range(least, getattr(parts, bound)):
            if red(smaller := replace(parts, **{bound: fewer})):
                parts = smaller
                break
    left, size = list(names), len(names)
    while size:  # leaves out all of them, then each half, each quarter, and at last each one
        start = 0
        while start < len(left):
            rest = left[:start] + left[start + size :]
            if red(smaller := replace(parts, only=tuple(rest))):
                parts, left = smaller, rest
            else:
                start += size
        size //= 2
    return parts
