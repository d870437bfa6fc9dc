"""What `make fuzz` learned, replayed: kept inputs, and changes of them that a seed decides."""

from __future__ import annotations

import random

import pytest

from scripts.fuzz import NAMES
from tests.fuzz.corpus import read
from tests.fuzz.seeds import SEEDS, WORDS
from tests.fuzz.targets import TARGETS

# These work with files, at some milliseconds an input.
SLOW = ("settings", "types", "imports")


def changed(draw: random.Random, data: bytes, words: list[bytes]) -> bytes:
    """The input with a few bytes changed, cut out, repeated, or replaced by a word of its grammar."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(made)), draw.randint(0, 8)
        piece = draw.choice(
            [draw.randbytes(length), b"", draw.choice(words), bytes(made[at : at + length]) * 3]
        )
        made[at : at + draw.randint(0, length)] = piece
    return bytes(made)


def test_every_target_has_seeds_words_and_kept_inputs() -> None:
    assert set(NAMES) == set(TARGETS) == set(SEEDS) == set(WORDS)
    assert [name for name in NAMES if not read(name)] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_kept_input_and_no_change_of_one_breaks_a_rule(name: str) -> None:
    draw, kept = random.Random(name), [*SEEDS[name](), *read(name)]
    many = 20 if name in SLOW else 400
    chosen = (
        kept if name not in SLOW else [*SEEDS[name](), *draw.sample(read(name), min(20, len(read(name))))]
    )
    inputs = [*chosen, *(changed(draw, draw.choice(kept), WORDS[name]) for _ in range(many))]

    for data in inputs:
        try:
            TARGETS[name](data)
        except Exception as error:
            pytest.fail(f"{type(error).__name__} for {data!r}: {error}")
